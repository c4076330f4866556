"""FP8 grouped matmul on TPUs, by tokamax: its kernel interpreted, and compiled for V3's shapes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ahead_of_time import VMEM_BYTES, compile_for_tpu, vmem_bytes
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul
from tests.pallas_kernels.generations import GENERATIONS
from tests.pallas_kernels.test_fp8_grouped_matmul import check, problem
from tests.pallas_kernels.tokamax_elsewhere import interpreted_tokamax

by_tokamax = functools.partial(fp8_grouped_matmul, implementation="tokamax")


@pytest.mark.parametrize(
    ("generation", "sizes", "depth", "columns"),
    [("v5p", [5, 0, 130, 1], 256, 128), ("v6e", [64, 67], 128, 256), ("tpu7x", [5, 0, 130, 1], 256, 128)],
)
def test_interpreted(generation, sizes, depth, columns):
    args = problem(sizes, depth, columns)
    with interpreted_tokamax(generation):
        check(by_tokamax(*args), args)


@pytest.mark.parametrize(("depth", "columns"), [(7168, 4096), (2048, 7168)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation, depth, columns, record_property):
    sd, fp8, f32 = jax.ShapeDtypeStruct, jnp.float8_e4m3fn, jnp.float32
    rows, groups = 32768, 32
    compiled = compile_for_tpu(
        generation, by_tokamax,
        sd((rows, depth), fp8), sd((rows, depth // 128), f32),
        sd((groups, columns, depth), fp8), sd((groups, columns // 128, depth // 128), f32), sd((groups,), jnp.int32),
    )  # fmt: skip
    used, temporary = vmem_bytes(compiled), compiled.memory_analysis().temp_size_in_bytes
    record_property(f"VMEM bytes {generation} {depth} x {columns}", used)
    record_property(f"HBM bytes {generation} {depth} x {columns}", temporary)
    assert 0 < used < VMEM_BYTES[generation]
    # In memory are the rows in bfloat16, the matrices transposed in FP8, and scales; the matrices never in bfloat16.
    text = compiled.as_text()
    assert f"bf16[{groups},{depth},{columns}]" not in text
    assert f"bf16[{groups},{columns},{depth}]" not in text
    assert temporary < 1.1 * (2 * rows * depth + groups * columns * depth)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="needs one of TPU v5"):
        by_tokamax(*problem([4], 128, 128))
