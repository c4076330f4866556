"""FP8 blocks and tiles: error bounds, edges, and agreement of NumPy and JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsv3_jax.quantization import FP8_MAX, dequantise_blocks, dequantise_tiles, quantise_blocks, quantise_tiles

TINY = float(np.finfo(np.float32).tiny)
numbers = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 448.0, -448.0, 449.0, 2.0**-9, 1.5 * 2.0**-9, 2.0**-6, 1e-40, -1e-45, TINY, 1e38]),
)
blocks = st.tuples(st.integers(1, 9), st.integers(1, 9))
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=21), elements=numbers)


def largest_of_block(w, block):
    """The largest magnitude of each element's own block, found one element at a time."""
    out = np.zeros_like(w)
    for i, j in np.ndindex(*w.shape):
        r, c = i // block[0] * block[0], j // block[1] * block[1]
        out[i, j] = np.abs(w[r : r + block[0], c : c + block[1]]).max()
    return out


@given(matrices, blocks, st.booleans())
def test_blocks_are_within_rounding(w, block, power_of_two):
    values, scales = quantise_blocks(w, block, power_of_two=power_of_two)
    assert values.shape == w.shape
    assert values.dtype == ml_dtypes.float8_e4m3fn
    assert scales.shape == tuple(-(-n // b) for n, b in zip(w.shape, block, strict=True))
    assert (scales >= TINY).all()
    assert np.isfinite(values.astype(np.float32)).all()
    if power_of_two:
        assert (np.frexp(scales)[0] == 0.5).all()
    after = dequantise_blocks(values, scales, block).astype(np.float64)
    # Half a unit in the last of three mantissa bits, or half the smallest step, 2^-9 of the scale.
    wide = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: w.shape[0], : w.shape[1]].astype(np.float64)
    bound = np.maximum(np.abs(w.astype(np.float64)) * 2**-4, wide * 2**-10) * (1 + 1e-5)
    assert (np.abs(after - w) <= bound).all()
    # No scale is larger than it must be: the block's largest comes out as 448, or above 224 in a power of two.
    largest = largest_of_block(w, block)
    at_top = (np.abs(w) == largest) & (largest / FP8_MAX > TINY)
    assert (np.abs(values.astype(np.float32))[at_top] >= (208 if power_of_two else FP8_MAX)).all()


@given(matrices, blocks)
def test_quantising_again_changes_nothing(w, block):
    values, scales = quantise_blocks(w, block)
    if (scales > 1e30).any():  # the product may overflow where a scale was rounded up
        return
    again, scales_again = quantise_blocks(dequantise_blocks(values, scales, block), block)
    once, twice = (dequantise_blocks(v, s, block) for v, s in ((values, scales), (again, scales_again)))
    np.testing.assert_allclose(once, twice, rtol=1e-6, atol=TINY)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=13), elements=numbers), st.integers(1, 9)
)
def test_tiles_are_blocks_of_one_row_with_a_floor(x, tile):
    values, scales = quantise_tiles(x, tile)
    assert scales.shape == (*x.shape[:-1], -(-x.shape[-1] // tile))
    assert (scales >= np.float32(1e-4) / np.float32(448)).all()
    after = dequantise_tiles(values, scales, tile).astype(np.float64)
    wide = np.repeat(scales, tile, -1)[..., : x.shape[-1]].astype(np.float64)
    assert (np.abs(after - x) <= np.maximum(np.abs(x.astype(np.float64)) * 2**-4, wide * 2**-10) * (1 + 1e-5)).all()


@given(matrices, blocks, st.booleans())
def test_jax_agrees_with_numpy(w, block, power_of_two):
    w = np.where(np.abs(w) < 1e-30, 0, w)  # XLA flushes denormals on the way
    values, scales = quantise_blocks(w, block, power_of_two=power_of_two)
    jitted = jax.jit(quantise_blocks, static_argnames=("block", "power_of_two"))
    jax_values, jax_scales = jitted(jnp.asarray(w), block=block, power_of_two=power_of_two)
    np.testing.assert_array_equal(jax_scales, scales)
    np.testing.assert_array_equal(np.asarray(jax_values).view(np.uint8), values.view(np.uint8))
    exact = dequantise_blocks(values, scales, block)
    np.testing.assert_array_equal(dequantise_blocks(jnp.asarray(values), jnp.asarray(scales), block), exact)


def test_edges():
    w = np.array([[448.0, -448.0, 0.0, -0.0, 2.0**-9, 2.0**-10, 447.9, 232.0]], np.float32)
    values, scales = quantise_blocks(w, (1, 8))
    assert scales == 1
    # 2^-10 is half the smallest number and ties to even, zero; 232 is a tie between 224 and 240 and goes to 224.
    np.testing.assert_array_equal(values.astype(np.float32), [[448, -448, 0, 0, 2.0**-9, 0, 448, 224]])
    assert np.signbit(values.astype(np.float32)[0, 3])


def test_zeros_and_denormals():
    values, scales = quantise_blocks(np.zeros((3, 5), np.float32), (2, 2))
    assert not dequantise_blocks(values, scales, (2, 2)).any()
    small = np.full((2, 2), 1e-42, np.float32)
    after = dequantise_blocks(*quantise_blocks(small, (2, 2)), (2, 2))
    assert (np.abs(after) <= 2 * small).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    w = np.ones((4, 4), np.float32)
    w[1, 1] = bad
    for quantise in (quantise_blocks, quantise_tiles):
        with pytest.raises(ValueError, match="aren't all finite"):
            quantise(w)
    values, _ = quantise_blocks(jnp.asarray(w), (2, 2))
    spoiled = np.isnan(np.asarray(values).astype(np.float32))
    assert spoiled[1, 1]
    assert not spoiled[2:].any()
    assert not spoiled[:, 2:].any()


def test_not_finite_in_float32():
    """Where the scale would be infinite."""
    with pytest.raises(ValueError, match="aren't all finite"):
        quantise_blocks(np.array([[1e300]]))


def test_power_of_two_scales_are_the_least_that_fit():
    for largest, expected in ((448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (1.0, 2.0**-8)):
        _, scales = quantise_blocks(np.full((1, 1), largest, np.float32), power_of_two=True)
        assert scales == expected


def test_the_grid_never_decides_the_block():
    """576 rows with 5 rows of scales are blocks of 128, the last of 64; and not of ceil(576 / 5) = 116."""
    values = np.ones((576, 4), np.float32).astype(ml_dtypes.float8_e4m3fn)
    grid = np.arange(5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(dequantise_blocks(values, grid)[:, 0], np.arange(576) // 128)
    for wrong in ((4, 1), (6, 1), (5, 2)):
        with pytest.raises(ValueError, match=r"has \(5, 1\)"):
            dequantise_blocks(values, np.ones(wrong, np.float32))


def test_dtypes():
    w = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    values, scales = quantise_blocks(w)
    assert scales.dtype == np.float32
    assert dequantise_blocks(values, scales, dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
