"""Grouped matmul on TPUs, by tokamax: its kernels interpreted, and compiled for V3's shapes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import VMEM_BYTES, compile_for_tpu, vmem_of_kernels
from pallas_kernels.grouped_matmul import grouped_matmul, library
from tests.conftest import new_rng
from tests.pallas_kernels.generations import GENERATIONS
from tests.pallas_kernels.tokamax_elsewhere import interpreted_tokamax

by_tokamax = functools.partial(grouped_matmul, implementation="tokamax")


@pytest.mark.parametrize(
    ("generation", "sizes", "rows", "depth", "columns", "share"),
    [
        ("v6e", [5, 0, 130, 1], 140, 192, 96, library.VMEM_SHARE),
        ("v5p", [300, 0, 77], 384, 128, 384, 0),  # tiles of 128 columns, of 256 rows and a last one of 128
        ("tpu7x", [0, 0], 3, 128, 128, library.VMEM_SHARE),
    ],
)
def test_result_and_gradients(generation, sizes, rows, depth, columns, share, monkeypatch):
    monkeypatch.setattr(library, "VMEM_SHARE", share)
    rng = new_rng()
    shapes = (rows, depth), (len(sizes), depth, columns), (rows, columns)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    x, dy = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dy))  # what lies past the last group is nobody's
    with interpreted_tokamax(generation):
        out, vjp = jax.vjp(lambda x, w: by_tokamax(x, w, jnp.asarray(sizes, jnp.int32)), x, w)
        dx, dw = vjp(dy)
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    parts = lambda a: np.split(wide(a)[: sum(sizes)], np.cumsum(sizes)[:-1])
    beyond = np.zeros((rows - sum(sizes), 1))
    fill = lambda blocks: np.concatenate([*blocks, beyond.repeat(blocks[0].shape[1], 1)])
    ref = fill([a @ b for a, b in zip(parts(x), wide(w), strict=True)])
    ref_dx = fill([d @ b.T for d, b in zip(parts(dy), wide(w), strict=True)])
    ref_dw = np.stack([a.T @ d for a, d in zip(parts(x), parts(dy), strict=True)])
    for got, expected, tolerance in ((out, ref, 6e-3), (dx, ref_dx, 1e-2), (dw, ref_dw, 1e-2)):
        assert got.shape == expected.shape
        assert np.linalg.norm(wide(got) - expected) <= tolerance * np.linalg.norm(expected)
        np.testing.assert_array_equal(wide(got)[expected == 0], 0)


def result_and_gradients(x, w, dy, sizes):
    out, vjp = jax.vjp(lambda x, w: by_tokamax(x, w, sizes), x, w)
    return out, *vjp(dy)


@pytest.mark.parametrize(("depth", "columns"), [(7168, 4096), pytest.param(2048, 7168, marks=pytest.mark.slow)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation, depth, columns, record_property):
    sd = jax.ShapeDtypeStruct
    x, w, dy = (sd(s, jnp.bfloat16) for s in ((32768, depth), (32, depth, columns), (32768, columns)))
    compiled = compile_for_tpu(generation, result_and_gradients, x, w, dy, sd((32,), jnp.int32))
    used = vmem_of_kernels(compiled)
    record_property(f"VMEM bytes {generation} {depth} x {columns}, in the program's order", used)
    assert len(used) == 3
    assert 0 < min(used) <= max(used) < VMEM_BYTES[generation]
    # The matrices are read as they lie, by all three passes: nothing of their size but themselves and their gradient.
    made = re.findall(rf"= bf16\[32,(?:{depth},{columns}|{columns},{depth})\]\S* ([\w-]+)\(", compiled.as_text())
    assert sorted(made) == ["custom-call", "parameter"]
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("rows", [1, 1001])
def test_compiles_for_any_shape_and_precision(rows):
    sd = jax.ShapeDtypeStruct
    x, w, dy = (sd(s, jnp.bfloat16) for s in ((rows, 200), (4, 200, 96), (rows, 96)))

    def exact(*args):
        with jax.default_matmul_precision("highest"):
            return result_and_gradients(*args)

    assert len(vmem_of_kernels(compile_for_tpu("tpu7x", exact, x, w, dy, sd((4,), jnp.int32)))) == 3


@pytest.mark.parametrize(
    ("size", "most", "part"),
    [(7168, 1024, 1024), (4096, 714, 512), (19 * 128, 1024, 7 * 128), (96, 2048, 128), (256, 5, 128)],
)
def test_equal_parts(size, most, part):
    assert library._split(size, most) == part


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="needs one of TPU v5"):
        by_tokamax(jnp.zeros((4, 128)), jnp.zeros((1, 128, 128)), jnp.zeros((1,), jnp.int32))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="takes bfloat16"):
        library.tpu(jnp.zeros((4, 128)), jnp.zeros((1, 128, 128)), jnp.zeros((1,), jnp.int32))
