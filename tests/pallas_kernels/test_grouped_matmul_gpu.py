"""Grouped matmul for Hopper: interpreted with race detection, and lowered for V3's shapes."""

from __future__ import annotations

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import lower_for_hopper
from pallas_kernels.grouped_matmul import gpu, gpu_few_rows, grouped_matmul, grouped_swiglu, library
from pallas_kernels.row_blocks import BLOCK, visits
from tests.conftest import new_rng
from tests.pallas_kernels.tokamax_elsewhere import pretend_hopper


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "rows", "depth"), [([5, 0, 130, 1], 140, 64), ([64, 67], 131, 448), ([3, 0], 300, 64)]
)
def test_product(sizes, rows, depth, transposed, capsys):
    rng = new_rng()
    shape = (len(sizes), 256, depth) if transposed else (len(sizes), depth, 256)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((rows, depth), shape))
    out = gpu.product(x, w, jnp.asarray(sizes, jnp.int32), transposed=transposed, interpret=gpu.INTERPRET)
    wide_x, wide_w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w))
    parts = np.split(wide_x[: sum(sizes)], np.cumsum(sizes)[:-1])
    ref = np.concatenate([a @ (b.T if transposed else b) for a, b in zip(parts, wide_w, strict=False)])
    out = np.asarray(out.astype(jnp.float32))
    assert np.linalg.norm(out[: sum(sizes)] - ref) < 6e-3 * np.linalg.norm(ref)
    assert (out[sum(sizes) :] == 0).all()
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(7168, 4096), (2048, 7168)])
def test_lowers(depth, columns, transposed):
    sd = jax.ShapeDtypeStruct
    text = lower_for_hopper(
        functools.partial(gpu.product, transposed=transposed),
        sd((32768, depth), jnp.bfloat16),
        sd((32, columns, depth) if transposed else (32, depth, columns), jnp.bfloat16),
        sd((32,), jnp.int32),
    )
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("rows", [1, 614, 1001])
def test_lowers_for_any_number_of_rows(rows):
    sd = jax.ShapeDtypeStruct
    x, w, sizes = sd((rows, 200), jnp.bfloat16), sd((4, 200, 96), jnp.bfloat16), sd((4,), jnp.int32)
    loss = lambda x, w, sizes: jnp.sum(gpu.grouped_matmul(x, w, sizes).astype(jnp.float32))
    assert lower_for_hopper(jax.grad(loss, (0, 1)), x, w, sizes).count("mosaic_gpu") >= 3


@pytest.mark.parametrize(("sizes", "rows"), [([5, 0, 130, 1], 140), ([64, 67], 131)])
def test_matrix_gradient(sizes, rows, capsys):
    rng = new_rng()
    x, dy = (jnp.asarray(rng.standard_normal((rows, 256)), jnp.bfloat16) for _ in range(2))
    out = gpu.matrix_gradient(x, dy, jnp.asarray(sizes, jnp.int32), interpret=gpu.INTERPRET)
    parts = (np.split(np.asarray(a.astype(jnp.float32), np.float64), np.cumsum(sizes))[:-1] for a in (x, dy))
    for got, a, b in zip(np.asarray(out.astype(jnp.float32)), *parts, strict=True):
        assert np.linalg.norm(got - a.T @ b) <= 6e-3 * np.linalg.norm(a.T @ b)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(("depth", "columns"), [(7168, 4096), (2048, 7168)])
def test_matrix_gradient_lowers(depth, columns):
    sd = jax.ShapeDtypeStruct
    shapes = sd((32768, depth), jnp.bfloat16), sd((32768, columns), jnp.bfloat16), sd((32,), jnp.int32)
    assert "mosaic_gpu" in lower_for_hopper(gpu.matrix_gradient, *shapes)


