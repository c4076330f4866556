"""Models of the same arithmetic under other names, what looks like them, and what others leave in their files."""

import copy
import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax import DeepSeekV3, ModelConfig, load_pretrained
from dsv3_jax.accounting.parameters import count_parameters
from dsv3_jax.checkpoint import hf_config
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.files import CheckpointError, TensorFiles
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.config import ConfigError, build_dataclass
from dsv3_jax.model.router import select_experts
from tests.checkpoint.test_bad_input import load_file, save_file
from tests.configs import SMALL_CHECKPOINT as TINY

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}
YARN = {
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
KIMI = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
GLM = COMMON | {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "eos_token_id": [154820, 154827, 154829],
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "v_head_dim": 256,
    "vocab_size": 154880,
}
MOONLIGHT = KIMI | {
    "eos_token_id": 163586,
    "ep_size": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "routed_scaling_factor": 2.446,
}
SARVAM = COMMON | {
    "head_dim": 576,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "model_type": "sarvam_mla",
    "num_experts": 128,
    "num_hidden_layers": 32,
    "num_shared_experts": 1,
    "q_head_dim": 192,
    "rope_scaling": YARN | {"type": "deepseek_yarn", "beta_fast": 32, "factor": 40},
    "rope_theta": 10000,
    "vocab_size": 262144,
}


# config.json of the family -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "fields"), [("kimi-k2-1t", KIMI), ("glm-4.7-flash", GLM), ("moonlight-16b", MOONLIGHT)]
)
def test_presets_are_the_released_configs(preset, fields):
    assert ModelConfig.from_hf(fields) == ModelConfig.preset(preset)


@pytest.mark.parametrize(
    ("preset", "total", "activated", "published"),
    [
        ("kimi-k2-1t", 1_026_408_232_448, 32_861_500_928, "1T, 32B activated"),
        ("glm-4.7-flash", 29_943_393_920, 3_896_766_080, "30B, 3B activated"),
        ("moonlight-16b", 15_960_110_208, 2_914_776_192, "15.29B, 2.24B activated, without embedding and head"),
    ],
)
def test_counts_of_the_presets(preset, total, activated, published):
    """Added up here matrix by matrix from the config. published: what the model's card says."""
    config, counted = ModelConfig.preset(preset), count_parameters(ModelConfig.preset(preset))
    c, d, h = config, config.hidden_size, config.num_attention_heads
    qk = c.qk_nope_head_dim + c.qk_rope_head_dim
    q = d * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * h * qk if c.q_lora_rank else d * h * qk
    kv = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * (1 + h * (c.qk_nope_head_dim + c.v_head_dim))
    attention = q + kv + h * c.v_head_dim * d + 2 * d
    expert = 3 * d * c.moe_intermediate_size
    sparse = d * c.n_routed_experts + c.n_routed_experts + c.n_shared_experts * expert
    dense = 3 * d * c.intermediate_size
    rest = 2 * c.vocab_size * d + d + c.num_hidden_layers * attention + c.num_dense_layers * dense
    rest += c.num_moe_layers * sparse
    assert counted.total == rest + c.num_moe_layers * c.n_routed_experts * expert == total, published
    assert counted.activated == rest + c.num_moe_layers * c.num_experts_per_tok * expert == activated, published


def test_later_kimis():
    longer = ModelConfig.from_hf(KIMI | {"rope_scaling": YARN | {"factor": 64.0}, "max_position_embeddings": 262144})
    assert longer.rope_scaling.factor == 64
    text = KIMI | {"rms_norm_eps": 1e-5, "rope_scaling": None}
    text["rope_parameters"] = YARN | {"rope_type": "yarn", "rope_theta": 50000.0, "beta_fast": 32.0, "factor": 64.0}
    wrapped = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": {"patch_size": 14},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    for model_type in ("kimi_k2", "deepseek_v3"):
        config = ModelConfig.from_hf(wrapped | {"text_config": text | {"model_type": model_type}})
        assert config == dataclasses.replace(ModelConfig.from_hf(text), rms_norm_eps=1e-5)
    assert hf_config.text_fields(wrapped)["quantization_config"] == wrapped["quantization_config"]
    with pytest.raises(ConfigError, match="tie_word_embeddings is True"):
        ModelConfig.from_hf(wrapped | {"tie_word_embeddings": True})
    with pytest.raises(ConfigError, match="text_config is None"):
        ModelConfig.from_hf({k: v for k, v in wrapped.items() if k != "text_config"})


