"""A model with the GPU kernels beside the same model without: what it computes, what it learns, how fast.

    python -m experiments.kernels_in_model --out runs/kernels_in_model

A small model with V3's head widths. Logits of packed documents, of decoding from a long cache, and gradients, against
the plain model in float32; losses of the same training steps; times of a step and of decoding. On a CPU the kernels'
plain twins take their place. Writes results.json as it goes, and report.md; `--only` makes single parts anew.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss, forward_sums
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step
from experiments.bench_step import seconds

V3 = ModelConfig.preset("v3-671b")
CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **{k: getattr(V3, k) for k in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    **dict(vocab_size=512, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=4),
    **dict(num_attention_heads=16, q_lora_rank=512, n_routed_experts=16, num_experts_per_tok=4, n_group=4),
    **dict(topk_group=2, max_position_embeddings=8192),
)


def models(cpu: bool) -> dict[str, DeepSeekV3]:
    wide = Runtime()
    if cpu:
        return {"float32": DeepSeekV3(CONFIG, wide), "plain": DeepSeekV3(CONFIG, wide), "kernels": DeepSeekV3(
            CONFIG, Runtime(attention_impl="pallas_reference", experts_impl="blocked"))}  # fmt: skip
    plain = Runtime(dtype="bfloat16", attention_impl="reference", experts_impl="ragged")
    kernels = dataclasses.replace(plain, attention_impl="gpu", experts_impl="gpu")
    return {"float32": DeepSeekV3(CONFIG, wide), "plain": DeepSeekV3(CONFIG, plain), "kernels": DeepSeekV3(
        CONFIG, kernels)}  # fmt: skip


def in_form(model: DeepSeekV3, form: str) -> DeepSeekV3:
    return model.clone(runtime=dataclasses.replace(model.runtime, attention_form=form))


def precision(name: str) -> Any:
    """Full precision of float32 products, which GPUs round by default."""
    return jax.default_matmul_precision("highest" if name == "float32" else "default")


def done(part: str, what: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {part}: {what}", flush=True)


def relative_error(out: jax.Array, ref: jax.Array) -> float:
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref))


def logits_of_documents(found: dict[str, DeepSeekV3], variables: Any, batch: int, length: int) -> dict[str, Any]:
    """Packed documents, in the expanded form: errors against float32."""
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, CONFIG.vocab_size)
    segments = jnp.sort(jax.random.randint(jax.random.key(2), (batch, length), 0, 3), axis=1)
    out = {}
    for name, model in found.items():
        with precision(name):
            out[name] = jax.block_until_ready(jax.jit(model.apply)(variables, tokens, segments=segments))
        done("documents", name)
    return {name: {"error": relative_error(x, out["float32"])} for name, x in out.items()}


def logits_of_decoding(found: dict[str, DeepSeekV3], variables: Any, batch: int, length: int) -> dict[str, Any]:
    """One token per sequence after up to `length`, in the absorbed form: errors against float32, and time."""
    rows: dict[str, Any] = {}
    expected = None
    lengths = jnp.asarray(np.random.default_rng(0).integers(length // 2, length - 1, batch), jnp.int32)
    for name, model in found.items():
        model = in_form(model, "absorbed")
        cache = init_cache(CONFIG, model.runtime, batch, length)
        leaves, tree = jax.tree.flatten(cache)
        drawn = [jax.random.normal(jax.random.key(i), x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
        cache = dataclasses.replace(jax.tree.unflatten(tree, drawn), length=lengths)
        token = jnp.zeros((batch, 1), jnp.int32)
        decode = jax.jit(lambda v, t, c, model=model: model.apply(v, t, c, method="decode")[0])
        with precision(name):
            out = decode(variables, token, cache)
            expected = out if expected is None else expected
            rows[name] = {"error": relative_error(out, expected), "seconds": seconds(decode, variables, token, cache)}
        done("decoding", f"{name}, {rows[name]}")
    return rows


def counting(seed: int, batch: int, length: int) -> dict[str, np.ndarray]:
    """A batch whose every token is the one before and 1."""
    row = (np.random.default_rng(seed).integers(0, 512, (batch, 1)) + np.arange(length + 1)) % 512
    return {"tokens": row[:, :-1].astype(np.int32), "targets": row[:, 1:].astype(np.int32)}


def gradients(found: dict[str, DeepSeekV3], variables: Any, batch: int, length: int) -> dict[str, Any]:
    """Errors of one batch's gradients against float32: of all together and of the worst parameter."""
    data = counting(0, batch, length)
    out: dict[str, Any] = {}
    for name, model in found.items():

        def loss(params: Any, model: DeepSeekV3 = model) -> jax.Array:
            sums = forward_sums(model, variables | {"params": params}, data)
            return sums.cross_entropy / sums.tokens

        with precision(name):
            found_gradients = jax.jit(jax.grad(loss))(variables["params"])
        out[name] = {jax.tree_util.keystr(k): np.asarray(x, np.float64) for k, x in
                     jax.tree_util.tree_leaves_with_path(found_gradients)}  # fmt: skip
        done("gradients", name)
    ref = out["float32"]
    whole = lambda tree: np.concatenate([x.ravel() for x in tree.values()])
    results = {}
    for name, tree in out.items():
        errors = {k: relative_error(tree[k], x) for k, x in ref.items() if np.linalg.norm(x) > 0}
        worst = max(errors, key=lambda k: errors[k])
        results[name] = {"error": relative_error(whole(tree), whole(ref)), "worst": [worst, errors[worst]]}
    return results