@pytest.mark.parametrize("sizes", [[0, 0], [1, 127, 128, 5], [300, 0, 1], [128, 128], [77]])
def test_visits_cover_every_row_once(sizes):
    rows = sum(sizes)
    seen = np.full(rows + BLOCK, -1)
    for group, block, lower, upper in np.asarray(visits(jnp.asarray(sizes, jnp.int32), rows // BLOCK + 1 + len(sizes))):
        assert (seen[block * BLOCK + lower : block * BLOCK + upper] == -1).all()
        seen[block * BLOCK + lower : block * BLOCK + upper] = group
    np.testing.assert_array_equal(seen[:rows], np.repeat(np.arange(len(sizes)), sizes))
    assert (seen[rows:] == -1).all()


@pytest.mark.parametrize(
    ("depth", "columns", "dtype"), [(96, 256, jnp.bfloat16), (64, 96, jnp.bfloat16), (64, 256, jnp.float32)]
)
@pytest.mark.parametrize("product", [gpu.product, gpu_few_rows.product])
def test_refusals(product, depth, columns, dtype):
    with pytest.raises(ValueError, match="bfloat16 and matrices of multiples of 64"):
        product(jnp.zeros((4, depth), dtype), jnp.zeros((1, depth, columns), dtype), jnp.zeros((1,), jnp.int32))


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the API interpret the kernels."""
    for module, names in ((gpu, ("product", "matrix_gradient")), (gpu_few_rows, ("product", "swiglu"))):
        for name in names:
            monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=gpu.INTERPRET))
    monkeypatch.setattr("pallas_kernels.grouped_matmul.api.require_hopper", lambda kernel: None)


def wide(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def close(got, expected):
    """Within bfloat16's rounding, and equal shapes; rows of zeros are zeros."""
    assert got.shape == expected.shape
    assert np.linalg.norm(wide(got) - expected) < 6e-3 * np.linalg.norm(expected)


# Multiples of 64, and what is filled up to such. Each form is made to run by how few rows count as few.
@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize(
    ("depth", "columns"),
    [pytest.param(192, 96, marks=pytest.mark.slow), (8, 264), pytest.param(320, 704, marks=pytest.mark.slow)],
)
def test_other_widths(depth, columns, few, interpreted, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "FEW", few)
    rng = new_rng()
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    x, w, dy = draw(77, depth), draw(3, depth, columns), draw(77, columns)
    sizes = jnp.asarray([5, 0, 66], jnp.int32)
    product = functools.partial(grouped_matmul, group_sizes=sizes, implementation="gpu")
    out, vjp = jax.vjp(product, x, w)
    rows = lambda a: np.split(wide(a)[:71], [5, 5])
    filled = np.zeros((6, columns)), np.zeros((6, depth))
    ref = np.concatenate([*(a @ b for a, b in zip(rows(x), wide(w), strict=True)), filled[0]])
    ref_dx = np.concatenate([*(d @ b.T for d, b in zip(rows(dy), wide(w), strict=True)), filled[1]])
    ref_dw = np.stack([a.T @ d for a, d in zip(rows(x), rows(dy), strict=True)])
    for got, expected in zip((out, *vjp(dy)), (ref, ref_dx, ref_dw), strict=True):
        close(got, expected)
    assert "RACE DETECTED" not in capsys.readouterr().out


# Blocks of several groups, a group of several blocks, groups without rows, and rows of none.
@pytest.mark.parametrize(("sizes", "rows"), [([3, 0, 5, 1], 9), ([0, 130, 0, 2], 140), ([1], 1), ([0, 0], 5)])
def test_few_rows(sizes, rows, capsys):
    rng = new_rng()
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    x, gate, up = draw(rows, 640), draw(len(sizes), 640, 192), draw(len(sizes), 640, 192) / 16
    gate /= 16
    given = dict(group_sizes=jnp.asarray(sizes, jnp.int32), interpret=gpu.INTERPRET)
    group = np.repeat(np.arange(len(sizes)), sizes)
    a, b = (np.zeros((rows, 192)) for _ in range(2))
    for out, w in ((a, gate), (b, up)):
        out[: len(group)] = np.einsum("mk,mkn->mn", wide(x)[: len(group)], wide(w)[group])
    for got, expected in (
        (gpu_few_rows.product(x, gate, **given), a),
        (gpu_few_rows.swiglu(x, gate, up, **given), a / (1 + np.exp(-a)) * b),
    ):
        assert np.linalg.norm(wide(got) - expected) <= 6e-3 * np.linalg.norm(expected)
        assert (wide(got)[len(group) :] == 0).all()
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_few_rows_leave_other_matrices_alone():
    x, w = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((3, 64, 64), jnp.bfloat16)
    w = w.at[1].set(jnp.nan)
    out = gpu_few_rows.product(x, w, jnp.asarray([3, 0, 4], jnp.int32), interpret=gpu.INTERPRET)
    np.testing.assert_array_equal(out[:7], 64)


def test_experts_of_few_rows(interpreted, monkeypatch):
    """In two kernels, and differentiable."""
    rng = new_rng()
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    a = draw(9, 64), draw(3, 64, 32) / 8, draw(3, 64, 32) / 8, draw(3, 32, 64) / 8, draw(9, 1).astype(jnp.float32)
    sizes, dy = jnp.asarray([3, 0, 5], jnp.int32), draw(9, 64)
    results = []
    for name, args in (("gpu", a), ("reference", [x.astype(jnp.float32) for x in a])):
        out, vjp = jax.vjp(functools.partial(grouped_swiglu, group_sizes=sizes, implementation=name), *args)
        results.append((out, *vjp(dy.astype(out.dtype))))
    for ours, theirs in zip(*results, strict=True):
        assert np.linalg.norm(wide(ours) - wide(theirs)) < 2e-2 * np.linalg.norm(wide(theirs))


@pytest.mark.parametrize("width", [1408, 1536])
def test_no_width_of_64s_copies_a_matrix(width):
    """Neither forward nor backward, of many rows or of few."""
    sd = jax.ShapeDtypeStruct
    for rows in (48, 32768):
        x, w, sizes = sd((rows, 2048), jnp.bfloat16), sd((64, 2048, width), jnp.bfloat16), sd((64,), jnp.int32)
        dy = sd((rows, width), jnp.bfloat16)
        backward = lambda x, w, sizes, dy: jax.vjp(lambda x, w: gpu.grouped_matmul(x, w, sizes), x, w)[1](dy)
        text = lower_for_hopper(backward, x, w, sizes, dy)
        makers = [line for line in text.splitlines() if f"-> tensor<64x2048x{width}xbf16>" in line]
        makers = [line for line in makers if not re.match(r" *(func\.func|%\d+ = call @matrix_gradient)", line)]
        assert len(makers) == 1  # the gradient itself
        assert "custom_call" in makers[0]


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="needs a Hopper GPU"):
        grouped_matmul(
            jnp.zeros((4, 256), jnp.bfloat16), jnp.zeros((1, 256, 256), jnp.bfloat16), jnp.zeros((1,), jnp.int32),
            implementation="gpu",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "columns", "dtype"), [(96, 256, jnp.bfloat16), (64, 96, jnp.bfloat16), (64, 256, jnp.float32)]
)
def test_tokamax_refusals(depth, columns, dtype):
    with pytest.raises(ValueError, match="multiples of 64"):
        library.tokamax(jnp.zeros((4, depth), dtype), jnp.zeros((1, depth, columns), dtype), jnp.zeros((1,), jnp.int32))


