"""`runtime.precision = "fp8"`: the same parameters, gradients within FP8's rounding, on one device and many."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.model.auto import choices
from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import LayerCache, TokenPositions, init_cache
from dsv3_jax.model.linear import SCALES, TURNED, turn
from dsv3_jax.model.remat import rematerialise
from dsv3_jax.model.router import CHOICES
from dsv3_jax.model.transformer import parameter_axes
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.training.accumulate import accumulated_gradients
from dsv3_jax.training.losses import PretrainingLoss, Whole
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from pallas_kernels import fp8_grouped_matmul, fp8_quantise
from pallas_kernels.ahead_of_time import as_if_hopper
from tests.conftest import new_rng

CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=64, hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=1),
    **dict(first_k_dense_replace=0, num_attention_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64),
    **dict(qk_rope_head_dim=64, v_head_dim=64, num_nextn_predict_layers=0, initializer_range=0.05),
    # Every expert is chosen: else rounding would send some tokens to others, with all of their gradient.
    **dict(n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(runtime, variables):
    def loss(params):
        outputs = DeepSeekV3(CONFIG, runtime).apply(variables | {"params": params}, TOKENS, (), method="forward")
        return jnp.mean(outputs.logits.cross_entropy(jnp.roll(TOKENS, -1, 1))[0])

    return jax.value_and_grad(loss)(variables["params"])


@pytest.fixture(scope="module")
def variables():
    return jax.jit(DeepSeekV3(CONFIG).init)(jax.random.key(0), TOKENS)


@pytest.fixture(scope="module")
def exact(variables):
    return loss_and_gradients(Runtime(), variables)


@pytest.fixture(scope="module")
def fp8(variables):
    return loss_and_gradients(Runtime(precision="fp8"), variables)


def distances(got, expected):
    got, expected = jax.device_get((got, expected))  # which may be on other devices
    norm = lambda a: np.linalg.norm(np.asarray(a, np.float64))
    return jax.tree.map(lambda a, b: norm(a - b) / norm(b), got, expected)


def test_the_parameters_are_the_same(variables):
    again = jax.jit(DeepSeekV3(CONFIG, Runtime(precision="fp8")).init)(jax.random.key(0), TOKENS)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


def test_gradients_are_those_of_float32_but_for_rounding(fp8, exact):
    np.testing.assert_allclose(fp8[0], exact[0], rtol=5e-3)
    assert not np.array_equal(fp8[0], exact[0])
    far = distances(fp8[1], exact[1])
    worst = max(jax.tree_util.tree_leaves_with_path(far), key=lambda leaf: leaf[1])
    assert worst[1] < 0.3, worst


@pytest.mark.slow
def test_recomputation_changes_little(variables, fp8):
    again = loss_and_gradients(Runtime(precision="fp8", remat="paper"), variables)
    assert max(jax.tree.leaves(distances(again[1], fp8[1]))) < 0.02


@pytest.mark.parametrize(
    ("sharding", "shape"),
    [
        pytest.param("fsdp", MeshShape(fsdp=4, tensor=2), marks=pytest.mark.slow),
        ("fsdp_ep", MeshShape(fsdp=2, expert=4)),
    ],
)
def test_on_a_mesh(sharding, shape, variables, fp8):
    runtime = Runtime(precision="fp8", sharding=sharding)
    placement = Placement(shape, runtime, parameter_axes(DeepSeekV3(CONFIG, runtime)))
    with jax.set_mesh(placement.mesh):
        loss, gradients = loss_and_gradients(runtime, variables)
    np.testing.assert_allclose(loss, fp8[0], rtol=1e-3)
    assert max(jax.tree.leaves(distances(gradients, fp8[1]))) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "by_hand"), [(256, True), (128, False)])
def test_gradients_are_summed_once_a_step_where_parts_are_of_whole_blocks(rank, by_hand):
    """Over `data`, with blocks that are gathered over `fsdp` by hand; elsewhere XLA does both."""
    config = dataclasses.replace(CONFIG, q_lora_rank=rank, kv_lora_rank=rank)
    schedule = Schedule(ScheduleConfig(steps=10, batch_size=8))
    batch = {"tokens": TOKENS, "targets": jnp.roll(TOKENS, -1, 1)}
    whole = Whole(jnp.int32(0), jnp.float32(TOKENS.size), jnp.int32(len(TOKENS)))
    variables = jax.jit(DeepSeekV3(config).init)(jax.random.key(0), TOKENS)

    def gradients(runtime, mesh):
        model = DeepSeekV3(config, runtime)
        of = lambda v, b: accumulated_gradients(model, PretrainingLoss(config, schedule), v, b, 2, whole)[0]
        placement = Placement(mesh, runtime, parameter_axes(model), jax.devices()[: mesh.devices])
        with jax.set_mesh(placement.mesh):
            return jax.jit(of)(variables, batch), str(jax.make_jaxpr(of)(variables, batch))

    expected, _ = gradients(Runtime(precision="fp8"), MeshShape())
    got, program = gradients(Runtime(precision="fp8", sharding="fsdp"), MeshShape(data=2, fsdp=2))
    assert ("reduce_scatter" in program) == by_hand
    assert max(jax.tree.leaves(distances(got, expected))) < 0.1


def test_a_run_says_its_precision():
    line = choices(Runtime(precision="fp8", fp8_power_of_two=True), CONFIG, 16)
    assert "FP8 by emulation, scales 1x128 and 128x128, powers of two (float32 on cpu)" in line


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr("dsv3_jax.quantization.recipe.platform", lambda: "tpu")
    with pytest.raises(ConfigError, match="'fp8' needs a Hopper GPU"):
        choices(Runtime(precision="fp8"), CONFIG, 16)


def test_blocks_that_a_mesh_cuts_are_refused(variables):
    runtime = Runtime(precision="fp8", sharding="fsdp")
    placement = Placement(MeshShape(tensor=8), runtime, parameter_axes(DeepSeekV3(CONFIG, runtime)))
    config = dataclasses.replace(CONFIG, num_attention_heads=8, qk_nope_head_dim=32, v_head_dim=32)
    with jax.set_mesh(placement.mesh), pytest.raises(ConfigError, match="within a block"):
        jax.eval_shape(DeepSeekV3(config, runtime).init, jax.random.key(0), TOKENS)


def test_a_number_that_is_none_reaches_its_gradient(variables):
    """So that the trainer's guard can name the array."""
    poisoned = jax.tree.map(lambda a: a, variables)
    experts = poisoned["params"]["moe_layers"]["mlp"]["experts"]
    experts["up_proj"] = experts["up_proj"].at[0, 2, new_rng().integers(256), 3].set(jnp.nan)
    loss, gradients = loss_and_gradients(Runtime(precision="fp8"), poisoned)
    assert np.isnan(loss)
    assert np.isnan(gradients["moe_layers"]["mlp"]["experts"]["up_proj"]).any()


