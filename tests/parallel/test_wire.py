"""Bytes that cross the network, read from the compiled program."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import ExpertWeights, experts
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.planning.compiled import collectives
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step

WIDTH, HIDDEN, TOKENS, K = 512, 16, 256, 4
CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(hidden_size=WIDTH, moe_intermediate_size=HIDDEN, n_routed_experts=32, num_experts_per_tok=K),
    **dict(n_group=8, topk_group=2),
)


@functools.cache
def compiled_experts(shape, **runtime):
    """The experts layer alone, TOKENS tokens per device, and the bytes of an activation there."""
    e = CONFIG.n_routed_experts
    array = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    w = ExpertWeights(array(e, WIDTH, HIDDEN), array(e, WIDTH, HIDDEN), array(e, HIDDEN, WIDTH))
    arguments = (array(8, TOKENS, WIDTH), array(8, TOKENS, K, dtype=jnp.int32), array(8, TOKENS, K), w)
    with jax.set_mesh(make_mesh(shape)):
        layer = jax.jit(lambda *a: experts(*a, CONFIG, Runtime(sharding="fsdp_ep", **runtime)))
        return collectives(layer.lower(*arguments).compile())


@pytest.mark.parametrize(("node", "reached"), [(2, 2), (4, 2), (8, 2)])
def test_dispatch_crosses_to_each_node_once(node, reached):
    """M = 2 groups of experts per token, which lie within nodes: at most min(K, nodes reached) copies cross."""
    found = compiled_experts(MeshShape(node=node, expert=8 // node))
    kinds = ("all-to-all", "all-gather")  # to both of two nodes
    usual = [c for c in found if "cond" not in c.where and c.kind in kinds and "node" in c.axes]
    assert usual, [c.where for c in found]
    back = max(i for i, c in enumerate(usual) if c.bytes == max(u.bytes for u in usual))
    there = sum(c.bytes for i, c in enumerate(usual) if i != back) * (node - 1) / node  # a share stays in its node
    assert there <= 1.1 * TOKENS * min(K, reached) * WIDTH * 4
    assert usual[back].bytes * (node - 1) / node <= 1.1 * TOKENS * min(K, reached) * WIDTH * 4


def test_fp8_halves_what_dispatch_sends():
    """Tokens go to experts in FP8, and so do the gradients of what those made of them; both come back in bfloat16."""
    e, bf16 = CONFIG.n_routed_experts, jnp.bfloat16
    array = lambda *s, dtype=bf16: jax.ShapeDtypeStruct(s, dtype)
    w = ExpertWeights(array(e, WIDTH, HIDDEN), array(e, WIDTH, HIDDEN), array(e, HIDDEN, WIDTH))
    arguments = (array(8, TOKENS, WIDTH), array(8, TOKENS, K, dtype=jnp.int32), array(8, TOKENS, K, dtype=jnp.float32))

    def sent(precision):
        runtime = Runtime(dtype="bfloat16", precision=precision, sharding="fsdp_ep")

        def gradient(x, ids, weights, w):
            y, back = jax.vjp(lambda x: experts(x, ids, weights, w, CONFIG, runtime), x)
            return y, back(y)

        with jax.set_mesh(make_mesh(MeshShape(expert=8))):
            found = collectives(jax.jit(gradient).lower(*arguments, w).compile())
        usual = [c for c in found if c.kind == "all-to-all" and c.axes == ("expert",) and "cond" not in c.where]
        back = [c for c in usual if "combine" in c.where]
        assert len(back) == 2
        return [sum(c.bytes for c in usual if c not in back), sum(c.bytes for c in back)]

    (out, back), (out_bf16, back_bf16) = sent("fp8"), sent("dtype")
    assert back == back_bf16
    # A CPU's compiler sends bfloat16 as float32: so it is half of that, there as on the way back.
    assert out <= 0.55 * (out_bf16 - back_bf16 / 2), (out, out_bf16, back_bf16)


@pytest.mark.parametrize("shape", [MeshShape(expert=8), MeshShape(node=2, expert=4)])
def test_no_device_gets_all_tokens(shape):
    found = compiled_experts(shape)
    assert not [c for c in found if c.kind in ("all-gather", "all-reduce") and c.bytes >= 8 * TOKENS * WIDTH * 4]


def test_what_goes_to_all_devices_is_gathered_as_it_lies():
    """Over two devices a buffer has room for all tokens: no more is sent than it would hold."""
    found = compiled_experts(MeshShape(fsdp=4, expert=2))
    usual = [c for c in found if "cond" not in c.where and c.bytes >= TOKENS * WIDTH * 4]
    everything = 2 * TOKENS * WIDTH * 4
    assert [(c.kind, c.bytes) for c in usual] == [("all-gather", everything), ("all-to-all", everything)]


def test_all_gather_is_what_its_name_says():
    found = compiled_experts(MeshShape(expert=8), dispatch="all_gather")
    assert [c for c in found if c.kind == "all-gather" and c.bytes == 8 * TOKENS * WIDTH * 4]


def test_gathers_are_of_one_weight_at_a_time():
    """A whole step under FSDP: nothing that is gathered is larger than the largest weight of one layer."""
    model = DeepSeekV3(dataclasses.replace(CONFIG, num_nextn_predict_layers=0), Runtime(sharding="fsdp"))
    schedule = Schedule(ScheduleConfig(steps=10, batch_size=8))
    optimizer = optax.sgd(1.0)  # which works on what each device holds, as AdamW does
    placement = Placement(MeshShape(fsdp=8), model.runtime, parameter_axes(model))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    state, batch = placement.abstract(
        lambda key: init_state(model, optimizer, key), {"tokens": tokens, "targets": tokens}
    )
    compiled = placement.lower(
        make_train_step(model, optimizer, PretrainingLoss(model.config, schedule)), state, batch
    ).compile()
    paths = jax.tree_util.tree_leaves_with_path(state.params)
    stacked = lambda path: any(getattr(p, "key", None) in ("dense_layers", "moe_layers") for p in path)
    largest = max(math.prod(leaf.shape[stacked(path) :]) * 4 for path, leaf in paths)
    gathered = [c.bytes for c in collectives(compiled) if c.kind == "all-gather"]
    assert gathered
    assert max(gathered) <= largest
    assert all(c.times in (1, CONFIG.num_dense_layers, CONFIG.num_moe_layers) for c in collectives(compiled))