def train(name: str, model: DeepSeekV3, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Losses of the steps on runs of counting, and the time of one."""
    schedule = Schedule(
        ScheduleConfig(
            steps=100, batch_size=batch, warmup_steps=10, peak_learning_rate=3e-4, end_learning_rate=3e-4,
            bias_update_speed=0.01,
        )
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(model.config, schedule)))
    losses = []
    with precision(name):
        for i in range(steps):
            data = counting(i, batch, length)
            state, metrics = step(state, data)
            losses.append(float(metrics["loss"]))
            done("training", f"{name}, step {i + 1} of {steps}: loss {losses[-1]:.4f}")
        return {"losses": losses, "seconds": seconds(lambda: step(state, data))}


PARTS = ("documents", "decoding", "gradients", "training")


def main(out: Path = Path("runs/kernels_in_model"), steps: int = 0, only: str = ",".join(PARTS)) -> None:
    """Compares the models.

    Args:
      out: folder of results.json and report.md.
      steps: of training; by default 60, on a CPU 3.
      only: parts to make, separated by commas; of the others, what results.json holds stays.
    """
    names = only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise SystemExit(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    cpu = jax.default_backend() == "cpu"
    batch, length, cached = (2, 128, 256) if cpu else (8, 1024, 4096)
    steps = steps or (3 if cpu else 60)
    out.mkdir(parents=True, exist_ok=True)
    found = models(cpu)
    variables = jax.jit(found["float32"].init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    parts = {
        "documents": lambda: logits_of_documents(found, variables, batch, length),
        "decoding": lambda: logits_of_decoding(found, variables, 4 * batch, cached),
        "gradients": lambda: gradients(found, variables, batch, length),
        "training": lambda: {name: train(name, model, steps, batch, length) for name, model in found.items()},
    }
    file = out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if set(names) != set(PARTS) and file.exists() else {}
    for name in names:
        start = time.perf_counter()
        results[name] = parts[name]()
        file.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}, {time.perf_counter() - start:.0f} s: {results[name]}", flush=True)
    missing = [name for name in PARTS if name not in results]
    if missing:
        print(f"no report yet: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        return
    text = _report(results, batch, length, cached)
    (out / "report.md").write_text(text)
    print(text)


def _report(results: dict[str, Any], batch: int, length: int, cached: int) -> str:
    documents, decoding, found_gradients, training = (results[k] for k in PARTS)
    exact, *curves = (np.array(training[name]["losses"]) for name in ("float32", "plain", "kernels"))
    lines = [
        "# The kernels in a model",
        "",
        f"{datetime.date.today().isoformat()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        "`python -m experiments.kernels_in_model`. 4 layers 1024 wide, 16 heads of V3's widths, 16 experts.",
        "",
        "| | plain, bfloat16 | with kernels |",
        "|---|---:|---:|",
    ]
    row = lambda what, values: lines.append(f"| {what} | {' | '.join(values)} |")
    pair = lambda table, key, form: [form(table[name][key]) for name in ("plain", "kernels")]
    error, ms = "{:.2e}".format, lambda t: f"{t * 1e3:.2f} ms"
    row(f"logits of {batch} x {length} packed tokens: error", pair(documents, "error", error))
    row(f"logits of decoding, {4 * batch} sequences of up to {cached}: error", pair(decoding, "error", error))
    row("a decoding step", pair(decoding, "seconds", ms))
    row(f"gradients of {batch} x {length} tokens: error of all", pair(found_gradients, "error", error))
    row("and of the worst parameter", pair(found_gradients, "worst", lambda w: f"{w[1]:.2e} `{w[0]}`"))
    row(f"a training step of {batch} x {length} tokens", pair(training, "seconds", ms))
    row(f"loss, last of {len(exact)} steps (float32: {exact[-1]:.4f})", [f"{c[-1]:.4f}" for c in curves])
    row("largest difference of a step's loss from float32's, nats", [f"{np.abs(c - exact).max():.3f}" for c in curves])
    lines += ["", "Errors are against the plain model in float32, ||difference|| / ||float32||."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
