"""`load_pretrained(dtype="fp8")`: the model runs on the blocks that a checkpoint stores."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime, load_pretrained
from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.layout import quantise_matrix
from dsv3_jax.checkpoint.store import Variables
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.expert_placement import with_redundant_experts
from dsv3_jax.inference.generate import generate
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.quantization.fp8 import BLOCK

CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=64, hidden_size=256, intermediate_size=384, moe_intermediate_size=256, num_hidden_layers=2),
    **dict(first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=256, qk_nope_head_dim=128),
    **dict(qk_rope_head_dim=64, v_head_dim=128, num_nextn_predict_layers=1, n_shared_experts=1),
    # Every expert is chosen: else rounding would send some tokens to others.
    **dict(
        n_routed_experts=4,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        initializer_range=0.03,
    ),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 16)), jnp.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fp8") / "hf", CONFIG)


@pytest.fixture(scope="module")
def ue8m0(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fp8") / "ue8m0", CONFIG, power_of_two=True)


both = pytest.mark.parametrize("source", ["checkpoint", pytest.param("ue8m0", marks=pytest.mark.slow)])


def write(directory, config, *, power_of_two=False):
    """A checkpoint quantised as the released ones are; a block adds to the residual stream less than is there."""
    directory.mkdir()
    variables = jax.jit(DeepSeekV3(config).init)(jax.random.key(0), TOKENS[:1])
    variables["params"]["embed_tokens"] /= config.initializer_range
    store, tensors = Variables(config, variables, directory), {}
    for name in names.tensor_shapes(config):
        matrix = store.matrix(name)
        if store.kind(name).fp8:
            tensors[name], scales = quantise_matrix(matrix, BLOCK, power_of_two=power_of_two)
            tensors[name + names.SCALE] = (np.frexp(scales)[1] + 126).astype(np.uint8) if power_of_two else scales
        else:
            tensors[name] = matrix if store.kind(name).float32 else matrix.astype(ml_dtypes.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    quantised = {"quant_method": "fp8", "weight_block_size": BLOCK} | ({"scale_fmt": "ue8m0"} if power_of_two else {})
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"quantization_config": quantised}))
    return directory


def logits(model, variables):
    return np.asarray(jax.jit(model.apply)(variables, TOKENS), np.float64)


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@both
def test_logits_are_those_of_the_decoded_model(source, request):
    checkpoint = request.getfixturevalue(source)
    model, variables = load_pretrained(checkpoint, dtype="fp8")
    assert model.runtime.precision == "fp8"
    got = logits(model, variables)
    decoded_model, decoded = load_pretrained(checkpoint)
    assert 1e-4 < relative(got, logits(decoded_model, decoded)) < 0.03
    emulated = load_pretrained(checkpoint, runtime=model.runtime, dtype="float32")
    assert relative(got, logits(*emulated)) < 1e-2
    absorbed = load_pretrained(checkpoint, dtype="fp8", runtime=Runtime(precision="fp8", attention_form="absorbed"))
    assert relative(logits(*absorbed), logits(decoded_model, decoded)) < 0.03


def test_other_precisions_take_layers_out_of_their_blocks(checkpoint):
    got, expected = load_pretrained(checkpoint, dtype="fp8", runtime=Runtime()), load_pretrained(checkpoint)
    assert got[1]["params"]["dense_layers"]["mlp"]["up_proj"].dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(logits(*got), logits(*expected), atol=1e-5)


def test_a_weight_takes_1_04_bytes(checkpoint):
    """Counts the arrays in memory; embedding, head, norms, router and MTP's projection are bfloat16."""
    _, variables = load_pretrained(checkpoint, dtype="fp8")
    params = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(variables["params"])}
    in_blocks = {path: x for path, x in params.items() if x.dtype == jnp.float8_e4m3fn}
    scales = jax.tree.leaves(variables["scales"])
    assert sum(x.nbytes for x in [*in_blocks.values(), *scales]) <= 1.04 * sum(x.size for x in in_blocks.values())
    kept = {path.split("'")[-2] for path in params.keys() - in_blocks.keys()}
    norms = {"norm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "enorm", "hnorm"}
    assert kept == {"embed_tokens", "lm_head", "weight", "eh_proj", *norms}
    assert {params[path].dtype.name for path in params.keys() - in_blocks.keys()} == {"bfloat16"}


def test_on_hopper_they_are_held_as_its_kernels_take_them(checkpoint, monkeypatch):
    """Each once, and the model computes the same; also with redundant experts."""
    model, stored = load_pretrained(checkpoint, dtype="fp8")
    monkeypatch.setattr("dsv3_jax.checkpoint.load.fp8_implementation", lambda: "gpu")
    model_again, held = load_pretrained(checkpoint, dtype="fp8")
    assert model_again == model
    matrices = jax.tree.leaves(held["turned"])
    assert not [x for x in jax.tree.leaves(held["params"]) if x.dtype == jnp.float8_e4m3fn]
    assert len(jax.tree.leaves(held["params"])) + len(matrices) == len(jax.tree.leaves(stored["params"]))
    whole = sum(x.nbytes for x in [*matrices, *jax.tree.leaves(held["scales"])])
    assert whole <= 1.04 * sum(x.size for x in matrices)
    assert held["turned"]["moe_layers"]["self_attn"]["o_proj"].shape == (1, 256, 256)
    assert held["turned"]["moe_layers"]["mlp"]["experts"]["up_proj"].shape == (1, 4, 256, 256)
    assert held["turned"]["moe_layers"]["self_attn"]["q_b_proj"].shape == (1, 384, 128)
    np.testing.assert_array_equal(logits(model, held), logits(model, stored))
    absorbed = model.clone(runtime=dataclasses.replace(model.runtime, attention_form="absorbed"))
    np.testing.assert_allclose(logits(absorbed, held), logits(absorbed, stored), atol=1e-5)
    load = {"moe_layers": np.array([[1.0, 9, 1, 1]]), "mtp_0": np.array([1.0, 1, 9, 1])}
    placed = with_redundant_experts(held, load, CONFIG, MeshShape(), redundant=2)
    assert placed["turned"]["moe_layers"]["mlp"]["experts"]["up_proj"].shape == (1, 6, 256, 256)


@both
def test_scales_are_those_of_the_files(source, request):
    model, variables = load_pretrained(request.getfixturevalue(source), dtype="fp8")
    assert model.runtime.fp8_power_of_two == (source == "ue8m0")
    scales = variables["scales"]["moe_layers"]
    assert scales["mlp"]["experts"]["down_proj"].shape == (1, 4, 2, 2)
    assert scales["self_attn"]["v_b_proj"].shape == (1, 2, 2)
    exponents = np.log2(np.asarray(scales["mlp"]["experts"]["down_proj"]))
    assert np.array_equal(exponents, np.round(exponents)) == (source == "ue8m0")


def test_a_converted_checkpoint_keeps_them_too(checkpoint, tmp_path):
    convert_command(ConvertArgs(str(checkpoint), tmp_path / "store"))
    a, b = (load_pretrained(path, dtype="fp8") for path in (checkpoint, tmp_path / "store"))
    assert a[0].runtime == b[0].runtime
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_on_a_mesh(checkpoint):
    mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), devices=jax.devices()[:4])
    model, whole = load_pretrained(checkpoint, dtype="fp8")
    runtime = dataclasses.replace(model.runtime, sharding="fsdp_ep")
    model_on_mesh, cut = load_pretrained(checkpoint, dtype="fp8", runtime=runtime, mesh=mesh)
    experts = cut["params"]["moe_layers"]["mlp"]["experts"]["up_proj"]
    assert experts.addressable_shards[0].data.size == experts.size // 4
    scales = cut["scales"]["moe_layers"]["mlp"]["experts"]["up_proj"]
    assert scales.addressable_shards[0].data.size == scales.size // 2
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    with jax.set_mesh(experts.sharding.mesh):
        got = logits(model_on_mesh, cut)
    assert relative(got, logits(model, whole)) < 5e-3


