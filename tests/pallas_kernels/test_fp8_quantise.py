"""Quantisation: the reference against the package, the kernel against the reference bit for bit, and lowered."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.quantization.fp8 import dequantise_tiles, quantise_blocks, quantise_tiles
from pallas_kernels.ahead_of_time import lower_for_hopper
from pallas_kernels.fp8_quantise import Scaling, fp8_quantise, fp8_quantise_blocks, tiles_of
from pallas_kernels.fp8_quantise.reference import spans
from tests.conftest import new_rng

SIZES = [5, 0, 130, 9, 100]  # and rows of no group
FLOOR, POWER = Scaling(1e-4), Scaling(0.0, True)


def matrix(rows, columns, dtype=jnp.bfloat16):
    """Rows of very different magnitudes, a tile of zeros, a spike, and what isn't finite."""
    rng = new_rng()
    x = rng.standard_normal((rows, columns)) * np.exp(3 * rng.standard_normal((rows, 1)))
    x[0, :64], x[3, 5], x[7, 20], x[9, 30] = 0, 1e4, np.nan, -np.inf
    return jnp.asarray(x, dtype)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        nan = np.isnan(b.astype(np.float32))  # of either sign
        np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), nan)
        bits = np.uint8 if b.dtype.itemsize == 1 else np.uint32
        np.testing.assert_array_equal(a.view(bits)[~nan], b.view(bits)[~nan])


def needed(columns, groups, rows):
    """Tiles along columns without those that are arbitrary."""
    if groups is None:
        return columns
    tiles = int(tiles_of(jnp.append(groups, rows - groups.sum())).sum())
    return columns[0][:, : 128 * tiles], columns[1][:tiles]


@pytest.mark.parametrize("how", [FLOOR, POWER], ids=["floor", "power of two"])
def test_reference_is_the_packages_tiles(how):
    x = matrix(300, 320)
    rows, columns = fp8_quantise(x, rows=how, columns=how, implementation="reference")
    same(rows, quantise_tiles(x, power_of_two=how.power_of_two, floor=how.floor))
    values, scales = quantise_blocks(x, (128, 1), power_of_two=how.power_of_two, floor=how.floor)
    same((columns[0].T[:300, :320], columns[1][:, :320]), (values, scales))


def test_groups_begin_at_multiples_of_8_rows():
    x, groups = matrix(300, 128), jnp.asarray(SIZES, jnp.int32)
    values, scales = fp8_quantise(x, None, groups, columns=FLOOR, implementation="reference")[1]
    tile, starts = 0, np.cumsum([0, *SIZES])
    for start, size, tiles in zip(starts, [*SIZES, 56], np.asarray(tiles_of(jnp.asarray([*SIZES, 56]))), strict=True):
        own = jnp.zeros((128 * tiles, 128), x.dtype).at[start % 8 : start % 8 + size].set(x[start : start + size])
        of_own = quantise_blocks(own, (128, 1), floor=1e-4)
        same((values.T[128 * tile : 128 * (tile + tiles)], scales[tile : tile + tiles]), of_own)
        tile += tiles


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "groups"),
    [
        (POWER, None, jnp.bfloat16, None),
        (FLOOR, POWER, jnp.bfloat16, None),
        (FLOOR, FLOOR, jnp.float32, None),
        (None, FLOOR, jnp.bfloat16, SIZES),
        (POWER, FLOOR, jnp.bfloat16, SIZES),
    ],
)
def test_gpu(rows, columns, dtype, groups, capsys):
    x, groups = matrix(301, 192, dtype), None if groups is None else jnp.asarray(groups, jnp.int32)
    quantise = functools.partial(fp8_quantise, x, None, groups, rows=rows, columns=columns)
    got, expected = quantise(implementation="gpu_interpret"), quantise(implementation="reference")
    if rows:
        same(got[0], expected[0])
    if columns:
        same(needed(got[1], groups, 301), needed(expected[1], groups, 301))
    if not (rows and groups is not None):  # then two blocks write the same bytes to rows
        assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("rows", [1, 8, 64, 72, 128])
def test_gpu_few_rows(rows, capsys):
    x = matrix(128, 192)[-rows:]
    got, expected = (fp8_quantise(x, rows=FLOOR, implementation=by)[0] for by in ("gpu_interpret", "reference"))
    same(got, expected)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("groups", [None, SIZES])
