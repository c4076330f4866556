"""MLA against MHA, GQA and MQA: validation loss at equal parameters and tokens, cache bytes, time of a decoding step.

    python -m experiments.attention_variants [--size gpu]

The article's central claim is that latent attention shrinks the cache "without sacrificing accuracy". Four models
differ in their attention alone. Its parameters are equal to 0.3 %: those with fewer key and value heads have more
query heads.
MLA has the report's proportions: a rotated part of half a head, a latent of about four heads. All feed-forwards are
dense, so that routing adds no noise. The model's own code has MLA only; the others are here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import tyro

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import block
from dsv3_jax.model.cache import LayerCache, TokenPositions
from dsv3_jax.model.linear import linear
from dsv3_jax.model.module import Module
from dsv3_jax.model.rope import apply_rope
from experiments.small_run import (
    SMALL,
    Results,
    Size,
    SmallRun,
    circumstances,
    circumstances_line,
    compute_pieces,
    interval,
    once,
    pretrain,
    result_name,
    table,
    write_results,
)

NAME = "attention-variants"
HEADS = {"MHA": (8, 8), "GQA": (14, 2), "MQA": (15, 1)}
"""Query heads, and heads of keys and values."""
BASE = dataclasses.replace(
    SMALL,
    first_k_dense_replace=SMALL.num_hidden_layers,
    num_nextn_predict_layers=0,
    num_attention_heads=8,
    q_lora_rank=None,
    kv_lora_rank=61,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
"""MLA's, for a CPU. All variants have heads of `v_head_dim`."""
VARIANTS = ("MLA", *HEADS)
CONTEXTS = (1024, 4096, 16384, 65536)
BATCH = 4
"""Texts of the decoding step that is timed."""


