"""FP8 beside bfloat16 on the GPU at hand: the three matmuls of a layer, and whole training steps.

    python -m experiments.bench_fp8 --out runs/bench_fp8

- checks: the kernels' results on a GPU beside the references'.
- quantisations: bytes per second of the quantisation of activations and gradients.
- products: one matrix, and eight groups of rows with one each; the product (Fprop), the gradient of the rows (Dgrad)
  and that of the matrix (Wgrad), of operands in FP8, and as layers compute them: with the quantisation of activations
  and gradients, and aligning groups for Wgrad. Weights are FP8 in both, and here XLA transposes them for Fprop.
- few_checks and few: products of few rows, as in decoding: results beside the reference's, and bytes per second.
- decode: greedy steps after 4,096 cached tokens, one dense and one sparse layer of V3's widths (a vocabulary of
  32,768), with weights in bfloat16, and those in FP8 blocks as Hopper's kernels take them. A floor is the time to copy
  the bytes of the weights that a step reads, of experts those that its tokens went to, and of the cache.
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
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import jaxprs_in_params

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.accounting.parameters import cache_bytes_per_token, model_variables
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.auto import fp8_recipe
from dsv3_jax.model.cache import Cache, init_cache
from dsv3_jax.model.linear import SCALES, TURNED, turn
from dsv3_jax.model.router import CHOICES
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quantization.fp8 import TILE
from dsv3_jax.quantization.products import multiply, weight_gradient
from dsv3_jax.runtime import Runtime
from experiments.bench_decode import weights_read
from experiments.bench_model import SMALL, V2_LITE, V3, gradient_of, init, measure_matmul, median_ms
from experiments.bench_step import measure_copy, seconds
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_swiglu, fp8_grouped_weight_gradient
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

Part = Literal["checks", "quantisations", "products", "few_checks", "few", "decode", "steps"]


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


def few_checks() -> Iterator[Row]:
    """Products of few rows on a GPU beside the reference's, and the quantisation of few rows."""
    if jax.default_backend() == "cpu":
        return
    for sizes, rows, depth, columns in (
        ([1], 1, 7168, 576), ([5], 5, 1536, 768), ([64], 64, 512, 7168), ([130], 130, 512, 768),
        ([1, 0, 5, 0, 64, 130, 0, 9], 216, 1536, 384), ([3, 0, 4, 1] * 4, 32, 256, 192),
    ):  # fmt: skip
        x = fp8_quantise(normal(0, rows, depth), rows=Scaling(1e-4), implementation="gpu")[0]
        plain = fp8_quantise(normal(0, rows, depth), rows=Scaling(1e-4), implementation="reference")[0]
        differ = [float(jnp.mean(bits(a) != bits(b))) for a, b in zip(x, plain, strict=True)]
        gate, up = (random_matrices(key, len(sizes), columns, depth) for key in (1, 2))
        groups, errors = jnp.asarray(sizes, jnp.int32), []
        for call, matrices in ((fp8_grouped_matmul, gate), (fp8_grouped_swiglu, (gate, up))):
            got, expected = (
                jax.jit(functools.partial(call, implementation=by))(*x, *matrices, groups).astype(jnp.float32)
                for by in ("gpu", "reference")
            )
            assert not got[sum(sizes) :].any()
            errors.append(float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)))
        yield {
            "what": f"{rows} rows, {len(sizes)} groups, {depth} x {columns}", "relative_error": errors[0],
            "relative_error_of_swiglu": errors[1], "quantised_values_and_scales_differ": differ,
        }  # fmt: skip


