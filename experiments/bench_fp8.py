"""FP8 beside bfloat16 on the GPU at hand: the three matmuls of a layer, and whole training steps.

    python -m experiments.bench_fp8 --out runs/bench_fp8

- products: one matrix, and eight groups of rows with one each; the product (Fprop), the gradient of the rows (Dgrad)
  and that of the matrix (Wgrad), of operands in FP8, and as layers compute them: with the quantisation of activations
  and gradients, transposing weights for Fprop, and aligning groups for Wgrad.
- steps: the loss and its gradient of two sparse models in bfloat16 and in FP8, and the compiler's temporary memory.

Writes results.json after every row, and report.md. On a CPU small sizes, which the emulation computes, show that the
script works.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import fp8_recipe
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.quantization.products import multiply, weight_gradient
from dsv3_jax.runtime import Runtime
from experiments.bench_model import SMALL, V2_LITE, V3, gradient_of, measure_matmul, median_ms
from experiments.bench_step import seconds
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_weight_gradient

type Row = dict[str, Any]
type Call = tuple[Any, ...]
"""A function and its arguments."""

MODELS: dict[str, tuple[ModelConfig, int, int, dict[str, Any]]] = {
    "V2-Lite's widths": (V2_LITE, 4, 4096, {}),
    # Parameters in bfloat16, and a quarter of the experts, so that it fits into a GPU.
    "V3's widths, 64 experts": (dataclasses.replace(V3, n_routed_experts=64), 2, 4096, {"param_dtype": "bfloat16"}),
}
"""Configuration, sequences, tokens of each, and changes to the runtime."""


def products(rows: int, sizes: list[tuple[int, int]], groups: tuple[int, ...]) -> Iterator[Row]:
    """The matmuls of `rows` rows with matrices (K, N), evenly divided into groups."""
    for (depth, columns), count in itertools.product(sizes, groups):
        for what, (alone, quantising) in matmuls(rows, depth, columns, count).items():
            row: Row = {"what": what, "rows": rows, "groups": count, "K": depth, "N": columns}
            flops = 2 * rows * depth * columns
            if jax.default_backend() != "cpu":
                row["tflops"] = flops / seconds(jax.jit(alone[0]), *alone[1:]) / 1e12
            row["quantising_tflops"] = flops / seconds(jax.jit(quantising[0]), *quantising[1:]) / 1e12
            yield row


def matmuls(rows: int, depth: int, columns: int, groups: int) -> dict[str, tuple[Call, Call]]:
    """Each matmul as kernels see it, in FP8 and contiguous along the sum, and as layers do; weights are FP8 in both."""
    recipe = fp8_recipe(Runtime(dtype="bfloat16", precision="fp8"))
    normal = lambda key, *shape: jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)
    x, dy = normal(0, rows, depth), normal(1, rows, columns)
    sizes = jnp.full((groups,), rows // groups, jnp.int32)
    w = jax.jit(recipe.matrices)(normal(2, groups, depth, columns))
    turned = jax.jit(lambda w: tuple(a.mT for a in w))(w)
    of_rows, of_columns = jax.jit(recipe.rows), jax.jit(lambda a: (lambda v, s: (v.T, s))(*recipe.columns(a)))
    product = lambda x, w: fp8_grouped_matmul(*x, *w, sizes, implementation="gpu")
    gradient = lambda x, dy: fp8_grouped_weight_gradient(*x, *dy, sizes // TILE, implementation="gpu")
    forward = lambda x, w: multiply(recipe, recipe.rows(x), w, sizes)
    backward = lambda dy, w: multiply(recipe, recipe.rows(dy, gradient=True), w, sizes, transposed=True)
    return {
        "Fprop": ((product, of_rows(x), turned), (forward, x, w)),
        "Dgrad": ((product, of_rows(dy), w), (backward, dy, w)),
        "Wgrad": ((gradient, of_columns(x), of_columns(dy)), (lambda *a: weight_gradient(recipe, *a, sizes), x, dy)),
    }


def steps(models: dict[str, tuple[ModelConfig, int, int, dict[str, Any]]]) -> Iterator[Row]:
    """Milliseconds and temporary memory of the loss and its gradient."""
    for name, (config, batch, length, changes) in models.items():
        for precision in ("dtype", "fp8"):
            gradient, make = gradient_of(config, batch, length, precision=precision, **changes)
            row: Row = {"model": name, "precision": "bfloat16" if precision == "dtype" else "FP8"}
            row["flops"] = model_flops(config, length).total * batch * length
            try:
                variables = make()
                compiled = jax.jit(gradient).lower(variables).compile()
                row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
                row["ms"] = median_ms(functools.partial(compiled, variables))
            except jax.errors.JaxRuntimeError as error:  # too little memory
                row["error"] = str(error).splitlines()[0][:200]
            variables = None
            yield row


def report(record: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [
        "# FP8 beside bfloat16",
        "",
        f"{record['date']}, {record['device']}, jax {record['jax']}, `python -m experiments.bench_fp8`. A dense "
        f"bfloat16 matmul ran at {record['matmul'] / 1e12:.0f} TFLOP/s.",
        "",
        "| matmul | rows | groups | K x N | TFLOP/s | in a layer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in record["products"]:
        alone = f"{r['tflops']:.0f}" if "tflops" in r else ""
        lines.append(
            f"| {r['what']} | {r['rows']:,} | {r['groups']} | {r['K']} x {r['N']} | {alone} "
            f"| {r['quantising_tflops']:.0f} |"
        )
    lines += ["", "| model | precision | ms | model TFLOP/s | temporary memory, GB |", "|---|---|---:|---:|---:|"]
    for r in record["steps"]:
        timed = f"{r['ms']:.1f} | {r['flops'] / r['ms'] / 1e9:.0f}" if "ms" in r else f"{r.get('error')} | "
        memory = f"{r['temporary_bytes'] / 1e9:.2f}" if "temporary_bytes" in r else ""
        lines.append(f"| {r['model']} | {r['precision']} | {timed} | {memory} |")
    return "\n".join(lines) + "\n"


def main(
    out: Path = Path("runs/bench_fp8"), parts: tuple[Literal["products", "steps"], ...] = ("products", "steps")
) -> None:
    """Measures and reports.

    Args:
      out: folder of results.json and report.md.
      parts: what to measure.
    """
    cpu = jax.default_backend() == "cpu"
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "matmul": measure_matmul(),
        "products": [],
        "steps": [],
    }
    sizes = (256, [(256, 128)], (1, 2)) if cpu else (32768, [(7168, 2048), (2048, 7168)], (1, 8))
    models: Any = {"tiny": (SMALL, 2, 128, {})} if cpu else MODELS
    run = {"products": lambda: products(*sizes), "steps": lambda: steps(models)}
    for part in parts:
        for row in run[part]():
            record[part].append(row)
            print(row, flush=True)
            (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
            (out / "report.md").write_text(report(record))
    print(report(record))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
