"""MLA against MHA, GQA and MQA: validation loss at equal parameters and tokens, cache bytes, time of a decoding step.

    python -m experiments.attention_variants

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

from dsv3_jax.model import block
from dsv3_jax.model.cache import LayerCache, TokenPositions
from dsv3_jax.model.linear import linear
from dsv3_jax.model.module import Module
from dsv3_jax.model.rope import apply_rope
from experiments.small_run import (
    SMALL,
    Results,
    SmallRun,
    circumstances,
    circumstances_line,
    interval,
    once,
    pretrain,
    table,
    write_results,
)

NAME = "attention-variants"
HEAD = 16
"""Width of a head, in all variants."""
HEADS = {"MHA": (8, 8), "GQA": (14, 2), "MQA": (15, 1)}
"""Query heads, and heads of keys and values."""
MLA_HEADS, LATENT, ROPE = 8, 61, 8
BASE = dataclasses.replace(
    SMALL,
    first_k_dense_replace=SMALL.num_hidden_layers,
    num_nextn_predict_layers=0,
    num_attention_heads=MLA_HEADS,
    q_lora_rank=None,
    kv_lora_rank=LATENT,
    qk_nope_head_dim=HEAD,
    qk_rope_head_dim=ROPE,
    v_head_dim=HEAD,
)
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
        d, rotated = self.config.hidden_size, dataclasses.replace(self.config, qk_rope_head_dim=HEAD)
        q = linear(self, "q_proj", x, (d, self.queries, HEAD), ("embed", "heads", None))
        k = linear(self, "k_proj", x, (d, self.groups, HEAD), ("embed", "heads", None))
        v = linear(self, "v_proj", x, (d, self.groups, HEAD), ("embed", "heads", None))
        q, k = apply_rope(q, where.positions, rotated), apply_rope(k, where.positions, rotated)
        q = q.reshape(*q.shape[:2], self.groups, -1, HEAD)
        scores = jnp.einsum("btgqd,bsgd->bgqts", q, k) * HEAD**-0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bgqts,bsgd->btgqd", weights, v).reshape(*x.shape[:2], self.queries, HEAD)
        return linear(self, "o_proj", out, (self.queries, HEAD, d), ("heads", None, "embed"), contract=2), cache


def attention(variant: str) -> Any:
    """A context in which models have this attention."""
    if variant == "MLA":
        return contextlib.nullcontext()
    queries, groups = HEADS[variant]
    other = functools.partial(GroupedQueryAttention, queries=queries, groups=groups)
    return mock.patch.object(block, "MultiHeadLatentAttention", other)


def cached_numbers(variant: str) -> int:
    """Numbers that a layer's cache holds per token."""
    return LATENT + ROPE if variant == "MLA" else 2 * HEADS[variant][1] * HEAD


