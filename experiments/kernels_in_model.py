"""A model with the GPU kernels beside the same model without: what it computes, what it learns, how fast.

    python -m experiments.kernels_in_model --out runs/kernels_in_model

A small model with V3's head widths. Logits of packed documents, and of decoding from a long cache, against the plain
model in float32; losses of the same training steps; times of a step and of decoding. On a CPU the kernels' plain twins
take their place. Writes results.json and report.md.
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

from dsv3_jax.config import ModelConfig, Runtime
from dsv3_jax.model.transformer import DeepSeekV3, init_cache
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
    plain = Runtime(dtype="bfloat16")
    kernels = dataclasses.replace(plain, attention_impl="gpu", experts_impl="gpu")
    return {"float32": DeepSeekV3(CONFIG, wide), "plain": DeepSeekV3(CONFIG, plain), "kernels": DeepSeekV3(
        CONFIG, kernels)}  # fmt: skip


def in_form(model: DeepSeekV3, form: str) -> DeepSeekV3:
    return model.clone(runtime=dataclasses.replace(model.runtime, attention_form=form))


def precision(name: str) -> Any:
    """Of float32 products, GPUs make less by default."""
    return jax.default_matmul_precision("highest" if name == "float32" else "default")


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
            out[name] = jax.jit(model.apply)(variables, tokens, segments=segments)
    return {name: {"error": relative_error(x, out["float32"])} for name, x in out.items()}


def logits_of_decoding(found: dict[str, DeepSeekV3], variables: Any, batch: int, length: int) -> dict[str, Any]:
    """One token a sequence after up to `length`, in the absorbed form: errors against float32, and time."""
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
    return rows


def train(model: DeepSeekV3, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Losses of the steps on runs of counting, and the time of one."""
    schedule = Schedule(
        ScheduleConfig(
            steps=100, batch_size=batch, warmup_steps=1, peak_learning_rate=1e-3, end_learning_rate=1e-3,
            bias_update_speed=0.01,
        )
    )  # fmt: skip
    optimizer = make_optimizer(OptimizerConfig(), schedule)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    step = jax.jit(make_train_step(model, optimizer, schedule))
    losses = []
    for i in range(steps):
        row = (np.random.default_rng(i).integers(0, 512, (batch, 1)) + np.arange(length + 1)) % 512
        data = {"tokens": row[:, :-1].astype(np.int32), "targets": row[:, 1:].astype(np.int32)}
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "seconds": seconds(lambda: step(state, data))}


def main(out: Path = Path("runs/kernels_in_model"), steps: int = 0) -> None:
    """Compares the models.

    Args:
      out: folder of results.json and report.md.
      steps: of training; by default 20, on a CPU 3.
    """
    cpu = jax.default_backend() == "cpu"
    batch, length, cached = (2, 128, 256) if cpu else (8, 1024, 4096)
    steps = steps or (3 if cpu else 20)
    out.mkdir(parents=True, exist_ok=True)
    found = models(cpu)
    variables = jax.jit(found["float32"].init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    parts = {
        "documents": lambda: logits_of_documents(found, variables, batch, length),
        "decoding": lambda: logits_of_decoding(found, variables, 4 * batch, cached),
        "training": lambda: {name: train(found[name], steps, batch, length) for name in ("plain", "kernels")},
    }
    results: dict[str, Any] = {}
    for name, part in parts.items():
        start = time.perf_counter()
        results[name] = part()
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}, {time.perf_counter() - start:.0f} s: {results[name]}", flush=True)
    curves = np.array([results["training"][name]["losses"] for name in ("plain", "kernels")])
    results["largest_loss_difference"] = float(np.abs(curves[1] / curves[0] - 1).max())
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = _report(results, curves, batch, length, cached)
    (out / "report.md").write_text(text)
    print(text)


def _report(results: dict[str, Any], curves: np.ndarray, batch: int, length: int, cached: int) -> str:
    documents, decoding, training = (results[k] for k in ("documents", "decoding", "training"))
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
    row(f"a training step of {batch} x {length} tokens", pair(training, "seconds", ms))
    row(f"loss, first of {curves.shape[1]} steps", [f"{c[0]:.4f}" for c in curves])
    row("loss, last", [f"{c[-1]:.4f}" for c in curves])
    lines += ["", f"The largest difference of any step's loss: {results['largest_loss_difference']:.2%}."]
    lines += ["Errors are against the plain model in float32, ||difference|| / ||logits||."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