def saved_for_backward(config, runtime, *, is_moe, tokens):
    """Arrays that the backward pass of a block keeps, weights among them, as the gradient's program has them."""
    block = rematerialise(Block, runtime)(config, runtime, is_moe=is_moe)
    where = TokenPositions(jnp.broadcast_to(jnp.arange(tokens), (1, tokens)))
    x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), jnp.bfloat16)
    variables = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, where, None), x)
    forward = lambda v, x: jax.vjp(lambda v, x: block.apply(v, x, where, None)[0], v, x)[1]
    return forward, (variables, x)


def bytes_per_token(measure, config, runtime, *, is_moe):
    """Bytes for one token more: weights, which the backward pass also has, don't count."""
    few, many = (measure(*saved_for_backward(config, runtime, is_moe=is_moe, tokens=n)) for n in (256, 512))
    return (many - few) / 256


def by_shapes(forward, arguments):
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(forward, *arguments)))


def by_the_compiler(forward, arguments):
    return jax.jit(forward).lower(*arguments).compile().memory_analysis().output_size_in_bytes


BFLOAT16 = Runtime(dtype="bfloat16", remat="paper", attention_impl="blockwise", experts_impl="ragged")


@pytest.mark.parametrize(
    ("preset", "is_moe"),
    [
        ("v3-671b", True),
        pytest.param("v3-671b", False, marks=pytest.mark.slow),
        pytest.param("v2-lite-16b", True, marks=pytest.mark.slow),
    ],
)
def test_saved_activations_are_smaller(preset, is_moe):
    """At the released widths; the number of experts, of which a token sees as many, doesn't matter."""
    config = ModelConfig.preset(preset)
    config = dataclasses.replace(config, n_routed_experts=8, n_group=1, topk_group=1)
    measured = [
        bytes_per_token(by_shapes, config, dataclasses.replace(BFLOAT16, precision=precision), is_moe=is_moe)
        for precision in ("fp8", "dtype")
    ]
    assert measured[0] <= 0.65 * measured[1], measured


@pytest.mark.slow
def test_saved_activations_are_smaller_by_the_compiler():
    config = dataclasses.replace(
        ModelConfig.preset("v3-671b"),
        **dict(hidden_size=896, num_attention_heads=16, moe_intermediate_size=256, q_lora_rank=192, kv_lora_rank=128),
        **dict(qk_rope_head_dim=64, n_routed_experts=8, n_group=1, topk_group=1),
    )
    measured = [
        bytes_per_token(by_the_compiler, config, dataclasses.replace(BFLOAT16, precision=precision), is_moe=True)
        for precision in ("fp8", "dtype")
    ]
    assert measured[0] <= 0.65 * measured[1], measured


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", jnp.uint8), ("e5m6", jnp.bfloat16)])
def test_attentions_output_is_saved_as_the_runtime_says(name, dtype):
    """(E4M3 as bytes, see `save_activation`.)"""
    runtime = dataclasses.replace(BFLOAT16, precision="fp8", fp8_attention_output=name)
    config = dataclasses.replace(CONFIG, v_head_dim=96)
    forward, arguments = saved_for_backward(config, runtime, is_moe=True, tokens=16)
    kept = jax.tree.leaves(jax.eval_shape(forward, *arguments))
    assert [a.dtype for a in kept if a.shape == (16, 4 * 96)] == [dtype]