def test_sarvam_under_its_own_names():
    config = ModelConfig.from_hf(SARVAM)
    assert (config.n_routed_experts, config.n_shared_experts, config.q_lora_rank) == (128, 1, None)
    assert (config.rope_scaling.factor, config.num_nextn_predict_layers) == (40, 0)
    with pytest.raises(ConfigError, match="num_experts is 128, but n_routed_experts is 64"):
        ModelConfig.from_hf(SARVAM | {"n_routed_experts": 64})
    with pytest.raises(ConfigError, match="head_dim is 512"):
        ModelConfig.from_hf(SARVAM | {"head_dim": 512})


def test_layer_types_of_glm_say_which_layers_are_dense():
    types = ["dense", "dense"] + ["sparse"] * 45
    assert ModelConfig.from_hf(GLM | {"mlp_layer_types": types, "first_k_dense_replace": 2}).num_dense_layers == 2
    for bad, named in ((types, "first_k_dense_replace is 1"), (types[::-1], "must come first"), (types[1:], "46")):
        with pytest.raises(ConfigError, match=named):
            ModelConfig.from_hf(GLM | {"mlp_layer_types": bad})
    with pytest.raises(ConfigError, match=r"partial_rotary_factor is 0\.5"):
        ModelConfig.from_hf(GLM | {"partial_rotary_factor": 0.5})