def test_generation_on_blocks(checkpoint):
    model, variables = load_pretrained(checkpoint, dtype="fp8", mtp=False)
    drawn = generate(model, variables, [[1, 2, 3], [4, 5]], 3)
    assert np.asarray(drawn).shape == (2, 3)


@pytest.mark.slow
def test_redundant_experts_have_their_scales(checkpoint):
    model, variables = load_pretrained(checkpoint, dtype="fp8")
    load = {"moe_layers": np.array([[1.0, 9, 1, 1]]), "mtp_0": np.array([1.0, 1, 9, 1])}
    placed = with_redundant_experts(variables, load, CONFIG, MeshShape(), redundant=2)
    runtime = dataclasses.replace(model.runtime, redundant_experts=2)
    np.testing.assert_allclose(
        logits(dataclasses.replace(model, runtime=runtime), placed), logits(model, variables), atol=1e-4
    )


def test_heads_that_share_blocks_are_decoded(tmp_path):
    """192 of keys and 256 of values, as GLM's: no block of kv_b_proj is one of the keys' array."""
    config = dataclasses.replace(CONFIG, qk_nope_head_dim=192, v_head_dim=256, num_nextn_predict_layers=0)
    directory = write(tmp_path / "hf", config)
    model, variables = load_pretrained(directory, dtype="fp8")
    attention = variables["params"]["moe_layers"]["self_attn"]
    assert attention["k_b_proj"].dtype == jnp.bfloat16
    assert attention["q_b_proj"].dtype == jnp.float8_e4m3fn
    assert relative(logits(model, variables), logits(*load_pretrained(directory))) < 0.03


def test_checkpoints_without_such_blocks_are_refused(tmp_path):
    for name, block in (("bf16", None), ("small", (64, 64))):
        write_random_checkpoint(tmp_path / name, dataclasses.replace(CONFIG, num_nextn_predict_layers=0), block=block)
        with pytest.raises(ConfigError, match="holds no matrix in FP8 blocks of 128 x 128"):
            load_pretrained(tmp_path / name, dtype="fp8")


def test_a_quantization_config_that_is_no_object_is_named(tmp_path):
    write_random_checkpoint(tmp_path / "odd", CONFIG)
    file = tmp_path / "odd/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": "fp8"}))
    with pytest.raises(ConfigError, match="quantization_config is 'fp8': it must be an object"):
        load_pretrained(tmp_path / "odd", dtype="fp8")