def random_matrices(key: int, groups: int, columns: int, depth: int) -> tuple[jax.Array, jax.Array]:
    """Random E4M3 (G, N, K), none of it NaN or near it, and scales."""
    byte = jax.random.randint(jax.random.key(key), (groups, columns, depth), 0, 256, jnp.int32).astype(jnp.uint8)
    values = jax.lax.bitcast_convert_type(byte & 0xB7, jnp.float8_e4m3fn)
    scales = jax.random.uniform(
        jax.random.key(key), (groups, -(-columns // TILE), depth // TILE), minval=0.01, maxval=0.02
    )
    return values, scales


def few() -> Iterator[Row]:
    """GB/s of V3's products in decoding: the matrices that have rows, read once."""
    if jax.default_backend() == "cpu":
        return
    for what, depth, columns, groups, two in (
        ("q_a", 7168, 1536, 1, False), ("kv_a", 7168, 576, 1, False), ("q_b", 1536, 24576, 1, False),
        ("o", 16384, 7168, 1, False), ("dense gate and up", 7168, 18432, 1, True),
        ("dense down", 18432, 7168, 1, False),
        ("experts' gate and up", 7168, 2048, 256, True), ("experts' down", 2048, 7168, 256, False),
    ):  # fmt: skip
        matrices = [
            jax.jit(random_matrices, static_argnums=(1, 2, 3))(k, groups, columns, depth) for k in range(1 + two)
        ]
        for rows in (8, 128) if groups == 1 else (8, 1024):
            sizes = np.zeros(groups, np.int32)
            np.add.at(sizes, np.random.default_rng(0).permutation(np.arange(rows) % groups), 1)
            quantise = jax.jit(functools.partial(fp8_quantise, rows=Scaling(1e-4), implementation="gpu"))
            x = quantise(normal(0, rows, depth))[0]
            call = fp8_grouped_swiglu if two else fp8_grouped_matmul
            of = matrices if two else matrices[0]
            taken = seconds(
                jax.jit(functools.partial(call, implementation="gpu")), *x, *of, jnp.asarray(sizes), at_least=0.05
            )
            read = (1 + two) * int((sizes > 0).sum()) * depth * columns
            row: Row = {"what": what, "rows": rows, "us": taken * 1e6, "GB_per_s": read / taken / 1e9}
            if rows != 1024:
                row["quantise_us"] = seconds(quantise, normal(0, rows, depth), at_least=0.05) * 1e6
            yield row


def in_blocks(config: ModelConfig, variables: Any) -> Any:
    """Variables whose matrices are quantised in blocks and held as kernels take them; their arrays are given away."""
    recipe = fp8_recipe(Runtime(dtype="bfloat16", precision="fp8"))
    flat, turned, scales = flatten_dict(variables["params"]), {}, {}

    @functools.partial(jax.jit, static_argnames=("stack", "contract"))
    def quantise(w: jax.Array, stack: int, contract: int) -> tuple[jax.Array, jax.Array]:
        inputs = int(np.prod(w.shape[stack : stack + contract]))
        of_w, other = recipe.matrices_and_turned(w.reshape(*w.shape[:stack], inputs, -1))
        return other or turn(*of_w)

    for path in [p for p in flat if p[-1].endswith(("_proj", "_mqa"))]:
        how = dict(stack=1 + ("experts" in path), contract=1 + (path[-1] == "o_proj"))
        turned[path], scales[path] = jax.block_until_ready(quantise(flat.pop(path), **how))
    held = {"params": flat, TURNED: turned, SCALES: scales}
    return {**variables, **{name: unflatten_dict(of) for name, of in held.items()}}


def decode(config: ModelConfig, batches: tuple[int, ...], length: int, steps: int) -> Iterator[Row]:
    """Milliseconds of a greedy step, of `steps` in a row, and its floor."""
    copy, began = measure_copy(), time.perf_counter()
    plain = Runtime(dtype="bfloat16", param_dtype="bfloat16", attention_form="absorbed")
    models = {"bfloat16": DeepSeekV3(config, plain)}
    models["FP8"] = DeepSeekV3(config, dataclasses.replace(plain, precision="fp8"))
    variables = {"bfloat16": init(models["bfloat16"])}
    variables["FP8"] = in_blocks(config, variables["bfloat16"])

    def start(batch: int) -> tuple[jax.Array, Cache]:
        cache = init_cache(config, plain, batch, length + 128)
        noise = lambda x: jax.random.normal(jax.random.key(2), x.shape, x.dtype) if x.ndim > 1 else x
        cache = dataclasses.replace(jax.tree.map(noise, cache), length=jnp.full((batch,), length, jnp.int32))
        return jax.random.randint(jax.random.key(1), (batch, 1), 0, config.vocab_size), cache

    def compiled(name: str, batch: int) -> Any:
        call = functools.partial(models[name].apply, method="decode", mutable=[CHOICES])

        def step(variables: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, Any]:
            (logits, cache), chosen = call(variables, tokens, cache)
            return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache, chosen

        shapes = jax.eval_shape(lambda: start(batch))
        lowered = jax.jit(step, donate_argnums=2).lower(variables[name], *shapes)
        print(f"{name}, {batch} texts: lowered after {time.perf_counter() - began:.0f} s", flush=True)
        return lowered.compile()

    first: dict[int, tuple[float, jax.Array]] = {}
    print(f"weights ready after {time.perf_counter() - began:.0f} s", flush=True)
    for batch, name in itertools.product(batches, models):
        step = compiled(name, batch)
        print(f"{name}, {batch} texts: compiled after {time.perf_counter() - began:.0f} s", flush=True)
        tokens, cache = start(batch)
        tokens, cache, chosen = step(variables[name], tokens, cache)
        drawn = np.asarray(tokens)
        for _ in range(3):
            tokens, cache, _ = step(variables[name], tokens, cache)
        jax.block_until_ready(tokens)
        before = time.perf_counter()
        for _ in range(steps):
            tokens, cache, _ = step(variables[name], tokens, cache)
        jax.block_until_ready(tokens)
        ms = (time.perf_counter() - before) / steps * 1e3
        count = weights_read(config, chosen)
        kept = sum(v.size for v in model_variables(config) if not v.path[-1].endswith(("_proj", "_mqa")))
        kept -= config.vocab_size * config.hidden_size  # the embedding
        weights = 2 * count if name == "bfloat16" else 2 * kept + (count - kept) * (1 + 4 / TILE**2)
        cached = batch * length * cache_bytes_per_token(config)
        row: Row = {"batch": batch, "weights": name, "ms": ms, "floor_ms": (weights + cached) / copy * 1e3}
        if name == "bfloat16":
            first[batch] = ms, drawn
        else:
            row |= {"ratio": ms / first[batch][0], "same_tokens": float(np.mean(drawn == first[batch][1]))}
        held = [variables[name].get(c, {}) for c in ("params", TURNED, SCALES)]
        row["bytes_of_weights"] = sum(a.nbytes for a in jax.tree.leaves(held))
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
    lines += ["", "| decoding, texts | weights | ms | floor | of bfloat16's ms |", "|---:|---|---:|---:|---:|"]
    for r in record["decode"]:
        ratio = f"{r['ratio']:.3f}" if "ratio" in r else ""
        lines.append(f"| {r['batch']} | {r['weights']} | {r['ms']:.3f} | {r['floor_ms']:.3f} | {ratio} |")
    return "\n".join(lines) + "\n"


def main(
    out: Path = Path("runs/bench_fp8"),
    parts: tuple[Part, ...] = ("products", "steps"),
    only: str = "",
    texts: int = 0,
) -> None:
    """Measures and reports.

    Args:
      out: folder of results.json and report.md.
      parts: what to measure.
      only: models whose names contain it.
      texts: of a step of decoding; by default 1 and then 128 (on a CPU 4).
    """
    cpu = jax.default_backend() == "cpu"
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "matmul": measure_matmul(),
        **{part: [] for part in typing.get_args(Part)},
    }
    sizes = (256, [(256, 128)], (1, 2)) if cpu else (32768, [(7168, 2048), (2048, 7168)], (1, 8))
    models: Any = {"tiny": (SMALL, 2, 128, {})} if cpu else MODELS
    models = {name: model for name, model in models.items() if only in name}
    parts_of = {f.__name__: functools.partial(f, *sizes) for f in (checks, quantisations, products)}
    batches = (texts,) if texts else (1, 4 if cpu else 128)
    of_decoding = (SMALL, batches, 256, 3) if cpu else (V3, batches, 4096, 50)
    run = {
        **parts_of,
        "few_checks": few_checks,
        "few": few,
        "decode": functools.partial(decode, *of_decoding),
        "steps": functools.partial(steps, models),
    }
    for part in parts:
        for row in run[part]():
            record[part].append(row)
            print(row, flush=True)
            (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
            (out / "report.md").write_text(report(record))
    print(report(record))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
