"""ModelConfig: validation, presets, and config.json in both directions."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import PRESETS, ConfigError, ModelConfig, Yarn, build_dataclass
from dsv3_jax.runtime import Runtime

RELEASED = {  # deepseek-ai/DeepSeek-V3's config.json
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "aux_loss_alpha": 0.001,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_released_config_is_the_preset_with_the_reports_training_values():
    config = ModelConfig.from_hf(RELEASED)
    assert config == ModelConfig.preset("v3-671b")
    assert (config.initializer_range, config.aux_loss_alpha) == (0.006, 1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip(name, tmp_path):
    config = ModelConfig.preset(name)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(tmp_path / "config.json") == config


@given(
    factor=st.floats(1, 64),
    mscale=st.one_of(st.none(), st.floats(0.1, 2)),
    groups=st.sampled_from([(1, 1), (4, 2), (8, 8)]),
    q_lora_rank=st.one_of(st.none(), st.integers(1, 512)),
    interleave=st.booleans(),
)
def test_any_config_survives_the_round_trip(factor, mscale, groups, q_lora_rank, interleave):
    config = dataclasses.replace(
        ModelConfig.preset("tiny"),
        rope_scaling=Yarn(factor, 64, mscale=mscale, mscale_all_dim=mscale, truncate=interleave),
        n_group=groups[0],
        topk_group=groups[1],
        q_lora_rank=q_lora_rank,
        rope_interleave=interleave,
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_group": 7}, "n_group is 7"),
        ({"topk_group": 9}, "topk_group is 9"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok is 200"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace is 62"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"topk_method": "greedy"}, "n_group is 8"),
        ({"q_lora_rank": -3}, "q_lora_rank is -3"),
    ],
)
def test_impossible_configs_name_the_field(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(ModelConfig.preset("v3-671b"), **change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": 512}, "'sliding_window'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"qk_head_dim": 128}, "qk_head_dim is 128"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 4, "gamma": 1}}, "gamma"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "contradict"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta"),
    ],
)
def test_foreign_config_json_is_refused_by_name(change, named):
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf(RELEASED | change)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json doesn't exist"):
        ModelConfig.from_hf(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="isn't valid JSON"):
        ModelConfig.from_hf(tmp_path)


def test_unknown_preset_and_runtime_name_the_choices():
    with pytest.raises(ConfigError, match="v3-671b"):
        ModelConfig.preset("v3")
    with pytest.raises(ConfigError, match=r"runtime\.dtype is 'fp16'"):
        Runtime(dtype="fp16")


@pytest.mark.parametrize(("stored", "ids"), [(5, (5,)), ([5, 7], (5, 7)), ([5], (5,)), (None, ()), ([], ())], ids=repr)
def test_end_tokens_one_several_or_none(stored, ids):
    config = ModelConfig.from_hf(RELEASED | {"eos_token_id": stored, "bos_token_id": None})
    assert config.eos_token_ids == ids
    assert config.bos_token_id is None
    hash(config)  # `jit` keys its programs by it
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert json.loads(json.dumps(config.to_hf()))["eos_token_id"] == stored
    assert build_dataclass(ModelConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("bad", ["1", True, -1, 1.0, {"a": 1}, 2**31], ids=repr)
def test_impossible_special_tokens_are_named(name, bad):
    for value in [bad] + [[3, bad]] * (name == "eos_token_id"):
        with pytest.raises(ConfigError, match=f"{name} is .*: it must be a token's id"):
            ModelConfig.from_hf(RELEASED | {name: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 3}, r"unknown field 'model.steps'"),
        ({"hidden_size": "16"}, r"model.hidden_size is '16': it must be an integer"),
        ({"norm_topk_prob": 1}, r"model.norm_topk_prob is 1: it must be true or false"),
        ({"rope_scaling": "yarn"}, r"model.rope_scaling is 'yarn': it must be an object"),
        ({"rope_scaling": {"factor": 2}}, r"has no model.rope_scaling.original_max_position_embeddings"),
        ({"scoring_func": "relu"}, r"model.scoring_func is 'relu': it must be 'sigmoid' or 'softmax'"),
        ({"num_attention_heads": None}, r"model.num_attention_heads is None"),
    ],
)
def test_what_json_kept_of_a_config_is_held_to_its_types(change, named):
    kept = json.loads(json.dumps(dataclasses.asdict(ModelConfig.preset("tiny"))))
    assert build_dataclass(ModelConfig, kept, "f", "model.") == ModelConfig.preset("tiny")
    with pytest.raises(ConfigError, match=named):
        build_dataclass(ModelConfig, kept | change, "f", "model.")