def test_config_json_of_some_layers(tmp_path):
    """Under the names that the source has."""
    golden = Path(__file__).parents[1] / "golden"
    convert_command(ConvertArgs(str(golden / "glm_flash"), tmp_path / "glm", layers="1,2"))
    fields = json.loads((tmp_path / "glm/config.json").read_text())
    assert (fields["mlp_layer_types"], fields["first_k_dense_replace"]) == (["sparse"], 0)
    assert (fields["num_hidden_layers"], fields["num_nextn_predict_layers"]) == (1, 1)
    sarvam = {k: v for k, v in SARVAM.items() if k != "num_nextn_predict_layers"} | {"num_mtp_layers": 1}
    one = dataclasses.replace(ModelConfig.from_hf(sarvam), num_hidden_layers=2, num_nextn_predict_layers=0)
    written = hf_config.with_layers(sarvam, one)
    assert (written["num_mtp_layers"], written["num_hidden_layers"]) == (0, 2)
    assert ModelConfig.from_hf(written).num_nextn_predict_layers == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "axk1"}, "post_mlp_layernorm"),
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "sparse attention"),
        ({"model_type": "glm_moe_dsa", "index_topk": 2048}, "sparse attention"),
        ({"model_type": "deepseek_v4"}, "hyper-connections"),
        ({"model_type": "longcat_flash"}, "two attentions"),
        ({"model_type": "mistral4"}, "scales queries by their position"),
        ({"model_type": "youtu"}, "no experts"),
        ({"model_type": "llama"}, "it must be one of deepseek_v3"),
        ({"model_type": None}, "model_type is None: it must be one of"),
        ({"model_type": ["deepseek_v3"]}, "model_type is .'deepseek_v3'.: it must be one of"),
        ({"index_topk": 2048}, "'index_topk'"),
        ({"rope_scaling": YARN | {"llama_4_scaling_beta": 0.1}}, "scales queries by their position"),
        ({"scoring_func": "softmax"}, "a kimi_k2 computes 'sigmoid' only"),
        ({"hidden_size": None}, "hidden_size is null"),
    ],
)
def test_look_alikes_are_refused_with_the_reason(change, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        ModelConfig.from_hf(KIMI | change)
    assert "\n" not in str(caught.value)


def test_configs_of_other_formats_are_refused():
    with pytest.raises(ConfigError, match=r"Mistral's params\.json"):
        ModelConfig.from_hf({"dim": 7168, "n_layers": 61, "llama_4_scaling": {"beta": 0.1}})
    with pytest.raises(ConfigError, match="another format"):
        ModelConfig.from_hf({"dim": 7168, "n_layers": 61, "inter_dim": 18432})


@pytest.mark.parametrize(
    "extra",
    [
        {"_attn_implementation_autoset": True, "unsloth_version": "2025.3.1"},
        {"return_dict": True, "output_attentions": False, "id2label": {"0": "LABEL_0"}, "sep_token_id": None},
        {"is_encoder_decoder": False, "pruned_heads": {}, "cross_attention_hidden_size": None},
        {"num_mtp_layers": 0},
        {"max_position_embeddings": 131072.0},
        {"rope_scaling": None, "rope_parameters": YARN | {"rope_type": "yarn", "partial_rotary_factor": 1.0}},
    ],
)
def test_fields_that_say_nothing_are_taken(extra):
    assert ModelConfig.from_hf(KIMI | extra) == ModelConfig.preset("kimi-k2-1t")


def test_null_says_none():
    config = ModelConfig.from_hf(KIMI | {"n_shared_experts": None, "eos_token_id": None, "n_group": None})
    assert (config.n_shared_experts, config.eos_token_id, config.n_group) == (0, None, 1)


# What two readers read differently ------------------------------------------------------------------------

V2 = {
    "model_type": "deepseek_v2",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 4.0,
    "norm_topk_prob": True,
}


def test_norm_topk_prob_of_v2_is_read_as_its_reader_does(caplog):
    """transformers ignores it; the released code, if the file names it, normalises and then doesn't scale."""
    hf_config.say_once.cache_clear()
    scores = np.random.default_rng(0).dirichlet(np.ones(8), 5).astype(np.float32)
    best = -np.sort(-scores, axis=-1)[:, :3]
    for extra, right in (
        ({}, best * 4.0),
        ({"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}}, best / best.sum(-1, keepdims=True)),
        ({"auto_map": {}, "num_experts_per_tok": 1}, best[:, :1] * 4.0),
        ({"norm_topk_prob": False, "auto_map": {}}, best * 4.0),
    ):
        config = ModelConfig.from_hf(V2 | extra)
        np.testing.assert_allclose(select_experts(scores, None, config)[1], right, rtol=1e-6)
    assert [r.message.split(":")[0] for r in caplog.records] == ["norm_topk_prob is true for a deepseek_v2"] * 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"n_group": 16, "topk_group": 8}, "n_group is 16 for 16 experts"),
        ({"topk_method": "greedy", "n_group": 1, "topk_group": 1}, "scoring_func is 'sigmoid'"),
        (
            {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "scoring_func": "softmax"},
            "norm_topk_prob is True",
        ),
        (
            {
                "topk_method": "greedy",
                "n_group": 1,
                "topk_group": 1,
                "scoring_func": "softmax",
                "norm_topk_prob": False,
                "rope_interleave": False,
            },
            "rope_interleave is False",
        ),
    ],
)
def test_what_transformers_computes_differently_is_not_written(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(ModelConfig.preset("tiny"), **change).to_hf()


# Types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("num_hidden_layers", "61"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 10**6),
        ("num_nextn_predict_layers", 10**9),
        ("vocab_size", 2**31),
        ("vocab_size", 10**400),
        ("rope_theta", 10**400),
        ("first_k_dense_replace", [3]),
        ("rope_scaling", "yarn"),
        ("rope_scaling", [YARN]),
        ("rope_scaling", YARN | {"factor": "40"}),
        ("rope_scaling", YARN | {"mscale": "1.0"}),
        ("rope_scaling", YARN | {"type": None}),
        ("rope_scaling", YARN | {"type": ["yarn"]}),
        ("rope_scaling", YARN | {"original_max_position_embeddings": 0.5}),
        ("norm_topk_prob", "false"),
        ("norm_topk_prob", 1),
        ("attention_bias", "false"),
        ("hidden_size", 7168.5),
        ("hidden_size", math.inf),
        ("rms_norm_eps", math.nan),
        ("scoring_func", ["sigmoid"]),
        ("topk_method", {}),
        ("mlp_layer_types", "dense"),
        ("num_key_value_heads", "64"),
        ("eos_token_id", {"a": [1]}),
    ],
)
def test_wrong_types_are_named(name, bad):
    with pytest.raises(ConfigError, match=name) as caught:
        ModelConfig.from_hf(KIMI | {name: bad})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"\xff\xfe", "isn't valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "isn't valid JSON"),
        (b'{"rope_theta": NaN}', "NaN"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "twice"),
        (b"[1]", "must hold a JSON object"),
        (b'{"model_type": "deepseek_v3", "hidden_size": "2"}', "hidden_size is '2'"),
    ],
)
def test_errors_name_the_file(text, named, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=named) as caught:
        ModelConfig.from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, -1, 2.5, "false", "yarn", "fp8", 10**30, "deepseek_v2", "ue8m0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}