def test_recomputation_quantises_no_weight():
    """Blocks of every weight are among what is kept for the backward pass."""
    forward, arguments = saved_for_backward(
        CONFIG, dataclasses.replace(BFLOAT16, precision="fp8"), is_moe=True, tokens=16
    )
    kept = [a.shape for a in jax.tree.leaves(jax.eval_shape(forward, *arguments)) if a.dtype.itemsize == 1]
    weights = [a.shape for a in jax.tree.leaves(arguments[0]["params"]["mlp"]["experts"])]
    weights += [arguments[0]["params"]["self_attn"][name].shape for name in ("q_b_proj", "k_b_proj", "o_proj")]
    assert not [w for w in weights if w not in kept], kept


def test_recomputation_turns_no_weight():
    """On Hopper those are kept, too, that products which are repeated take."""
    with as_if_hopper():
        runtime = dataclasses.replace(BFLOAT16, precision="fp8")
        forward, arguments = saved_for_backward(CONFIG, runtime, is_moe=True, tokens=128)
        kept = [a.shape for a in jax.tree.leaves(jax.eval_shape(forward, *arguments)) if a.dtype.itemsize == 1]
    attention = arguments[0]["params"]["self_attn"]
    for name in ("q_b_proj", "k_b_proj", "v_b_proj"):
        rank, *outputs = attention[name].shape
        assert (math.prod(outputs), rank) in kept, name


@pytest.fixture
def calls(monkeypatch):
    """References in place of Hopper's kernels for few rows; lists the calls of these kernels."""
    called = []

    def replace(module, name, reference):
        def compute(*args, interpret):
            called.append(name)
            return reference(*args)

        monkeypatch.setattr(module, name, compute)

    few, reference = fp8_grouped_matmul.gpu_few_rows, fp8_grouped_matmul.reference
    replace(few, "product", reference.fp8_grouped_matmul)
    replace(few, "swiglu", reference.fp8_grouped_swiglu)
    replace(fp8_quantise.gpu, "fp8_quantise", fp8_quantise.reference.fp8_quantise)
    return called


def test_decoding_on_a_gpu_is_that_of_the_emulation(calls):
    """Attention, with a cache, and experts: the program for Hopper, on weights held transposed, with references instead
    of kernels.

    Most widths end within a block, and one within half a block. Every block has its own scale, and some experts have
    no token.
    """
    config = dataclasses.replace(
        CONFIG,
        **dict(hidden_size=384, moe_intermediate_size=320, q_lora_rank=160, n_routed_experts=16, num_experts_per_tok=2),
    )
    runtime = Runtime(dtype="bfloat16", precision="fp8", attention_form="absorbed", attention_impl="reference")
    rng, block, texts = new_rng(), Block(config, runtime, is_moe=True), 5
    normal = lambda a, factor: jnp.asarray(factor * rng.standard_normal(a.shape), a.dtype)
    cached = jnp.asarray(rng.integers(1, 60, texts), jnp.int32)
    x = normal(jax.ShapeDtypeStruct((texts, 1, 384), jnp.bfloat16), 1)
    layers = jax.tree.map(lambda a: normal(a, 1), init_cache(config, runtime, texts, 64).moe)
    inputs = x, TokenPositions(cached[:, None], cached=cached), LayerCache(layers, 0)
    variables = jax.tree.map(lambda a: normal(a, 0.1), jax.eval_shape(block.init, jax.random.key(0), *inputs))

    others, blocks, turned = flatten_dict(variables.pop("params")), {}, {}
    for path in [p for p in others if p[-1].endswith(("_proj", "_mqa"))]:
        shape, stack, contract = others.pop(path).shape, int("experts" in path), 1 + (path[-1] == "o_proj")
        sizes = math.prod(shape[stack : stack + contract]), math.prod(shape[stack + contract :])
        values = jnp.asarray(16 * rng.standard_normal(shape), jnp.float8_e4m3fn)
        scales = np.exp(rng.standard_normal((*shape[:stack], *(-(-n // 128) for n in sizes)))) / 16 / sizes[0] ** 0.5
        blocks[path] = values, jnp.asarray(scales, jnp.float32)
        turned[path] = turn(*blocks[path], contract=contract)

    def decode(name, weights, chosen, others):
        values, scales = ({path: of_w[i] for path, of_w in weights.items()} for i in range(2))
        held = {"params": others, SCALES: scales}
        held = {**held, name: held.get(name, {}) | values}
        run = jax.jit(functools.partial(block.apply, mutable=[CHOICES]))
        (y, _), chosen = run(variables | chosen | {of: unflatten_dict(a) for of, a in held.items()}, *inputs)
        return np.asarray(y, np.float64), chosen

    expected, chosen = decode("params", blocks, {}, others)
    assert not calls
    with as_if_hopper():
        got, _ = decode(TURNED, turned, chosen, others)
    assert set(calls) == {"fp8_quantise", "product", "swiglu"}
    assert np.linalg.norm(got - expected) < 1e-2 * np.linalg.norm(expected - np.asarray(x, np.float64))
