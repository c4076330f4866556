"""Rows moved by gathers against the matrices that say the same; and that nothing is scattered in a gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import ExpertWeights, experts
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.rows import collect, spread
from dsv3_jax.runtime import Runtime
from tests.conftest import new_rng


def problem():
    """Rows that each go to up to 3 of 40 places, some places left empty."""
    rng = new_rng()
    taken = rng.permutation(40)[: 12 * 3].reshape(12, 3)
    places = np.where(rng.uniform(size=taken.shape) < 0.8, taken, 40)
    matrix = (places[:, :, None] == np.arange(40)).sum(1).T.astype(np.float32)  # (40, 12)
    source = np.where(matrix.any(1), matrix.argmax(1), 12)
    return matrix, (jnp.asarray(source), jnp.asarray(places)), jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)


def test_they_are_a_matrix_and_its_transpose():
    matrix, maps, x = problem()
    y, pull = jax.vjp(lambda x: spread(x, *maps), x)
    np.testing.assert_allclose(y, matrix @ x)
    back, pull_back = jax.vjp(lambda y: collect(y, *maps), y)
    np.testing.assert_allclose(back, matrix.T @ y, rtol=1e-6)
    np.testing.assert_allclose(pull(y)[0], matrix.T @ y, rtol=1e-6)
    np.testing.assert_allclose(pull_back(x)[0], matrix @ x)


def test_sums_are_float32():
    """601 isn't a bfloat16 number, and a sum of ones in bfloat16 ends at 256."""
    maps = jnp.zeros(601, jnp.int32), jnp.arange(601)[None]
    y = jnp.ones((601, 1), jnp.bfloat16)
    assert float(collect(y, *maps)[0, 0]) == 601
    gradient = jax.vjp(lambda x: spread(x, *maps), jnp.zeros((1, 1), jnp.bfloat16))[1](y)[0]
    assert (gradient.dtype, float(gradient[0, 0])) == (jnp.bfloat16, 600)  # rounded once


@pytest.mark.parametrize("shape", ["", "expert=8", "node=2,expert=4"])
@pytest.mark.parametrize("dispatch", ["all_to_all", "ragged_all_to_all"])
def test_experts_scatter_no_numbers(shape, dispatch):
    config = ModelConfig.preset("tiny")
    runtime = Runtime(dtype="bfloat16", sharding="fsdp_ep" if shape else "single", dispatch=dispatch)
    e, k, d, f = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size
    sd = jax.ShapeDtypeStruct
    w = ExpertWeights(*(sd(s, jnp.bfloat16) for s in ((e, d, f), (e, d, f), (e, f, d))))
    arrays = sd((8, 16, d), jnp.bfloat16), sd((8, 16, k), jnp.int32), sd((8, 16, k), jnp.float32), w
    loss = lambda x, ids, weights, w: jnp.sum(experts(x, ids, weights, w, config, runtime).astype(jnp.float32))
    shape = MeshShape.parse(shape)
    with jax.set_mesh(make_mesh(shape, jax.devices()[: shape.devices])):
        program = str(jax.make_jaxpr(jax.grad(loss, (0, 2, 3)))(*arrays))
    assert re.search(r"i32\[\d+\] = scatter", program)  # of places, which is how it would look
    assert not re.findall(r"f(?:16|32)\[[\d,]*\] = scatter\S*", program)