@st.composite
def fields(draw):
    """A config.json of the family with a few of its values, or of those inside them, replaced."""
    whole = copy.deepcopy(
        draw(st.sampled_from([KIMI, GLM, SARVAM, TINY.to_hf(), {"model_type": "kimi_k25", "text_config": KIMI}]))
    )
    whole["quantization_config"] = dict(QUANTISED)
    for _ in range(draw(st.integers(1, 4))):
        where = whole
        nested = [k for k, v in whole.items() if isinstance(v, dict)]
        if nested and draw(st.booleans()):
            where = whole[draw(st.sampled_from(nested))]
        name = draw(st.sampled_from(sorted(where)) if where and draw(st.integers(0, 5)) else st.text(max_size=12))
        where[name] = draw(VALUES)
    return whole


def check_config(whole, tiny):
    """config.json is taken, or refused in one line; and so is a checkpoint that has it."""
    (tiny / "config.json").write_text(json.dumps(whole))
    for attempt in (lambda: ModelConfig.from_hf(whole), lambda: HFCheckpoint(tiny)):
        said = ""
        try:
            attempt()
        except (ConfigError, CheckpointError) as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 2000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "tiny"
    write_random_checkpoint(directory, TINY, block=(16, 16))
    return directory


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(whole=fields())
def test_fuzzed_configs_are_taken_or_refused_in_one_line(whole, tiny):
    check_config(whole, tiny)