def test_gpu_from_rows(groups, capsys):
    x, groups = matrix(300, 192), None if groups is None else jnp.asarray(groups, jnp.int32)
    saved = quantise_tiles(x)
    got = fp8_quantise(*saved, groups, columns=POWER, implementation="gpu_interpret")[1]
    wide = fp8_quantise(dequantise_tiles(*saved), None, groups, columns=POWER, implementation="reference")[1]
    same(needed(got, groups, 300), needed(wide, groups, 300))
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "columns"), [(32768, 7168), (98304, 1408), (1001, 10944)])
@pytest.mark.parametrize("groups", [0, 8])
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_lowers(rows, columns, groups, fp8):
    sd = jax.ShapeDtypeStruct
    x = sd((rows, columns), jnp.float8_e4m3fn if fp8 else jnp.bfloat16)
    scales = sd((rows, -(-columns // 128)), jnp.float32) if fp8 else None
    quantise = functools.partial(fp8_quantise, rows=None if fp8 else FLOOR, columns=POWER, implementation="gpu")
    assert "mosaic_gpu" in lower_for_hopper(quantise, x, scales, sd((groups,), jnp.int32) if groups else None)


@pytest.mark.parametrize("groups", [None, (1000,), (872, 120)])
def test_runs_of_scales_end_within_their_row(groups):
    """Hopper's copies of a run stop at an array's end, not at its row's, as the interpreter's do."""
    sizes = None if groups is None else jnp.asarray(groups, jnp.int32)
    given = jax.ShapeDtypeStruct((1001, 320), jnp.bfloat16), None, sizes
    module = lower_for_hopper(functools.partial(fp8_quantise, rows=FLOOR, implementation="gpu"), *given)
    (call,) = (line for line in module.splitlines() if "mosaic_gpu" in line)
    (room,) = re.findall(r"tensor<3x(\d+)xf32>", call)
    tiles = ((first, 0, 128) for first in range(0, 1001, 128)) if sizes is None else spans(sizes, 1001).tolist()
    assert max(first for first, lower, upper in tiles if lower < upper) + 128 <= int(room)


def matrices(dtype):
    """Blocks of zeros, of what isn't finite, and cut off at both edges."""
    w = 0.05 * jax.random.normal(jax.random.key(0), (2, 192, 320), dtype)
    return w.at[1, :128, :128].set(0).at[0, 3, 5].set(jnp.nan).at[1, 150, 300].set(jnp.inf)


@pytest.mark.parametrize("how", [Scaling(), POWER], ids=["exact", "power of two"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", ["reference", "gpu_interpret"])
def test_blocks_are_the_packages_both_ways(how, dtype, implementation, capsys):
    w = matrices(dtype)
    stored, turned = fp8_quantise_blocks(w, how, implementation=implementation)
    expected = quantise_blocks(w, power_of_two=how.power_of_two)
    same(stored, expected)
    same(turned, [a.mT for a in expected])
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(64, 2048, 1408), (1, 2048, 576), (8, 7168, 2048)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_blocks_lower(shape, dtype):
    quantise = functools.partial(fp8_quantise_blocks, how=Scaling(), implementation="gpu")
    assert "mosaic_gpu" in lower_for_hopper(quantise, jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize(
    ("shape", "implementation", "message"),
    [
        ((1, 64, 64), "tpu", "reference, gpu"),
        ((1, 64, 64), "gpu", "needs a Hopper GPU"),
        ((1, 64, 72), "gpu", "multiples of 64"),
        ((64, 64), "reference", "needs matrices"),
    ],
)
def test_refusals_of_matrices(shape, implementation, message):
    with pytest.raises(ValueError, match=message):
        fp8_quantise_blocks(jnp.zeros(shape), Scaling(), implementation=implementation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="tpu"), "reference, gpu"),
        (dict(implementation="gpu"), "needs a Hopper GPU"),
        (dict(x=jnp.zeros((4, 72), jnp.bfloat16), implementation="gpu"), "multiple of 64"),
        (dict(x=jnp.zeros((4, 64), jnp.float8_e4m3fn)), "needs scales"),
        (dict(x=jnp.zeros((4, 64), jnp.float8_e4m3fn), scales=jnp.ones((4, 1)), rows=FLOOR), "again"),
        (dict(x=jnp.zeros((1, 4, 64), jnp.bfloat16)), "needs rows"),
    ],
)
def test_refusals(change, message):
    given = dict(x=jnp.zeros((4, 64), jnp.bfloat16), scales=None, columns=FLOOR, implementation="reference") | change
    with pytest.raises(ValueError, match=message):
        fp8_quantise(given.pop("x"), given.pop("scales"), **given)
