"""Rules: every parameter has logical axes, and a rule that can't be is refused by the parameter's name."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.config import PRESETS, ConfigError, ModelConfig
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel import rules
from dsv3_jax.parallel.context import sequence_order
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.runtime import Runtime


def abstract(name):
    model = DeepSeekV3(ModelConfig.preset(name))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def axes(name):
    return parameter_axes(DeepSeekV3(ModelConfig.preset(name)))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("preset", rules.RULES)
def test_every_parameter_of_every_preset_has_a_place(name, preset):
    mesh = make_mesh(MeshShape(data=1, fsdp=2, expert=2, tensor=2))
    shardings = state_shardings(abstract(name), mesh, rules.RULES[preset], axes(name))
    cut = [s for s in jax.tree.leaves(shardings) if not s.is_fully_replicated]
    assert len(cut) == 0 if preset == "single" else len(cut) > 10


def test_cuts_of_the_report_model():
    mesh = make_mesh(MeshShape(fsdp=2, expert=2, tensor=2))
    tree = state_shardings(abstract("v3-671b"), mesh, rules.RULES["fsdp_ep"], axes("v3-671b"))
    moe = tree["params"]["moe_layers"]
    assert moe["mlp"]["experts"]["gate_proj"].spec == PartitionSpec(None, ("expert",), ("fsdp",), ("tensor",))
    assert moe["self_attn"]["q_b_proj"].spec == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert tree["params"]["embed_tokens"].spec == PartitionSpec(("tensor",), ("fsdp",))
    assert tree["router"]["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"].is_fully_replicated


def test_fsdp_leaves_no_matrix_whole():
    """Whatever is left whole takes memory on every device, with its moments."""
    mesh = make_mesh(MeshShape(fsdp=8))
    tree = abstract("v3-671b")["params"]
    shardings = state_shardings(tree, mesh, rules.RULES["fsdp"], axes("v3-671b"))
    sizes = jax.tree.map(lambda leaf, s: (leaf.size, math.prod(s.shard_shape(leaf.shape))), tree, shardings)
    for path, (whole, here) in jax.tree_util.tree_leaves_with_path(sizes, is_leaf=lambda x: isinstance(x, tuple)):
        assert here == whole // 8 or path[-1].key.endswith("norm"), path


def test_a_mesh_axis_used_twice_is_refused():
    mesh = make_mesh(MeshShape(tensor=8))
    runtime = Runtime(sharding="fsdp", sharding_overrides=("embed=tensor",))
    with pytest.raises(ConfigError, match=r"params/.* cut '\w+' and '\w+' both over mesh axis 'tensor'"):
        state_shardings(abstract("v3-671b"), mesh, rules.rules_of(runtime), axes("v3-671b"))


def test_a_size_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshShape(tensor=8))
    odd = dataclasses.replace(ModelConfig.preset("tiny"), num_attention_heads=3)
    tree = jax.eval_shape(DeepSeekV3(odd).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ConfigError, match=r"\w+_proj .*'heads' of 3 doesn't divide over tensor = 8 devices"):
        state_shardings(tree, mesh, rules.RULES["fsdp"], parameter_axes(DeepSeekV3(odd)))


@pytest.mark.parametrize("text", ["embed", "width=fsdp", "embed=sideways"])
def test_bad_overrides_are_named(text):
    with pytest.raises(ConfigError, match=text):
        rules.rules_of(Runtime(sharding="fsdp", sharding_overrides=(text,)))


def test_overrides_change_the_preset():
    changed = rules.rules_of(Runtime(sharding="fsdp", sharding_overrides=("embed=fsdp,data", "vocab=")))
    assert (changed.embed, changed.vocab, changed.heads) == (("fsdp", "data"), (), ("tensor",))


def test_mesh_must_fit_the_devices():
    with pytest.raises(ConfigError, match="mesh expert=3 has 3 devices, but there are 8"):
        make_mesh(MeshShape(expert=3))
    with pytest.raises(ConfigError, match=r"mesh\.fsdp is 0"):
        MeshShape(fsdp=0)
    with pytest.raises(ConfigError, match="'single': choose fsdp"):
        Placement(MeshShape(fsdp=8), Runtime(), {})


def test_batch_must_divide():
    placement = Placement(MeshShape(data=2, fsdp=4), Runtime(sharding="fsdp"), {})
    with pytest.raises(ConfigError, match="12 sequences doesn't divide over data x fsdp = 8 devices"):
        placement.rows(12)
    batch = placement.batch(placement.rows(16), {"tokens": np.arange(32).reshape(16, 2)}, 16)
    np.testing.assert_array_equal(batch["tokens"], np.arange(32).reshape(16, 2))


def test_sequences_are_dealt_out_evenly():
    with jax.set_mesh(make_mesh(MeshShape(data=2, context=4))):
        order = sequence_order(32, Runtime(sharding="fsdp"))
        assert sequence_order(32, Runtime()) is None
        with pytest.raises(ConfigError, match=r"12 tokens can't be shared by 4 devices.*multiple of 8"):
            sequence_order(12, Runtime(sharding="fsdp"))
    assert sorted(order) == list(range(32))
    visible = (order + 1).reshape(4, 8).sum(1)  # keys that a device's queries see
    assert len(set(visible)) == 1