def parameters(variant: str) -> int:
    """Parameters of the model."""
    from dsv3_jax import DeepSeekV3

    with attention(variant):
        tree = jax.eval_shape(DeepSeekV3(BASE).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(x.size for x in jax.tree.leaves(tree))


# A decoding step -------------------------------------------------------------------------------------------


def grouped_step(x: jax.Array, w: dict[str, jax.Array], k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of one new token (B, D) to keys and values (B, G, S, d), positions left out."""
    q = jnp.einsum("bd,dgqe->bgqe", x, w["q"])
    weights = jax.nn.softmax(jnp.einsum("bgqe,bgse->bgqs", q, k) * HEAD**-0.5, axis=-1)
    return jnp.einsum("bgqe,gqed->bd", jnp.einsum("bgqs,bgse->bgqe", weights, v), w["o"])


def latent_step(x: jax.Array, w: dict[str, jax.Array], cache: jax.Array) -> jax.Array:
    """The same of MLA in its absorbed form: all heads attend to latents and rotated keys (B, S, R + P)."""
    q = jnp.einsum("bd,dhe->bhe", x, w["q"])
    q = jnp.concatenate([jnp.einsum("bhn,rhn->bhr", q[..., :HEAD], w["k_b"]), q[..., HEAD:]], axis=-1)
    weights = jax.nn.softmax(jnp.einsum("bhe,bse->bhs", q, cache) * (HEAD + ROPE) ** -0.5, axis=-1)
    out = jnp.einsum("bhs,bsr->bhr", weights, cache[..., :LATENT])
    return jnp.einsum("bhv,hvd->bd", jnp.einsum("bhr,rhv->bhv", out, w["v_b"]), w["o"])


def decode_seconds(variant: str, context: int) -> float:
    """Time of a decoding step of one layer's attention, the least of 15."""
    d, draw = BASE.hidden_size, lambda *shape: jax.random.normal(jax.random.key(0), shape)
    x = draw(BATCH, d)
    if variant == "MLA":
        shapes = {"q": (d, MLA_HEADS, HEAD + ROPE), "k_b": (LATENT, MLA_HEADS, HEAD), "v_b": (LATENT, MLA_HEADS, HEAD)}
        weights = {k: draw(*s) for k, s in (shapes | {"o": (MLA_HEADS, HEAD, d)}).items()}
        step, cache = latent_step, (draw(BATCH, context, LATENT + ROPE),)
    else:
        queries, groups = HEADS[variant]
        shapes = {"q": (d, groups, queries // groups, HEAD), "o": (groups, queries // groups, HEAD, d)}
        weights = {k: draw(*s) for k, s in shapes.items()}
        step, cache = grouped_step, (draw(BATCH, groups, context, HEAD),) * 2
    run, times = jax.jit(step), []
    for _ in range(17):
        began = time.perf_counter()
        jax.block_until_ready(run(x, weights, *cache))
        times.append(time.perf_counter() - began)
    return min(times[2:])


# The report ------------------------------------------------------------------------------------------------


def losses(results: Results, variant: str) -> list[float]:
    """Validation losses of a variant's runs."""
    return [r["records"][-1]["validation_loss"] for r in results["runs"] if r["variant"] == variant]


def verdict(results: Results) -> str:
    """States whether MLA's loss is MHA's, by the confidence interval of the paired differences."""
    gaps = [a - b for a, b in zip(losses(results, "MLA"), losses(results, "MHA"), strict=True)]
    mean, half = interval(gaps)
    factor = results["cache_numbers"]["MHA"] / results["cache_numbers"]["MLA"]
    if mean - half > 0:
        says = "MLA's loss is higher than MHA's"
    elif mean + half < 0:
        says = "MLA's loss is lower than MHA's"
    else:
        says = "MLA's loss is MHA's within the seeds' confidence"
    return (
        f"{says}: the difference is {mean:+.4f} ± {half:.4f} nats per byte (95 %, {len(gaps)} seeds). "
        f"Its cache is smaller by a factor of {factor:.2f}."
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
        f"{results['decode_batch']} texts in float32, without the rest of the model.\n\n"
        f"{table(header, rows)}\n\n![loss and decoding](attention-variants.png)\n"
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


def main(steps: int = 400, seeds: int = 3, pieces: Path = Path("runs/attention_variants")) -> None:
    """Trains each variant with each seed, times a step, and writes the report.

    Args:
      steps: optimizer steps of a run, of 2048 tokens.
      seeds: runs of each variant.
      pieces: where finished runs are kept: they aren't done again.
    """
    if seeds < 2:
        raise SystemExit(f"seeds is {seeds}: a confidence interval takes at least 2")
    runs = []
    for seed in range(seeds):
        for variant in VARIANTS:
            run, name = SmallRun(BASE, steps, seed=seed), f"{variant}-{seed}"
            with attention(variant):
                records = once(pieces / f"{name}-{steps}.json", lambda r=run, n=name: pretrain(r, name=n)[1])
            runs.append({"variant": variant, "seed": seed, "records": records})
    timed = lambda v: once(pieces / f"step-{v}.json", lambda: {str(c): decode_seconds(v, c) for c in CONTEXTS})
    results = {
        "circumstances": circumstances(f"python -m experiments.attention_variants --steps {steps} --seeds {seeds}"),
        "seeds": list(range(seeds)),
        "tokens": run.tokens,
        "layers": BASE.num_hidden_layers,
        "parameters": {v: parameters(v) for v in VARIANTS},
        "cache_numbers": {v: cached_numbers(v) for v in VARIANTS},
        "contexts": list(CONTEXTS),
        "decode_batch": BATCH,
        "decode_seconds": {v: timed(v) for v in VARIANTS},
        "runs": runs,
    }
    write_results(NAME, results, render, plot)


if __name__ == "__main__":
    tyro.cli(main)
