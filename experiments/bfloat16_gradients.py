"""Gradients and logits in bfloat16 beside float32's: errors by kind of parameter, on real text with frequent tokens.

    python -m experiments.bfloat16_gradients --out runs/bfloat16_gradients

The whole training objective (next token, MTP, balance) of `tiny` and of a model of V2-Lite's widths, for every
implementation that the backend has. On a CPU only `tiny`. float32's are computed on the same device, with full float32
products and every expert applied to every token. A second figure of each is that of the same tokens at the experts that
float32 chose: the error without the tokens whose choice nearly ties. Writes results.json and report.md.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import chosen_experts, forward, loss_sums, model_inputs, objective

V2_LITE = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=3),
    **dict(num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64),
    **dict(v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, n_group=1, topk_group=1),
)
"""DeepSeek-V2-Lite's widths and V3's gate, in one dense and two sparse layers and an MTP module."""

KINDS = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "norms": ("norm",),
    "attention": ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj", "o_proj"),
    "router": ("weight",),
    "experts": ("experts",),
    "dense": ("gate_proj", "up_proj", "down_proj"),
    "MTP projection": ("eh_proj",),
}


def kind_of(path: tuple[Any, ...]) -> str:
    """The kind of the parameter at a path of the tree."""
    keys = [p.key for p in path]
    fits = lambda names: keys[-1].endswith(names) or ("experts" in names and "experts" in keys)
    return next(kind for kind, names in KINDS.items() if fits(names))


def text_batch(batch: int, length: int) -> dict[str, jax.Array]:
    """Bytes of Python's reference texts."""
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)).encode()
    row = np.frombuffer(text, np.uint8)[: batch * length + 1].astype(np.int32)
    cut = lambda a: jnp.asarray(a.reshape(batch, length))
    return {"tokens": cut(row[:-1]), "targets": cut(row[1:])}


@functools.partial(jax.jit, static_argnums=0)
def gradient(model: DeepSeekV3, variables: Any, batch: Any) -> Any:
    """Gradient of the training objective."""

    def loss(params: Any) -> jax.Array:
        inputs = model_inputs(model, batch)
        sums = loss_sums(forward(model, variables | {"params": params}, inputs), inputs, model.config)
        return objective(sums, model.config.aux_loss_alpha, 0.3, sums.tokens, sums.sequences)

    return jax.grad(loss)(variables["params"])


choices = jax.jit(chosen_experts, static_argnums=0)


