"""Rotary embedding and YaRN by their formulas (report section 4.3; arXiv 2309.00071), pair by pair in float64."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import ModelConfig
from dsv3_jax.config import Yarn
from dsv3_jax.model.rope import apply_rope, inverse_frequencies, rotation_scale, softmax_scale
from tests.conftest import new_rng

V3 = ModelConfig.preset("v3-671b")
RELEASED = Yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0)


def turning(times):
    """The pair that turns so often in 4096 tokens: 2 pi times = 4096 frequency(i), solved for i."""
    return 32 * math.log(4096 / (2 * math.pi * times)) / math.log(1e4)


def yarn_frequency(i, yarn, base, dim, low, high):
    """Pairs up to `low` turn as before, those from `high` on `factor` times slower; linear between."""
    slow = min(max((i - low) / (high - low), 0), 1)
    plain = base ** (-2 * i / dim)
    return plain * (1 - slow) + plain / yarn.factor * slow


@pytest.mark.parametrize(
    ("yarn", "low", "high"),
    [
        (RELEASED, 10, 23),  # pairs that turn 32 times and once in 4096 tokens: 10.5 and 22.5
        (dataclasses.replace(RELEASED, truncate=False), turning(32), turning(1)),
        (dataclasses.replace(RELEASED, beta_fast=1e9, beta_slow=1e-9), 0, 63),  # beyond all pairs
        (
            dataclasses.replace(RELEASED, beta_fast=7.0, beta_slow=7.0, truncate=False),
            turning(7),
            turning(7) + 0.001,
        ),
    ],
)
def test_yarn_frequencies(yarn, low, high):
    got = inverse_frequencies(dataclasses.replace(V3, rope_scaling=yarn))
    expected = [yarn_frequency(i, yarn, 1e4, 64, low, high) for i in range(32)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_plain_frequencies():
    got = inverse_frequencies(dataclasses.replace(V3, rope_scaling=None))
    np.testing.assert_allclose(got, [1e4 ** (-i / 32) for i in range(32)], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "softmax", "rotation"),
    [
        ({}, 0.1 * math.log(40) + 1, 1.0),  # the released weights'
        (dict(mscale=0.7, mscale_all_dim=0.5), 0.05 * math.log(40) + 1, None),
        (dict(mscale=None, mscale_all_dim=None), 1.0, 0.1 * math.log(40) + 1),  # the YaRN paper's
        (dict(mscale=0.7, mscale_all_dim=None), 1.0, 0.1 * math.log(40) + 1),
        (dict(mscale=None, mscale_all_dim=0.7), 0.07 * math.log(40) + 1, 0.1 * math.log(40) + 1),
        (dict(attention_factor=1.5), 0.1 * math.log(40) + 1, 1.5),
        (dict(factor=1.0), 1.0, 1.0),
    ],
)
def test_yarn_temperature(change, softmax, rotation):
    """sqrt(t) = 0.1 m ln(s) + 1, where transformers' DeepSeek-V3 has it: squared in the softmax or in the rotation."""
    config = dataclasses.replace(V3, rope_scaling=dataclasses.replace(RELEASED, **change))
    assert softmax_scale(config) == pytest.approx(softmax**2 / math.sqrt(192))
    if rotation is None:
        rotation = (0.07 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert rotation_scale(config) == pytest.approx(rotation)


def test_without_yarn_nothing_is_scaled():
    config = dataclasses.replace(V3, rope_scaling=None)
    assert (softmax_scale(config), rotation_scale(config)) == (pytest.approx(192**-0.5), 1.0)


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation(interleave):
    config = dataclasses.replace(V3, rope_interleave=interleave, rope_scaling=Yarn(2.0, 64, attention_factor=1.5))
    rng = new_rng()
    x, positions = rng.standard_normal((2, 5, 3, 64)), rng.integers(0, 100, (2, 5))
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleave else (x[..., :32], x[..., 32:])
    angle = positions[..., None, None] * inverse_frequencies(config).astype(np.float64)
    turned = 1.5 * (real + 1j * imaginary) * np.exp(1j * angle)
    pairs = np.stack([turned.real, turned.imag], -1 if interleave else -2).reshape(x.shape)
    got = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions, jnp.int32), config)
    np.testing.assert_allclose(got, pairs, atol=1e-4)
    half = apply_rope(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions, jnp.int32), config)
    assert half.dtype == jnp.bfloat16  # of which only the input and the result are rounded
    np.testing.assert_allclose(np.asarray(half, np.float32), pairs, rtol=2**-6, atol=2**-6)