def test_absurd_sizes_take_no_memory(tmp_path):
    """Every size at its largest, in a process that may have 3 GiB of addresses beyond those that imports take."""
    big = {"num_hidden_layers": 10_000, "n_routed_experts": 2**30, "num_experts_per_tok": 1, "n_group": 1}
    write_random_checkpoint(tmp_path / "big", TINY, block=None)
    path = tmp_path / "big/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | big | {"topk_group": 1}))
    program = f"""
import resource, pathlib
from dsv3_jax.checkpoint.hf import HFCheckpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: HFCheckpoint(pathlib.Path({str(tmp_path / "big")!r}))
except ValueError as error: print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said, grown = done.stdout.strip().splitlines()
    assert "too few for 10000 layers" in said
    assert int(grown) < 100_000


# Tensors -------------------------------------------------------------------------------------------------


def edited(directory, change, config=TINY, block=None, **fields):
    """A random checkpoint whose tensors went through `change`, and whose config.json has `fields` besides."""
    write_random_checkpoint(directory, config, block=block)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def put(name, value):
    return lambda tensors: tensors.update({name: value})


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(8, np.float32), "left out 1 RoPE's frequencies"),
        (O_PROJ + "_scale_inv", np.ones((1, 1), np.float32), "left out 1 scales"),
    ],
)
def test_tensors_that_change_nothing_are_left_out_and_said_once(name, value, said, tmp_path, caplog):
    with_it = edited(tmp_path / "with", put(name, value))
    without = edited(tmp_path / "without", lambda _: None)
    with caplog.at_level(logging.WARNING, "dsv3_jax"):
        for _ in range(2):
            loaded = load_pretrained(with_it)[1]
    assert [said in r.message for r in caplog.records] == [True]
    expected = load_pretrained(without)[1]
    assert str(loaded) == str(expected)
    convert_command(ConvertArgs(str(with_it), tmp_path / "store", verify=True))


def test_a_tensor_that_could_change_numbers_stays_refused(tmp_path):
    source = edited(tmp_path / "source", put("model.layers.0.mlp.post_mlp_layernorm.weight", np.ones(24, np.float32)))
    with pytest.raises(CheckpointError, match=r"post_mlp_layernorm.weight in .* is unknown"):
        load_pretrained(source, mtp=False)


def mtp_tensors(tensors):
    return [n for n in tensors if n.startswith("model.layers.2.")]


def double_embedding(tensors):
    name = "model.embed_tokens.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 2).astype(ml_dtypes.bfloat16)


def drop_copies(tensors):
    for name in ("embed_tokens", "shared_head.head"):
        del tensors[f"model.layers.2.{name}.weight"]


STATES = {
    "whole": (lambda _: None, {}, None),
    "announced, not there": (lambda t: [t.pop(n) for n in mtp_tensors(t)], {}, None),
    "there, not announced": (lambda _: None, {"num_nextn_predict_layers": 0}, "is unknown.*--no-mtp"),
    "a stale copy": (double_embedding, {}, "differs from model.embed_tokens.weight.*--no-mtp"),
    "without copies": (drop_copies, {}, r"layers.2.*weight is missing.*--no-mtp"),
    "of a wrong shape": (put("model.layers.2.enorm.weight", np.ones(3, np.float32)), {}, "shape.*--no-mtp"),
    "with tensors of its own": (put("model.layers.2.extra.weight", np.ones(3, np.float32)), {}, "unknown.*--no-mtp"),
}


@pytest.mark.parametrize("state", STATES)
def test_without_mtp_its_state_does_not_matter(state, tmp_path):
    change, fields, refused = STATES[state]
    source = edited(tmp_path / "source", change, **fields)
    model, variables = load_pretrained(source, mtp=False)
    assert isinstance(model, DeepSeekV3)
    assert model.config.num_nextn_predict_layers == 0
    assert not [k for k in variables["params"] if k.startswith("mtp")]
    convert_command(ConvertArgs(str(source), tmp_path / "store", mtp=False, verify=True))
    assert load_pretrained(tmp_path / "store")[0].config == model.config
    for attempt in (lambda: load_pretrained(source), lambda: convert_command(ConvertArgs(str(source), tmp_path / "x"))):
        if refused is None:
            attempt()
        else:
            with pytest.raises(CheckpointError, match=refused):
                attempt()


def test_layers_beyond_those_of_config_json_are_no_mtp(tmp_path):
    """A config.json that was cut short must not cut the model short in silence."""
    source = edited(tmp_path / "source", lambda _: None, dataclasses.replace(TINY, num_nextn_predict_layers=0))
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model.layers.1.* is unknown"):
        load_pretrained(source, mtp=False)


def test_mtp_of_a_converted_checkpoint_can_be_left_out(tmp_path):
    source = edited(tmp_path / "source", lambda _: None)
    convert_command(ConvertArgs(str(source), tmp_path / "store"))
    model, variables = load_pretrained(tmp_path / "store", mtp=False)
    assert model.config == dataclasses.replace(TINY, num_nextn_predict_layers=0)
    assert str(variables) == str(load_pretrained(source, mtp=False)[1])


def test_mtp_is_the_layer_after_the_last_whatever_its_number(tmp_path):
    """GigaChat3's shapes in small: full queries, values wider than keys' plain part; 64 layers, so MTP is layer 64."""
    config = dataclasses.replace(
        TINY, num_hidden_layers=64, first_k_dense_replace=1, q_lora_rank=None, v_head_dim=48, n_group=1, topk_group=1
    )
    source = edited(tmp_path / "source", lambda _: None, config)
    assert "model.layers.64.eh_proj.weight" in TensorFiles(source).tensors
    assert HFCheckpoint(source).config == config


def test_vision_model_around_a_language_model(tmp_path, caplog):
    """Its text alone is taken, and written as a model of its own."""

    def wrap(tensors):
        for name in list(tensors):
            tensors["language_model." + name] = tensors.pop(name)
        tensors["vision_tower.patch_embed.proj.weight"] = np.ones(3, np.float32)
        tensors["mm_projector.proj.0.weight"] = np.ones(3, np.float32)

    config = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    text = config.to_hf() | {"model_type": "kimi_k2"}
    source = edited(tmp_path / "source", wrap, config)
    wrapper = {"model_type": "kimi_k25", "text_config": text, "vision_config": {}}
    (source / "config.json").write_text(json.dumps(wrapper))
    assert HFCheckpoint(source).config == config
    assert ["left out 2 tensors of the vision model" in r.message for r in caplog.records] == [True]
    convert_command(ConvertArgs(str(source), tmp_path / "store", verify=True))
    convert_command(ConvertArgs(str(tmp_path / "store"), tmp_path / "back", verify=True))
    assert json.loads((tmp_path / "back/config.json").read_text()) == text
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert {n.removeprefix("language_model.") for n in before} - set(after) == {
        "vision_tower.patch_embed.proj.weight",
        "mm_projector.proj.0.weight",
    }
    assert all(after[n].tobytes() == before["language_model." + n].tobytes() for n in after)
    save_file(before | {"lm_head.weight": before["language_model.lm_head.weight"]}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .* is unknown: tensors of a kimi_k25 begin"):
        HFCheckpoint(source)


def powers_of_two(directory, ending):
    files = TensorFiles(directory)
    grids = [files.array(n) for n in files.tensors if n.endswith(f"{ending}_scale_inv")]
    assert len(grids) >= 3
    return all((np.frexp(grid)[0] == 0.5).all() for grid in grids)


def test_ue8m0_in_config_json_means_powers_of_two(tmp_path):
    """Scales made on the way in and on the way out are what the config.json beside them says."""
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}
    source = edited(tmp_path / "bf16", lambda _: None, quantization_config=quantised)
    convert_command(ConvertArgs(str(source), tmp_path / "in", dtype="fp8", verify=True))
    convert_command(ConvertArgs(str(tmp_path / "in"), tmp_path / "in_back", verify=True))
    assert json.loads((tmp_path / "in_back/config.json").read_text())["quantization_config"] == quantised
    assert powers_of_two(tmp_path / "in_back", ".weight")

    def widen(tensors):  # one kind is BF16 among FP8
        for name in [n for n in tensors if n.endswith("o_proj.weight")]:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
            del tensors[name + "_scale_inv"]

    for scale_format in (quantised, quantised | {"scale_fmt": None}):
        name = f"mixed_{scale_format['scale_fmt']}"
        source = edited(tmp_path / name, widen, block=(16, 16), quantization_config=scale_format)
        convert_command(ConvertArgs(str(source), tmp_path / f"{name}_store", verify=True))
        convert_command(
            ConvertArgs(str(tmp_path / f"{name}_store"), tmp_path / f"{name}_back", dtype="fp8", verify=True)
        )
        assert powers_of_two(tmp_path / f"{name}_back", "o_proj.weight") == bool(scale_format["scale_fmt"])


def test_another_format_of_scales_is_refused(tmp_path):
    quantised = {"quant_method": "fp8", "scale_fmt": "ue5m3", "weight_block_size": [16, 16]}
    source = edited(tmp_path / "source", lambda _: None, quantization_config=quantised)
    with pytest.raises(CheckpointError, match=r"scale_fmt is 'ue5m3'"):
        load_pretrained(source)


def test_model_of_a_runs_config_is_held_to_its_types():
    values = dataclasses.asdict(TINY)
    assert build_dataclass(ModelConfig, json.loads(json.dumps(values))) == TINY
    for change in ({"hidden_size": "24"}, {"rope_scaling": {"factor": None}}, {"norm_topk_prob": "false"}, {"x": 1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            build_dataclass(ModelConfig, values | change)