def test_tokamax_lowers_for_any_number_of_rows(monkeypatch):
    pretend_hopper(monkeypatch)
    sd = jax.ShapeDtypeStruct
    x, w, dy = (sd(s, jnp.bfloat16) for s in ((1001, 7168), (32, 7168, 4096), (1001, 4096)))
    backward = lambda x, w, dy, sizes: jax.vjp(lambda x, w: library.tokamax(x, w, sizes), x, w)[1](dy)
    assert "mosaic_gpu" in lower_for_hopper(backward, x, w, dy, sd((32,), jnp.int32))


def test_tokamax_sees_whole_tiles_of_rows(monkeypatch):
    """Its gradient for Hopper takes no other number of rows; ours are added and taken away around it."""

    def ragged_dot(lhs, rhs, group_sizes, *, implementation):
        assert implementation == "mosaic_gpu"
        assert lhs.shape[0] % 64 == 0
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=ragged_dot))
    rng = new_rng()
    x, w, dy = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((77, 64), (2, 64, 128), (77, 128)))
    sizes = jnp.asarray([30, 41], jnp.int32)
    ours, theirs = (
        [out, *vjp(dy)]
        for out, vjp in (jax.vjp(lambda x, w, f=f: f(x, w, sizes), x, w) for f in (library.tokamax, jax.lax.ragged_dot))
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a[:71] if a.shape[0] == 77 else a, b[:71] if b.shape[0] == 77 else b)
