"""Redundant experts: the same numbers from more slots, and devices that are about equally busy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.expert_placement import place_slots, place_slots_on_nodes, with_redundant_experts
from dsv3_jax.model.transformer import DeepSeekV3, expert_load, parameter_axes, router_stats
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.rules import rules_of
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.runtime import Runtime
from tests.configs import SHARDABLE

NODES = MeshShape(node=2, expert=2, tensor=2)


def device_load(load, placed, devices):
    """Tokens of each device if each expert's are shared evenly among its slots."""
    share = load / np.bincount(placed, minlength=len(load))
    return share[placed].reshape(devices, -1).sum(1)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_every_expert_has_a_slot_and_every_device_as_many(devices, slots, seed):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, devices * slots + 1))
    placed = place_slots(rng.zipf(1.5, experts).clip(max=10**6).astype(float), devices, slots)
    assert placed.shape == (devices * slots,)
    assert set(placed.tolist()) == set(range(experts))


def test_skewed_load_becomes_even():
    """256 experts, 32 redundant, 32 devices as in the report's prefill; loads as uneven as a Zipf law's."""
    load = np.random.default_rng(0).permutation(1.0 / np.arange(1, 257) ** 0.5)
    plain = load.reshape(32, 8).sum(1)
    placed = place_slots(load, 32, 9)
    busy = device_load(load, placed, 32)
    assert plain.max() / plain.mean() > 1.3
    assert busy.max() / busy.mean() < 1.05


def test_groups_stay_on_their_node():
    load = np.random.default_rng(0).gamma(1.0, size=256)
    placed = place_slots_on_nodes(load, groups=8, nodes=4, devices=8, slots=9).reshape(4, -1)
    nodes_of_group = [{n for n in range(4) if g in placed[n] // 32} for g in range(8)]
    assert all(len(nodes) == 1 for nodes in nodes_of_group)
    busy = device_load(load, placed.ravel(), 32)
    assert busy.max() / busy.mean() < 1.2


@pytest.mark.parametrize(
    "sharding",
    [pytest.param("single", marks=pytest.mark.slow), "ep_tp", pytest.param("fsdp_ep", marks=pytest.mark.slow)],
)
def test_slots_compute_the_same(sharding):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SHARDABLE.vocab_size, (4, 16)), jnp.int32)
    model = DeepSeekV3(SHARDABLE)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    forward = lambda m, v: m.apply(v, tokens, (jnp.roll(tokens, -1, 1),), method="forward")
    expected = jax.jit(lambda v: forward(model, v))(variables)
    load = expert_load(expected)
    placed = with_redundant_experts(variables, load, SHARDABLE, NODES, 8)
    copies = np.asarray(placed["placement"]["moe_layers"]["mlp"]["experts"]["copies"])
    assert (copies.sum(-1) == SHARDABLE.n_routed_experts + 8).all()
    busiest = load["moe_layers"].argmax(-1)
    assert (copies[np.arange(len(copies)), busiest] > 1).all()

    runtime = Runtime(sharding=sharding, redundant_experts=8)
    got = DeepSeekV3(SHARDABLE, runtime)
    if sharding == "single":
        outputs = forward(got, placed)
    else:
        mesh = make_mesh(NODES)
        on_mesh = jax.device_put(placed, state_shardings(placed, mesh, rules_of(runtime), parameter_axes(model)))
        with jax.set_mesh(mesh):
            outputs = jax.jit(lambda v: forward(got, v))(on_mesh)
    # Without `exchanges`, of which there is a number per device.
    routing = lambda o: [(s.load, s.fraction, s.affinity) for s in router_stats(o).values()]
    numbers = lambda o: jax.tree.leaves((o.logits, o.mtp_logits, routing(o)))
    for a, b in zip(numbers(outputs), numbers(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_model_declares_its_slots():
    runtime = dataclasses.replace(Runtime(), redundant_experts=4)
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.eval_shape(lambda: DeepSeekV3(SHARDABLE, runtime).init(jax.random.key(0), tokens))
    plain = jax.eval_shape(lambda: DeepSeekV3(SHARDABLE).init(jax.random.key(0), tokens))
    load = {"moe_layers": np.ones((SHARDABLE.num_moe_layers, 16)), "mtp_0": np.ones(16)}
    concrete = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), plain)
    placed = with_redundant_experts(concrete, load, SHARDABLE, MeshShape(expert=4), 4)
    assert jax.tree.map(jnp.shape, placed) == jax.tree.map(jnp.shape, dict(variables))


def test_slots_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match="16 experts and 3 redundant ones don't divide over the 4 devices"):
        with_redundant_experts({}, {}, SHARDABLE, NODES, 3)
