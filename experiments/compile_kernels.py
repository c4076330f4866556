"""Compiles the kernels for TPUs at DeepSeek-V3's sizes and reports their memory.

Needs libtpu (`make test` fetches it), but no TPU.

    TPU_LIBRARY_PATH=.venv/tpu/libtpu/libtpu.so python -m experiments.compile_kernels --run-dir runs/compile_kernels

A table, in the run's report.md and report.json: of each program and generation the vector memory of its greediest
kernel, and the main memory for what is neither argument nor result, such as arrays laid out anew for a kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import tyro
from rich.progress import Progress

from dsv3_jax.config import ConfigError
from dsv3_jax.planning.aot import topology_devices
from pallas_kernels.ahead_of_time import TPUS, compile_for_tpu, vmem_bytes
from pallas_kernels.cache_update import cache_update
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.mla_decode import mla_decode, pack, quantise, split
from pallas_kernels.mla_prefill import mla_prefill

HEADS, RANK, NOPE, ROPE, VALUE = 128, 512, 128, 64, 128  # of DeepSeek-V3
EXPERTS, ROWS = 32, 32768


class Case(NamedTuple):
    """A program, the shapes that it is compiled for, and which of them it may overwrite."""

    name: str
    function: Callable[..., Any]
    given: list[Any]
    donate: tuple[int, ...] = ()


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


int32 = functools.partial(array, dtype=jnp.int32)
float32 = functools.partial(array, dtype=jnp.float32)


def packed_cache(tokens: int, fp8: bool) -> tuple[Any, int]:
    """The shapes of a cache as TPUs take it, and its page size."""
    page = 256 if fp8 else 64
    form = lambda cache: pack(quantise(split(cache)) if fp8 else split(cache))
    return jax.eval_shape(form, array(tokens // page, page, RANK + ROPE)), page


def decode_cases() -> list[Case]:
    cases = []
    for batch, tokens, heads, length, fp8 in [
        (128, 1, 128, 4096, False), (128, 2, 128, 32768, False), (1, 4, 128, 65536, False), (128, 1, 16, 8192, False),
        (128, 2, 128, 32768, True),
    ]:  # fmt: skip
        cache, page = packed_cache(batch * length, fp8)
        name = f"mla_decode B={batch} T={tokens} H={heads} S={length}{' FP8' if fp8 else ''}"
        attend = functools.partial(mla_decode, scale=1.0, implementation="tpu")
        given = [array(batch, tokens, heads, RANK + ROPE), cache, int32(batch, length // page), int32(batch)]
        cases.append(Case(name, attend, given))
    return cases


def update_cases() -> list[Case]:
    cases = []
    for fp8 in (False, True):
        cache, page = packed_cache(1 << 18, fp8)
        angles = float32(128, 2, ROPE // 2)
        given = [cache, array(128, 2, RANK + ROPE), float32(RANK), angles, angles, int32(128, 4096 // page), int32(128)]
        update = functools.partial(cache_update, eps=1e-6, interleave=True, implementation="tpu")
        cases.append(Case(f"cache_update B=128 T=2{' FP8' if fp8 else ''}", update, given, donate=(0,)))
    return cases


def prefill_cases() -> list[Case]:
    cases = []
    tokens = 4096
    arrays = [
        array(1, tokens, HEADS, NOPE), array(1, tokens, HEADS, ROPE), array(1, tokens, HEADS, NOPE),
        array(1, tokens, ROPE), array(1, tokens, HEADS, VALUE),
    ]  # fmt: skip
    for implementation in ("tpu", "splash"):
        attend = functools.partial(mla_prefill, scale=1.0, implementation=implementation)

        def train(segments, cotangent, *a, attend=attend):
            out, vjp = jax.vjp(functools.partial(attend, segments=segments), *a)
            return out, vjp(cotangent)

        def layer(x, w_q, w_uk, w_uv, w_o, q_rope, latent, k_rope, attend=attend):
            """Attention between its projections, which may leave their results as the kernel wants them."""
            times = functools.partial(jnp.einsum, "btr,rhn->bthn")
            out = attend(times(x, w_q), q_rope, times(latent, w_uk), k_rope, times(latent, w_uv))
            return jnp.einsum("bthv,hvd->btd", out, w_o)

        up = array(RANK, HEADS, NOPE)
        of_layer = [
            array(1, tokens, 1536), array(1536, HEADS, NOPE), up, up, array(HEADS, VALUE, 7168), arrays[1],
            array(1, tokens, RANK), arrays[3],
        ]  # fmt: skip
        name = f"mla_prefill T={tokens} H={HEADS} by {implementation}"
        cases.append(Case(name, attend, arrays))
        cases.append(Case(f"{name}, packed, with gradients", train, [int32(1, tokens), arrays[-1], *arrays]))
        cases.append(Case(f"{name}, between projections", layer, of_layer))
    return cases


def grouped_cases() -> list[Case]:
    cases: list[Case] = []
    multiply = functools.partial(grouped_matmul, implementation="tokamax")
    for depth, columns in ((7168, 4096), (2048, 7168)):

        def train(cotangent, x, w, sizes):
            return jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)[1](cotangent)

        size = f"M={ROWS} E={EXPERTS} {depth}x{columns}"
        x, w, sizes = array(ROWS, depth), array(EXPERTS, depth, columns), int32(EXPERTS)
        cases.append(Case(f"grouped_matmul {size}", multiply, [x, w, sizes]))
        cases.append(Case(f"grouped_matmul {size}, gradients", train, [array(ROWS, columns), x, w, sizes]))
        e4m3 = functools.partial(array, dtype=jnp.float8_e4m3fn)
        given = [
            e4m3(ROWS, depth), float32(ROWS, depth // 128), e4m3(EXPERTS, columns, depth),
            float32(EXPERTS, columns // 128, depth // 128), sizes,
        ]  # fmt: skip
        fp8 = functools.partial(fp8_grouped_matmul, implementation="tokamax")
        cases.append(Case(f"fp8_grouped_matmul {size}", fp8, given))
    return cases


GROUPS = {
    "mla_decode": decode_cases, "cache_update": update_cases, "mla_prefill": prefill_cases, "grouped": grouped_cases,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile the kernels for TPUs and report their memory."""

    run_dir: pathlib.Path
    """Where report.md and report.json go."""
    only: tuple[str, ...] = tuple(GROUPS)
    """Kernels, of mla_decode, cache_update, mla_prefill, grouped."""
    generations: tuple[str, ...] = tuple(TPUS)
    """TPU generations, of v5p, v6e, tpu7x."""


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| program | TPU | vector memory, MiB | temporary memory, MiB |",
        "|---|---|---:|---:|",
    ]
    for r in rows:
        vmem, temporary = r["vmem"] / 2**20, r["temporary"] / 2**20
        lines.append(f"| {r['program']} | {r['generation']} | {vmem:.1f} | {temporary:.1f} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    for known, given in ((GROUPS, args.only), (TPUS, args.generations)):
        for name in given:
            if name not in known:
                raise SystemExit(f"no {name!r}: there are {', '.join(known)}")
    try:
        for generation in args.generations:
            topology_devices(TPUS[generation])
    except ConfigError as error:  # no libtpu
        raise SystemExit(str(error)) from None
    args.run_dir.mkdir(parents=True, exist_ok=True)
    cases = [case for name in args.only for case in GROUPS[name]()]
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        task = progress.add_task("compiling", total=len(cases) * len(args.generations))
        for case in cases:
            for generation in args.generations:
                start = time.perf_counter()
                compiled = compile_for_tpu(generation, case.function, *case.given, donate=case.donate)
                rows.append(
                    dict(
                        program=case.name,
                        generation=generation,
                        vmem=vmem_bytes(compiled),
                        temporary=compiled.memory_analysis().temp_size_in_bytes,
                        seconds=time.perf_counter() - start,
                    )
                )
                progress.advance(task)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "tokamax")}
    header = f"jax {versions['jax']}, tokamax {versions['tokamax']}\n\n"
    (args.run_dir / "report.md").write_text(header + report(rows) + "\n")
    (args.run_dir / "report.json").write_text(json.dumps(dict(versions=versions, rows=rows), indent=1))
    print(header + report(rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
