"""FP8 grouped matmul: the reference against float64, the kernel interpreted with race detection, and lowered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import lower_for_hopper
from pallas_kernels.fp8_grouped_matmul import (
    fp8_grouped_matmul,
    fp8_grouped_swiglu,
    fp8_grouped_weight_gradient,
    gpu,
    gpu_few_rows,
)
from tests.conftest import new_rng


def problem(sizes, depth, columns):
    rng = new_rng()
    rows, groups = sum(sizes), len(sizes)

    def fp8(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float8_e4m3fn)

    def scales(*shape):
        return jnp.asarray(np.exp(rng.standard_normal(shape)), jnp.float32)

    return (
        fp8(rows, depth), scales(rows, depth // 128), fp8(groups, columns, depth),
        scales(groups, -(-columns // 128), depth // 128), jnp.asarray(sizes, jnp.int32),
    )  # fmt: skip


def in_float64(lhs, lhs_scales, rhs, rhs_scales, sizes):
    x = np.asarray(lhs.astype(jnp.float32), np.float64) * np.repeat(np.asarray(lhs_scales), 128, 1)
    w = (
        np.asarray(rhs.astype(jnp.float32), np.float64)
        * np.kron(np.asarray(rhs_scales), np.ones((128, 128)))[:, : rhs.shape[1]]
    )
    cuts = np.cumsum(np.asarray(sizes))[:-1]
    return np.concatenate([part @ m.T for part, m in zip(np.split(x, cuts), w, strict=False)])


def check(out, args, tolerance=6e-3):
    ref = in_float64(*args)
    assert np.linalg.norm(np.asarray(out.astype(jnp.float32)) - ref) < tolerance * np.linalg.norm(ref)


def check_swiglu(out, args, up):
    """Gate and up unrounded: 2^-9 is the most that a single rounding of the result to bfloat16 takes."""
    g, u = (in_float64(*args[:2], *w, args[4]) for w in (args[2:4], up))
    with np.errstate(over="ignore"):
        ref = g / (1 + np.exp(-g)) * u
    assert np.linalg.norm(np.asarray(out.astype(jnp.float32)) - ref) < 1.01 * 2**-9 * np.linalg.norm(ref)


def test_reference():
    args = problem([5, 0, 130, 1], 256, 128)
    check(fp8_grouped_matmul(*args, implementation="reference"), args)
    up = problem([5, 0, 130, 1], 256, 128)[2:4]
    both = fp8_grouped_swiglu(*args[:2], args[2:4], up, args[4], implementation="reference")
    check_swiglu(both, args, up)


@pytest.fixture
def many(monkeypatch):
    """Makes the form for many rows run for few."""
    monkeypatch.setattr(gpu, "few", lambda rows, groups: False)


@pytest.mark.parametrize(("sizes", "depth", "columns"), [([5, 0, 130, 1], 128, 192), ([64, 67], 896, 256)])
def test_gpu(sizes, depth, columns, many, capsys):
    args = problem(sizes, depth, columns)
    check(fp8_grouped_matmul(*args, implementation="gpu_interpret"), args)
    assert "RACE DETECTED" not in capsys.readouterr().out


# Of a single matrix up to 64 rows in shares of its steps, more in tiles; blocks of several groups and groups of several
# blocks; groups without rows.
@pytest.mark.parametrize(
    ("sizes", "depth", "columns"),
    [
        ([1], 384, 192), ([5], 1024, 128), ([64], 128, 384), ([130], 256, 128),
        ([3, 0, 5, 1], 640, 192), ([0, 130, 0, 2], 256, 256), ([0, 0, 1], 1024, 64),
    ],
)  # fmt: skip
def test_few_rows(sizes, depth, columns, capsys):
    args = problem(sizes, depth, columns)
    up = problem(sizes, depth, columns)[2:4]
    product = fp8_grouped_matmul(*args, implementation="gpu_interpret")
    check(product, args)
    both = fp8_grouped_swiglu(*args[:2], args[2:4], up, args[4], implementation="gpu_interpret")
    check_swiglu(both, args, up)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("groups", [1, 3])
def test_few_rows_past_the_last_group_are_zero(groups):
    *args, _ = problem([16, *[0] * (groups - 1)], 256, 128)
    sizes = jnp.asarray([5, 0, 4][:groups], jnp.int32)
    out = np.asarray(fp8_grouped_matmul(*args, sizes, implementation="gpu_interpret"), np.float64)
    expected = np.asarray(fp8_grouped_matmul(*args, sizes, implementation="reference"), np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-2)
    assert not out[int(sizes.sum()) :].any()


def test_few_rows_leave_other_matrices_alone():
    x, x_scales, w, w_scales, sizes = problem([3, 0, 4], 128, 128)
    spoiled = w.at[1].set(jnp.nan), w_scales.at[1].set(jnp.nan)
    outs = [
        fp8_grouped_matmul(x, x_scales, *of, sizes, implementation="gpu_interpret") for of in ((w, w_scales), spoiled)
    ]
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(("strips", "steps"), [(1, 1), (5, 56), (12, 56), (56, 128), (144, 56), (192, 12), (3, 1)])
@pytest.mark.parametrize("workers", [2, 132])
def test_shares_are_even_and_cover_every_step_once(strips, steps, workers):
    parts = gpu_few_rows.Parts(strips, steps, workers)
    planes, sizes = np.zeros((strips, steps), int), []
    for worker in range(parts.workers):
        begin, end = (w * parts.total // parts.workers for w in (worker, worker + 1))
        sizes.append(end - begin)
        for step in range(begin, end):
            planes[divmod(step, steps)] += 1 + worker - parts.first_of(step // steps)
    assert max(sizes) - min(sizes) <= 1
    for strip, of_steps in enumerate(planes - 1):
        np.testing.assert_array_equal(np.unique(of_steps), np.flatnonzero(parts.written()[:, strip]))
        assert (np.diff(of_steps) >= 0).all()


@pytest.mark.parametrize(("depth", "columns"), [(7168, 576), (1536, 24576), (16384, 7168), (18432, 7168)])
@pytest.mark.parametrize("rows", [1, 64, 128])
def test_few_rows_lower_without_a_copy_of_the_matrix(rows, depth, columns):
    sd, fp8, f32 = jax.ShapeDtypeStruct, jnp.float8_e4m3fn, jnp.float32
    x = sd((rows, depth), fp8), sd((rows, depth // 128), f32)
    w = sd((1, columns, depth), fp8), sd((1, -(-columns // 128), depth // 128), f32)
    sizes = sd((1,), jnp.int32)
    for form, of in ((fp8_grouped_matmul, w), (fp8_grouped_swiglu, (w, w))):
        text = lower_for_hopper(functools.partial(form, implementation="gpu"), *x, *of, sizes)
        assert text.count("custom_call @mosaic_gpu") == 1
        assert f"-> tensor<1x{columns}x{depth}xf8E4M3FN>" not in text


def test_rows_past_the_last_group_are_zero(many):
    *args, sizes = problem([5, 70, 60], 128, 128)
    out = fp8_grouped_matmul(*args, sizes.at[2].set(9), implementation="gpu_interpret")
    expected = fp8_grouped_matmul(*args, sizes, implementation="reference").at[84:].set(0)
    np.testing.assert_allclose(*(np.asarray(a.astype(jnp.float32)) for a in (out, expected)), rtol=1e-2, atol=1e-2)


def gradient_problem(steps, depth, columns):
    rng, rows = new_rng(), 128 * sum(steps)
    fp8 = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float8_e4m3fn)
    scales = lambda *shape: jnp.asarray(np.exp(rng.standard_normal(shape)), jnp.float32)
    of = lambda width: (fp8(width, rows), scales(rows // 128, width))
    return (*of(depth), *of(columns), jnp.asarray(steps, jnp.int32))


@pytest.mark.parametrize(
    ("implementation", "steps", "depth", "columns"),
    [("reference", [2, 0, 1], 256, 128), ("gpu_interpret", [1, 0, 4], 256, 128), ("gpu_interpret", [2], 128, 256)],
)
def test_weight_gradient(implementation, steps, depth, columns, capsys):
    x, x_scales, dy, dy_scales, sizes = args = gradient_problem(steps, depth, columns)
    out = fp8_grouped_weight_gradient(*args, implementation=implementation)
    wide = lambda a, s: np.asarray(a.astype(jnp.float32), np.float64) * np.repeat(np.asarray(s).T, 128, 1)
    cuts = 128 * np.cumsum(np.asarray(sizes))[:-1]
    split = lambda a: np.split(a, cuts, axis=1)
    ref = np.stack([a @ b.T for a, b in zip(split(wide(x, x_scales)), split(wide(dy, dy_scales)), strict=True)])
    assert np.linalg.norm(np.asarray(out) - ref) < 1e-6 * np.linalg.norm(ref)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "depth", "columns"), [(33792, 7168, 4096), (33792, 2048, 7168), (256, 128, 384)])
def test_weight_gradient_lowers(rows, depth, columns):
    sd = jax.ShapeDtypeStruct
    fp8, f32 = jnp.float8_e4m3fn, jnp.float32
    text = lower_for_hopper(
        functools.partial(fp8_grouped_weight_gradient, implementation="gpu"),
        sd((depth, rows), fp8), sd((rows // 128, depth), f32),
        sd((columns, rows), fp8), sd((rows // 128, columns), f32), sd((8,), jnp.int32),
    )  # fmt: skip
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(32768, 7168, 4096), (32768, 2048, 7168), (1, 128, 128), (1001, 256, 384)]
)
def test_gpu_lowers(rows, depth, columns):
    sd = jax.ShapeDtypeStruct
    fp8, f32 = jnp.float8_e4m3fn, jnp.float32
    text = lower_for_hopper(
        functools.partial(fp8_grouped_matmul, implementation="gpu"),
        sd((rows, depth), fp8), sd((rows, depth // 128), f32),
        sd((32, columns, depth), fp8), sd((32, columns // 128, depth // 128), f32), sd((32,), jnp.int32),
    )  # fmt: skip
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="tpu"), "reference, gpu"),
        (dict(implementation="gpu"), "Hopper"),
        (dict(depth=64), "multiple of 128"),
        (dict(dtype=jnp.float8_e5m2), "float8_e4m3fn"),
        (dict(scales=2), "needs shapes"),
    ],
)
def test_refusals(change, message):
    c = dict(implementation="reference", depth=128, dtype=jnp.float8_e4m3fn, scales=1) | change
    with pytest.raises(ValueError, match=message):
        fp8_grouped_matmul(
            jnp.zeros((4, c["depth"]), c["dtype"]), jnp.zeros((4, c["scales"])),
            jnp.zeros((2, 128, c["depth"]), c["dtype"]), jnp.zeros((2, 1, 1)), jnp.zeros((2,), jnp.int32),
            implementation=c["implementation"],
        )  # fmt: skip