@jax.jit
def moved(got: Any, expected: Any) -> jax.Array:
    """Share of the choices that aren't among the token's expected ones."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return jnp.mean(jnp.concatenate([(a[..., None] != b[..., None, :]).all(-1).ravel() for a, b in pairs]))


@jax.jit
def _squares(got: Any, expected: Any) -> Any:
    square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))
    return jax.tree.map(lambda a, b: (square(a - b), square(b)), got, expected)


def errors(got: Any, expected: Any) -> dict[str, dict[str, float]]:
    """By kind: ||got - expected|| / ||expected|| of all parameters of the kind together, and of the worst of them."""
    sums: dict[str, list[tuple[float, float]]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(_squares(got, expected), is_leaf=lambda x: isinstance(x, tuple))
    for path, pair in leaves:
        sums.setdefault(kind_of(path), []).append((float(pair[0]), float(pair[1])))
    return {
        kind: {
            "all": float(np.sqrt(sum(d for d, _ in of) / sum(n for _, n in of))),
            "worst": float(max(np.sqrt(d / n) for d, n in of if n > 0)),
        }
        for kind, of in sums.items()
    }


def rounding_of_logits(width: int) -> dict[str, float]:
    """In nats, of logits up to about 20, against float64 products of the same bfloat16 numbers."""
    rng, vocabulary = np.random.default_rng(0), 32768
    config = dataclasses.replace(
        ModelConfig.preset("tiny"),
        **dict(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, num_nextn_predict_layers=0),
    )
    model = DeepSeekV3(config, Runtime(dtype="bfloat16"))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    hidden = rng.standard_normal((1, 256, width))
    hidden = jnp.asarray(hidden / np.sqrt((hidden**2).mean(-1, keepdims=True)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((width, vocabulary)) * 4 / np.sqrt(width), jnp.bfloat16)
    variables = {**variables, "params": {**variables["params"], "lm_head": head.astype(jnp.float32)}}
    logits = jax.jit(lambda v, h: model.apply(v, h, method=lambda m, h: m._head(h).array()))(variables, hidden)
    exact = np.asarray(hidden[0], np.float64) @ np.asarray(head, np.float64)
    return {"largest": float(np.abs(exact).max()), "error": float(np.abs(np.asarray(logits[0]) - exact).max())}


def runtimes(cpu: bool) -> dict[str, Runtime]:
    """The bfloat16 implementations to look at, by name."""
    plain = Runtime(dtype="bfloat16", attention_impl="reference", experts_impl="ragged")
    if cpu:
        return {"ragged": plain, "blocked": dataclasses.replace(plain, experts_impl="blocked")}
    return {"auto, remat paper": Runtime(dtype="bfloat16", remat="paper"), "ragged": plain}


def main(out: Path = Path("runs/bfloat16_gradients"), sizes: str = "", seeds: int = 1) -> None:
    """Measures and reports.

    Args:
      out: folder of results.json and report.md.
      sizes: of "tiny" and "v2-lite", separated by commas; by default both, on a CPU tiny.
      seeds: how many random initialisations of each.
    """
    cpu = jax.default_backend() == "cpu"
    known = {"tiny": (ModelConfig.preset("tiny"), 16, 256 if cpu else 1024), "v2-lite": (V2_LITE, 6, 1024)}
    names = (sizes or ("tiny" if cpu else "tiny,v2-lite")).split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no size {unknown[0]!r}: there are {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"gradients": {}, "logits": rounding_of_logits(2048)}
    print("logits", results["logits"], flush=True)
    exact_runtime = Runtime(attention_impl="reference", experts_impl="reference", remat="block")
    for name, seed in itertools.product(names, range(seeds)):
        config, batch, length = known[name]
        data = text_batch(batch, length)
        most = int(np.bincount(np.asarray(data["tokens"]).ravel()).max())
        rows = {"tokens": batch * length, "most frequent": most, "errors": {}, "moved": {}}
        results["gradients"][f"{name}, seed {seed}"] = rows
        exact, start = DeepSeekV3(config, exact_runtime), time.perf_counter()
        with jax.default_matmul_precision("highest"):  # a float32 product on a GPU is TensorFloat-32 otherwise
            variables = _init(exact, jax.random.key(seed))
            expected, chosen = gradient(exact, variables, data), choices(exact, variables, data)
        jax.block_until_ready((expected, chosen))
        print(f"{name}, seed {seed}, float32, {time.perf_counter() - start:.0f} s", flush=True)
        for how, runtime in runtimes(cpu).items():
            start = time.perf_counter()
            try:
                model = DeepSeekV3(config, runtime)
                rows["errors"][how] = errors(gradient(model, variables, data), expected)
                rows["moved"][how] = float(moved(choices(model, variables, data), chosen))
                rows["errors"][f"{how}, float32's experts"] = errors(
                    gradient(model, variables, data | {"experts": chosen}), expected
                )
            except (ImportError, jax.errors.JaxRuntimeError) as error:  # no such library, or too little memory
                rows["errors"][how] = f"not measured: {str(error).splitlines()[0]}"
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            seconds = time.perf_counter() - start
            print(f"{how}, {seconds:.0f} s: {rows['errors'][how]}, moved {rows['moved'].get(how)}", flush=True)
    text = _report(results)
    (out / "report.md").write_text(text)
    print(text)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: DeepSeekV3, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))


def _report(results: dict[str, Any]) -> str:
    logits = results["logits"]
    lines = [
        "# Gradients in bfloat16",
        "",
        f"{datetime.date.today().isoformat()}, {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        "`python -m experiments.bfloat16_gradients`.",
        "",
        "||gradient - float32's|| / ||float32's||, of all parameters of a kind together and of the worst one among "
        "them. The same parameters and real text, bytes.",
    ]
    for name, rows in results["gradients"].items():
        measured = {how: e for how, e in rows["errors"].items() if not isinstance(e, str)}
        lines += ["", f"## {name}", "", f"{rows['tokens']} tokens, of which the most frequent {rows['most frequent']}."]
        lines += ["", f"| kind | {' | '.join(measured)} |", "|---" + "|---:" * len(measured) + "|"]
        for kind in KINDS:
            cells = [f"{100 * e[kind]['all']:.2f}% (worst {100 * e[kind]['worst']:.2f}%)" for e in measured.values()]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        cells = [f"{100 * rows['moved'].get(how, 0):.3f}%" for how in measured]
        lines.append(f"| choices of experts that differ | {' | '.join(cells)} |")
        lines += [f"\n{how}: {e}." for how, e in rows["errors"].items() if isinstance(e, str)]
    lines += ["", "## Logits", "", f"Up to {logits['largest']:.1f}: largest rounding error {logits['error']:.1e} nats."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tyro  # here, so that the functions can be used where it isn't installed

    tyro.cli(main, description=__doc__)
