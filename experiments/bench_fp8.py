"""FP8 beside bfloat16 on the GPU at hand: the three matmuls of a layer, and whole training steps.

    python -m experiments.bench_fp8 --out runs/bench_fp8

- checks: the kernels' results on a GPU beside the references'.
- quantisations: bytes per second of the quantisation of activations and gradients.
- products: one matrix, and eight groups of rows with one each; the product (Fprop), the gradient of the rows (Dgrad)
  and that of the matrix (Wgrad), of operands in FP8, and as layers compute them: with the quantisation of activations
  and gradients, and aligning groups for Wgrad. Weights are FP8 in both, and here XLA transposes them for Fprop.
- steps: the loss and its gradient of two sparse models in bfloat16 and in FP8, the compiler's temporary memory, the
  time to trace, lower and compile, and what the program does in FP8 beside kernels.

Writes results.json after every row, and report.md. On a CPU small sizes, which the emulation computes, show that the
script works.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.extend.core import jaxprs_in_params

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import fp8_recipe
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.quantization.products import multiply, weight_gradient
from dsv3_jax.runtime import Runtime
from experiments.bench_model import SMALL, V2_LITE, V3, gradient_of, measure_matmul, median_ms
from experiments.bench_step import seconds
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_weight_gradient
from pallas_kernels.fp8_quantise import Scaling, fp8_quantise, tiles_of

type Row = dict[str, Any]
type Call = tuple[Any, ...]
"""A function and its arguments."""

MODELS: dict[str, tuple[ModelConfig, int, int, dict[str, Any]]] = {
    "V2-Lite's widths": (V2_LITE, 4, 4096, {}),
    # Parameters in bfloat16, and a quarter of the experts, so that it fits into a GPU.
    "V3's widths, 64 experts": (dataclasses.replace(V3, n_routed_experts=64), 2, 4096, {"param_dtype": "bfloat16"}),
}
"""Configuration, sequences, tokens of each, and changes to the runtime."""


def checks(rows: int, sizes: list[tuple[int, int]], groups: tuple[int, ...]) -> Iterator[Row]:
    """The kernels' results beside the references': relative errors, and the share of bytes that differ."""
    if jax.default_backend() == "cpu":
        return
    rows, depth, columns = 1000, 1088, 768
    sizes_of = jnp.asarray([5, 0, 130, 9, 700], jnp.int32)
    x, dy = (normal(i, rows, n) for i, n in enumerate((depth, columns)))
    for what, matrix, given, grouped in (
        ("bfloat16", x, None, None),
        ("bfloat16, groups", x, None, sizes_of),
        ("FP8, groups", *fp8_quantise(x, rows=Scaling(1e-4), implementation="reference")[0], sizes_of),
    ):
        forms = dict(rows=None if given is not None else Scaling(), columns=Scaling(1e-4, True))
        got, expected = (
            jax.jit(functools.partial(fp8_quantise, **forms, implementation=by))(matrix, given, grouped)
            for by in ("gpu", "reference")
        )
        used = -(-rows // TILE) if grouped is None else int(tiles_of(jnp.append(grouped, rows - grouped.sum())).sum())
        for form, a, b in zip(("rows", "columns"), got, expected, strict=True):
            if a is not None:
                if form == "columns":
                    a, b = ((values[:, : used * TILE], scales[:used]) for values, scales in (a, b))
                differ = [float(jnp.mean(bits(p) != bits(q))) for p, q in zip(a, b, strict=True)]
                yield {"what": f"quantise {what}, {form}", "values_differ": differ[0], "scales_differ": differ[1]}
    for what, grouped in (("one", None), ("groups", sizes_of)):
        quantised = (fp8_quantise(a, None, grouped, columns=Scaling(), implementation="reference")[1] for a in (x, dy))
        steps_of = jnp.full((1,), -(-rows // TILE), jnp.int32) if grouped is None else tiles_of(grouped)
        operands = (*itertools.chain(*quantised), steps_of)
        expected = fp8_grouped_weight_gradient(*operands, implementation="reference")
        got = fp8_grouped_weight_gradient(*operands, implementation="gpu")
        error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
        yield {"what": f"Wgrad, {what}", "relative_error": error}


def bits(a: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(a, jnp.uint8 if a.dtype.itemsize == 1 else jnp.uint32)


def quantisations(rows: int, sizes: list[tuple[int, int]], groups: tuple[int, ...]) -> Iterator[Row]:
    """GB/s, read and written, of the quantisation of activations and gradients."""
    by = "reference" if jax.default_backend() == "cpu" else "gpu"
    for depth in sorted({n for size in sizes for n in size}):
        x = normal(0, rows, depth)
        saved = jax.jit(lambda x: fp8_quantise(x, rows=Scaling(), implementation=by)[0])(x)
        count = jnp.full((groups[-1],), rows // groups[-1], jnp.int32)
        for what, bytes_each, arguments, forms in (
            ("rows", 3, (x,), dict(rows=Scaling())),
            ("rows and columns", 4, (x,), dict(rows=Scaling(), columns=Scaling())),
            ("rows and columns, groups", 4, (x, None, count), dict(rows=Scaling(), columns=Scaling())),
            ("columns of FP8", 2, saved, dict(columns=Scaling(1e-4))),
            ("columns of FP8, groups", 2, (*saved, count), dict(columns=Scaling(1e-4, True))),
        ):
            taken = seconds(jax.jit(functools.partial(fp8_quantise, **forms, implementation=by)), *arguments)
            rate = bytes_each * rows * depth / taken / 1e9
            yield {"what": what, "rows": rows, "columns": depth, "ms": taken * 1e3, "GB_per_s": rate}


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


def normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)


def matmuls(rows: int, depth: int, columns: int, groups: int) -> dict[str, tuple[Call, Call]]:
    """Each matmul as kernels see it, in FP8 and contiguous along the sum, and as layers do; weights are FP8 in both."""
    recipe = fp8_recipe(Runtime(dtype="bfloat16", precision="fp8"))
    x, dy = normal(0, rows, depth), normal(1, rows, columns)
    sizes = jnp.full((groups,), rows // groups, jnp.int32)
    w = jax.jit(recipe.matrices)(normal(2, groups, depth, columns))
    turned = jax.jit(lambda w: tuple(a.mT for a in w))(w)
    of_rows, of_columns = jax.jit(recipe.rows), jax.jit(recipe.columns)
    product = lambda x, w: fp8_grouped_matmul(*x, *w, sizes, implementation="gpu")
    gradient = lambda x, dy: fp8_grouped_weight_gradient(*x, *dy, sizes // TILE, implementation="gpu")
    forward = lambda x, w: multiply(recipe, recipe.rows(x), w, sizes)
    # As in a layer, the cotangent is quantised once for both, and its columns are part of Dgrad's time.
    backward = lambda dy, w: (
        multiply(recipe, (both := recipe.rows_and_columns(dy, sizes, gradient=True))[0], w, sizes, transposed=True),
        both[1],
    )
    of_weight = lambda x, dy: weight_gradient(recipe, recipe.columns(x, sizes), dy, (depth, columns), sizes)
    saved, of_dy = of_rows(x), jax.jit(lambda a: recipe.columns(a, sizes, gradient=True))(dy)
    return {
        "Fprop": ((product, of_rows(x), turned), (forward, x, w)),
        "Dgrad": ((product, of_rows(dy), w), (backward, dy, w)),
        "Wgrad": ((gradient, of_columns(x), of_columns(dy)), (of_weight, saved, of_dy)),
    }


def steps(models: dict[str, tuple[ModelConfig, int, int, dict[str, Any]]]) -> Iterator[Row]:
    """Milliseconds and temporary memory of the loss and its gradient."""
    for name, (config, batch, length, changes) in models.items():
        for precision in ("dtype", "fp8"):
            gradient, make = gradient_of(config, batch, length, precision=precision, **changes)
            row: Row = {"model": name, "precision": "bfloat16" if precision == "dtype" else "FP8"}
            row["flops"] = model_flops(config, length).total * batch * length
            try:
                start = time.perf_counter()
                variables = jax.block_until_ready(make())
                row["init_s"] = time.perf_counter() - start
                start = time.perf_counter()
                traced = jax.jit(gradient).trace(variables)
                row["trace_s"] = time.perf_counter() - start
                row |= counts(traced.jaxpr.jaxpr)
                start = time.perf_counter()
                lowered = traced.lower()
                row["lower_s"] = time.perf_counter() - start
                print(row, flush=True)
                start = time.perf_counter()
                compiled = lowered.compile()
                row["compile_s"] = time.perf_counter() - start
                print(row, flush=True)
                row["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
                row["ms"] = median_ms(functools.partial(compiled, variables))
            except jax.errors.JaxRuntimeError as error:  # too little memory
                row["error"] = str(error).splitlines()[0][:200]
            variables = None
            yield row


def counts(jaxpr: Any) -> Row:
    """How many kernels a program runs, and the bytes of FP8 that it makes, transposes and pads beside them."""
    found: Row = {"kernels": 0, "fp8_made_bytes": 0, "fp8_transposed_bytes": 0, "fp8_padded_bytes": 0}

    def add(equation: Any, times: int) -> None:
        out = equation.outvars[0].aval
        if equation.primitive.name in ("mpmd_map", "pallas_call"):  # ours; what libraries call
            found["kernels"] += times
        elif getattr(out, "ndim", 0) and out.dtype == jnp.float8_e4m3fn:
            padded = any(any(edge) for edge in equation.params.get("padding_config", ()))
            kind = {"convert_element_type": "made", "transpose": "transposed", "pad": "padded" if padded else None}
            if name := kind.get(equation.primitive.name):
                found[f"fp8_{name}_bytes"] += times * out.size

    def walk(jaxpr: Any, times: int) -> None:
        for equation in jaxpr.eqns:
            alone = equation.primitive.name in ("mpmd_map", "pallas_call")
            inner = [] if alone else list(jaxprs_in_params(equation.params))
            for program in inner:
                walk(program, times * equation.params.get("length", 1))
            if not inner:
                add(equation, times)

    walk(jaxpr, 1)
    return found


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
    out: Path = Path("runs/bench_fp8"),
    parts: tuple[Literal["checks", "quantisations", "products", "steps"], ...] = ("products", "steps"),
    only: str = "",
) -> None:
    """Measures and reports.

    Args:
      out: folder of results.json and report.md.
      parts: what to measure.
      only: models whose names contain it.
    """
    cpu = jax.default_backend() == "cpu"
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "matmul": measure_matmul(),
        **{part: [] for part in ("checks", "quantisations", "products", "steps")},
    }
    sizes = (256, [(256, 128)], (1, 2)) if cpu else (32768, [(7168, 2048), (2048, 7168)], (1, 8))
    models: Any = {"tiny": (SMALL, 2, 128, {})} if cpu else MODELS
    models = {name: model for name, model in models.items() if only in name}
    parts_of = {f.__name__: functools.partial(f, *sizes) for f in (checks, quantisations, products)}
    run = {**parts_of, "steps": functools.partial(steps, models)}
    for part in parts:
        for row in run[part]():
            record[part].append(row)
            print(row, flush=True)
            (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
            (out / "report.md").write_text(report(record))
    print(report(record))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