class GroupedQueryAttention(Module):
    """Attention of grouped queries (arXiv 2305.13245) with RoPE over whole heads: MHA and MQA are its two ends."""

    queries: int
    groups: int

    @nn.compact
    def __call__(
        self, x: jax.Array, where: TokenPositions, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """x (B, T, D) -> the same, and the cache as it was: this one is for training."""
        d, head = self.config.hidden_size, self.config.v_head_dim
        rotated = dataclasses.replace(self.config, qk_rope_head_dim=head)
        q = linear(self, "q_proj", x, (d, self.queries, head), ("embed", "heads", None))
        k = linear(self, "k_proj", x, (d, self.groups, head), ("embed", "heads", None))
        v = linear(self, "v_proj", x, (d, self.groups, head), ("embed", "heads", None))
        q, k = apply_rope(q, where.positions, rotated), apply_rope(k, where.positions, rotated)
        q = q.reshape(*q.shape[:2], self.groups, -1, head)
        scores = jnp.einsum("btgqd,bsgd->bgqts", q, k, preferred_element_type=jnp.float32) * head**-0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bgqts,bsgd->btgqd", weights.astype(v.dtype), v).reshape(*x.shape[:2], self.queries, head)
        return linear(self, "o_proj", out, (self.queries, head, d), ("heads", None, "embed"), contract=2), cache


def attention(variant: str) -> Any:
    """A context in which models have this attention."""
    if variant == "MLA":
        return contextlib.nullcontext()
    queries, groups = HEADS[variant]
    other = functools.partial(GroupedQueryAttention, queries=queries, groups=groups)
    return mock.patch.object(block, "MultiHeadLatentAttention", other)


def cached_numbers(variant: str, model: ModelConfig) -> int:
    """Numbers that a layer's cache holds per token."""
    if variant == "MLA":
        return model.kv_lora_rank + model.qk_rope_head_dim
    return 2 * HEADS[variant][1] * model.v_head_dim


def parameters(variant: str, model: ModelConfig) -> int:
    """Parameters of the model."""
    from dsv3_jax import DeepSeekV3

    with attention(variant):
        tree = jax.eval_shape(DeepSeekV3(model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(x.size for x in jax.tree.leaves(tree))


def train(variant: str, seed: int, base: SmallRun) -> list[dict[str, Any]]:
    """Trains a variant; returns its records."""
    with attention(variant):
        return pretrain(dataclasses.replace(base, seed=seed), name=f"{variant}-{seed}")[1]


# A decoding step -------------------------------------------------------------------------------------------


def grouped_step(x: jax.Array, w: dict[str, jax.Array], k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of one new token (B, D) to keys and values (B, G, S, d), positions left out."""
    q = jnp.einsum("bd,dgqe->bgqe", x, w["q"])
    weights = jax.nn.softmax(jnp.einsum("bgqe,bgse->bgqs", q, k) * q.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bgqe,gqed->bd", jnp.einsum("bgqs,bgse->bgqe", weights, v), w["o"])


def latent_step(x: jax.Array, w: dict[str, jax.Array], cache: jax.Array) -> jax.Array:
    """The same of MLA in its absorbed form: all heads attend to latents and rotated keys (B, S, R + P)."""
    q, (latent, _, nope) = jnp.einsum("bd,dhe->bhe", x, w["q"]), w["k_b"].shape
    scale = q.shape[-1] ** -0.5
    q = jnp.concatenate([jnp.einsum("bhn,rhn->bhr", q[..., :nope], w["k_b"]), q[..., nope:]], axis=-1)
    weights = jax.nn.softmax(jnp.einsum("bhe,bse->bhs", q, cache) * scale, axis=-1)
    out = jnp.einsum("bhs,bsr->bhr", weights, cache[..., :latent])
    return jnp.einsum("bhv,hvd->bd", jnp.einsum("bhr,rhv->bhv", out, w["v_b"]), w["o"])


def decode_seconds(variant: str, context: int, run: SmallRun) -> float:
    """Time of a decoding step of one layer's attention, the least of 15."""
    d, head, heads = run.model.hidden_size, run.model.v_head_dim, run.model.num_attention_heads
    draw = lambda *shape: jax.random.normal(jax.random.key(0), shape, run.runtime.dtype)
    x, cached = draw(BATCH, d), cached_numbers("MLA", run.model)
    if variant == "MLA":
        latent, rope = run.model.kv_lora_rank, run.model.qk_rope_head_dim
        shapes = {"q": (d, heads, head + rope), "k_b": (latent, heads, head), "v_b": (latent, heads, head)}
        weights = {k: draw(*s) for k, s in (shapes | {"o": (heads, head, d)}).items()}
        step, cache = latent_step, (draw(BATCH, context, cached),)
    else:
        queries, groups = HEADS[variant]
        shapes = {"q": (d, groups, queries // groups, head), "o": (groups, queries // groups, head, d)}
        weights = {k: draw(*s) for k, s in shapes.items()}
        step, cache = grouped_step, (draw(BATCH, groups, context, head),) * 2
    compiled, times = jax.jit(step), []
    for _ in range(17):
        began = time.perf_counter()
        jax.block_until_ready(compiled(x, weights, *cache))
        times.append(time.perf_counter() - began)
    return min(times[2:])


# The report ------------------------------------------------------------------------------------------------


def losses(results: Results, variant: str) -> list[float]:
    """Validation losses of a variant's runs."""
    return [r["records"][-1]["validation_loss"] for r in results["runs"] if r["variant"] == variant]


def difference(results: Results, other: str = "MHA") -> tuple[float, float]:
    """MLA's loss minus another's, with the same seeds: the mean, and half the width of its 95 % confidence interval."""
    return interval([a - b for a, b in zip(losses(results, "MLA"), losses(results, other), strict=True)])


def verdict(results: Results) -> str:
    """States whether MLA's loss is MHA's, by that interval."""
    mean, half = difference(results)
    factor = results["cache_numbers"]["MHA"] / results["cache_numbers"]["MLA"]
    if mean - half > 0:
        says = "MLA's loss is higher than MHA's"
    elif mean + half < 0:
        says = "MLA's loss is lower than MHA's"
    else:
        says = "MLA's loss is MHA's within the seeds' confidence"
    numbers, (gap, width) = results["cache_numbers"], difference(results, "GQA")
    return (
        f"{says}: the difference is {mean:+.4f} ± {half:.4f} nats per byte (95 %, {len(results['seeds'])} seeds). "
        f"Its cache is smaller by a factor of {factor:.2f}. From GQA, which caches {numbers['GQA']} numbers per token "
        f"and layer where MLA has {numbers['MLA']}, the difference is {gap:+.4f} ± {width:.4f}."
    )


def render(results: Results) -> str:
    """The report in Markdown."""
    rows = []
    for variant in VARIANTS:
        mean, half = interval(losses(results, variant))
        numbers = results["cache_numbers"][variant]
        rows.append(
            [
                variant,
                f"{results['parameters'][variant]:,}",
                f"{mean:.4f} ± {half:.4f}",
                f"{numbers}",
                f"{numbers * 2 * results['layers']:,}",
                *(f"{1e3 * results['decode_seconds'][variant][str(c)]:.2f}" for c in results["contexts"]),
            ]
        )
    header = ["", "parameters", "validation loss (nats per byte)", "numbers per token and layer"]
    header += ["cache bytes per token (bfloat16)", *(f"step at {c:,} (ms)" for c in results["contexts"])]
    return (
        "# MLA against MHA, GQA and MQA\n\n"
        f"{circumstances_line(results)}\n\n{verdict(results)}\n\n"
        f"{len(results['seeds'])} seeds, {results['tokens']:,} tokens each, the same for all variants of a seed; ± is "
        "the 95 % confidence interval over seeds. A step is that of one layer's attention for "
        f"{results['decode_batch']} texts in {results['decode_dtype']}, without the rest of the model.\n\n"
        f"{table(header, rows)}\n\n![loss and decoding]({results['name']}.png)\n"
    )


def plot(results: Results, path: Path) -> None:
    """Draws loss against the cache's size, and the step's time against context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for variant in VARIANTS:
        mean, half = interval(losses(results, variant))
        left.errorbar(results["cache_numbers"][variant], mean, half, marker="o", capsize=4, label=variant)
        times = [1e3 * results["decode_seconds"][variant][str(c)] for c in results["contexts"]]
        right.plot(results["contexts"], times, marker="o", label=variant)
    left.set(xlabel="cached numbers per token and layer", ylabel="validation loss (nats per byte)", xscale="log")
    right.set(xlabel="context (tokens)", ylabel="decoding step (ms)", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    size: Size = "cpu",
    steps: int | None = None,
    seeds: int = 3,
    workers: int = 1,
    pieces: Path = Path("runs/attention_variants"),
) -> None:
    """Trains each variant with each seed, times a step, and writes the report.

    Args:
      size: cpu, 2,048 tokens per step; gpu, a model of 16 times the parameters per layer and 32,768 tokens.
      steps: optimizer steps of a run; by default 400 on a CPU, 600 on a GPU.
      seeds: runs of each variant.
      workers: runs at a time, each on its share of the cores.
      pieces: where finished runs are kept: they aren't done again.
    """
    if seeds < 2:
        raise SystemExit(f"seeds is {seeds}: a confidence interval takes at least 2")
    which = [(variant, seed) for seed in range(seeds) for variant in VARIANTS]
    base, name = SmallRun.of(size, BASE, steps), result_name(NAME, size)
    files = {pieces / f"{v}-{s}-{size}-{base.steps}.json": functools.partial(train, v, s, base) for v, s in which}
    records = compute_pieces(files, workers)
    timed = lambda v: once(
        pieces / f"step-{v}-{size}.json", lambda: {str(c): decode_seconds(v, c, base) for c in CONTEXTS}
    )
    command = f"python -m experiments.attention_variants --size {size} --steps {base.steps} --seeds {seeds}"
    results = {
        "name": name,
        "circumstances": circumstances(f"{command} --workers {workers}"),
        "seeds": list(range(seeds)),
        "tokens": base.tokens,
        "layers": base.model.num_hidden_layers,
        "parameters": {v: parameters(v, base.model) for v in VARIANTS},
        "cache_numbers": {v: cached_numbers(v, base.model) for v in VARIANTS},
        "contexts": list(CONTEXTS),
        "decode_batch": BATCH,
        "decode_dtype": str(jnp.dtype(base.runtime.dtype)),
        "decode_seconds": {v: timed(v) for v in VARIANTS},
        "runs": [{"variant": v, "seed": s, "records": r} for (v, s), r in zip(which, records, strict=True)],
    }
    write_results(name, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
