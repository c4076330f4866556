"""FP8 grouped matmul: the reference against float64, the kernel interpreted with race detection, and lowered."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ahead_of_time import lower_for_hopper
from pallas_kernels.fp8_grouped_matmul import fp8_grouped_matmul, fp8_grouped_weight_gradient
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


def test_reference():
    args = problem([5, 0, 130, 1], 256, 128)
    check(fp8_grouped_matmul(*args, implementation="reference"), args)


@pytest.mark.parametrize(("sizes", "depth", "columns"), [([5, 0, 130, 1], 128, 128), ([64, 67], 896, 256)])
def test_gpu(sizes, depth, columns, capsys):
    args = problem(sizes, depth, columns)
    check(fp8_grouped_matmul(*args, implementation="gpu_interpret"), args)
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_rows_past_the_last_group_are_zero():
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
        (dict(depth=64), "multiples of 128"),
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
