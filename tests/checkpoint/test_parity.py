"""Logits of the files that transformers wrote, against those that it computed (tests/golden/make_golden.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.checkpoint import load_pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.npz"))
TOLERANCE = 2e-5


def assert_close(actual, expected):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{error:.2e}"


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case, form):
    expected = np.load(GOLDEN / case / "expected.npz")
    model, variables = load_pretrained(GOLDEN / case, runtime=Runtime(attention_form=form))
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    depth = model.config.num_nextn_predict_layers
    ahead = tuple(jnp.roll(tokens, -k - 1, axis=1) for k in range(depth))
    out = jax.jit(lambda v, t, a: model.apply(v, t, a, method=DeepSeekV3.forward))(variables, tokens, ahead)
    assert_close(out.logits.array(), expected["logits"])
    mtp = [name for name in expected.files if name.startswith("mtp_logits")]
    assert len(mtp) == depth
    for k in range(depth):
        assert_close(out.mtp_logits[k].array()[:, : -k - 1], expected[f"mtp_logits_{k}"])


def test_goldens_are_no_trivial_cases():
    assert len(CASES) >= 12
    for case in CASES:
        logits = np.load(GOLDEN / case / "expected.npz")["logits"]
        assert np.abs(logits).max() > 1
        assert np.abs(logits[0] - logits[1]).max() > 0.1
