"""Hugging Face's `config.json`, read as a `ModelConfig` and written from one.

`model_type` names the code that computes the model, and so its arithmetic. Unknown fields are errors, since they may
describe another model; so are values that this code, or the model's own, would compute differently.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn
from dsv3_jax.json_input import check_type, read_json, show


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of this architecture.

    absent: defaults of its code for missing fields, if they differ from those of `ModelConfig`.
    computes: values of fields that its code fixes, whatever the file says.
    """

    absent: Mapping[str, Any]
    computes: Mapping[str, tuple[Any, ...]]


_V3 = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}

FAMILIES: dict[str, Family] = {
    "deepseek_v3": Family({}, _V3),
    "deepseek_v2": Family(
        dict(
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=False,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
            routed_scaling_factor=1.0,
        ),
        {
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "rope_interleave": (True,),
        },
    ),
    "kimi_k2": Family({}, _V3),
    "glm4_moe_lite": Family(
        dict(
            vocab_size=154880,
            hidden_size=2048,
            intermediate_size=10240,
            moe_intermediate_size=1536,
            num_hidden_layers=47,
            first_k_dense_replace=1,
            num_attention_heads=20,
            q_lora_rank=768,
            qk_nope_head_dim=192,
            v_head_dim=256,
            n_routed_experts=64,
            num_experts_per_tok=4,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.8,
            max_position_embeddings=202752,
            rms_norm_eps=1e-5,
            bos_token_id=None,  # its texts begin with no such token, whatever the class's default says
        ),
        _V3,
    ),
    "sarvam_mla": Family(
        dict(
            vocab_size=262144,
            hidden_size=4096,
            intermediate_size=16384,
            num_hidden_layers=32,
            first_k_dense_replace=1,
            num_attention_heads=64,
            q_lora_rank=None,
            n_routed_experts=128,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=0,
            max_position_embeddings=4096,
        ),
        _V3,
    ),
}
"""Model types with the arithmetic of DeepSeek-V3 or V2, as in the classes of transformers and the released code."""

WRAPPER = "kimi_k25"
"""Vision models around a language model of one of the types above, described by `text_config` (Kimi-K2.5)."""

_OTHERS = {
    "axk1": "normalises the output of each sparse feed-forward once more (post_mlp_layernorm)",
    "axk2": "has gated norms and attends to selected tokens only",
    "deepseek_v32": "attends to the tokens that an indexer selects (sparse attention)",
    "deepseek_v4": "has hyper-connections, and attention that is compressed and sparse",
    "deepseek_v41": "has hyper-connections, and attention that is compressed and sparse",
    "glm_moe_dsa": "attends to the tokens that an indexer selects (sparse attention)",
    "longcat_flash": "has two attentions in a layer, experts that compute nothing, and rescaled latents",
    "mistral4": "scales queries by their position (llama_4_scaling)",
    "youtu": "has no experts and one matrix for embedding and head",
}
"""Model types that resemble this architecture, and how they differ."""

_TRAINING_FIELDS = ("initializer_range", "aux_loss_alpha")

_ALIASES = {
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
"""Other names of fields, used by sarvam_mla and transformers."""

_NULL = {
    "q_lora_rank": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
}
"""Values of fields for null: one full projection, no such token, no shared expert, no groups."""

_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
}
"""Fields with a fixed value in this architecture: any other value describes another model."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CHECKED = _words(
    "architectures model_type rope_theta rope_scaling rope_parameters num_key_value_heads head_dim qk_head_dim "
    "q_head_dim mlp_layer_types quantization_config"
)
"""Fields that are read elsewhere, or checked against other fields."""

_METADATA = _words(
    # Training, serving and files
    "auto_map dtype torch_dtype transformers_version use_cache pad_token_id sep_token_id output_router_logits "
    "pretraining_tp ep_size seq_aux attn_implementation "
    # What transformers' base class wrote into every file at one time or another
    "return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder "
    "is_decoder chunk_size_feed_forward finetuning_task id2label label2id tokenizer_class prefix problem_type "
    "decoder_start_token_id task_specific_params max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
)
"""Fields that don't affect the arithmetic."""

_PRIVATE = ("_", "unsloth_")
"""Prefixes of fields that programs write for their own use."""

_TRANSFORMERS_DEFAULT_KV_HEADS = 128
"""transformers writes this number for V3 by default. It has no meaning, since MLA shares one latent."""


def read(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig.from_hf`."""
    if isinstance(source, Mapping):
        return from_fields(source)
    path = config_file(source)
    fields = read_fields(path)
    try:
        return from_fields(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def config_file(source: str | Path) -> Path:
    """Returns the config.json at a path: the file itself, or the one in a directory."""
    return Path(source) / "config.json" if Path(source).is_dir() else Path(source)


def read_fields(path: Path) -> dict[str, Any]:
    """Reads the object in a config.json. Raises ConfigError, or FileNotFoundError."""
    try:
        return read_json(path, ConfigError)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} doesn't exist: give a config.json or a directory that holds one") from None


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the language model: those of `text_config` if there is one, else all."""
    if fields.get("model_type") != WRAPPER:
        return dict(fields)
    text = dict(check_type(fields.get("text_config"), dict, "text_config", ConfigError))
    for name in ("quantization_config", "eos_token_id", "bos_token_id", "dtype", "torch_dtype"):
        if name in fields and text.get(name) is None:
            text[name] = fields[name]
    if fields.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = fields["tie_word_embeddings"]
    if text.get("quantization_config") != fields.get("quantization_config", text.get("quantization_config")):
        raise ConfigError("quantization_config and text_config.quantization_config contradict each other: keep one")
    return text


def from_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model described by the content of a config.json. Raises ConfigError."""
    fields = text_fields(fields)
    family = _family(fields)
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    private = {name for name in fields if name.startswith(_PRIVATE)}
    unknown = sorted(set(fields) - own - set(_ALIASES) - set(_REQUIRED) - _CHECKED - _METADATA - private)
    if unknown:
        raise ConfigError(
            f"unknown field {', '.join(map(show, unknown[:5]))} in the config: it may describe another model"
        )
    if private:
        say_once(f"ignored in config.json: {', '.join(sorted(private))}, which say nothing about the model")
    for name, value in _REQUIRED.items():
        if fields.get(name) is not None and fields[name] != value:
            raise ConfigError(f"{name} is {show(fields[name])}: this architecture only has {value!r}")

    values = dict(family.absent) | _own_fields(fields, own)
    values["rope_theta"], values["rope_scaling"] = _rope(fields)
    if values.get("topk_method") == "gready":  # the default of DeepSeek-V2's released code, which means this
        values["topk_method"] = "greedy"
    _check_layer_types(fields, values)
    if _counts(values, "first_k_dense_replace", "num_hidden_layers"):
        # A shallow model under a larger first_k_dense_replace has only dense layers.
        values["first_k_dense_replace"] = min(values["first_k_dense_replace"], values["num_hidden_layers"])
    if fields["model_type"] == "deepseek_v2" and values["norm_topk_prob"] is True:
        values |= _v2_normalisation(fields, values)
    config = ModelConfig(**values)
    for name, known in family.computes.items():
        if getattr(config, name) not in known:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}: a {fields['model_type']} computes "
                f"{' or '.join(map(repr, known))} only"
            )
    _check_derived(fields, config)
    return config


def to_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a `config.json` for `config`; `from_fields` reads them back.

    Raises ConfigError if transformers has no class that computes this model.
    """
    v3 = config.has_router_bias
    model_type, name = ("deepseek_v3", "DeepseekV3ForCausalLM") if v3 else ("deepseek_v2", "DeepseekV2ForCausalLM")
    known = dict(FAMILIES[model_type].computes) | ({} if v3 else {"norm_topk_prob": (False,)})
    for field, values in known.items():
        if getattr(config, field) not in values:
            raise ConfigError(
                f"{field} is {getattr(config, field)!r} with topk_method {config.topk_method!r}: config.json can't say "
                f"so, since transformers' {name} computes {' or '.join(map(repr, values))} only"
            )
    if v3 and config.n_routed_experts < 2 * config.n_group and config.num_moe_layers:
        raise ConfigError(
            f"n_group is {config.n_group} for {config.n_routed_experts} experts: transformers' {name} ranks a group by "
            "its two best experts, so config.json can't say groups of one"
        )
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _TRAINING_FIELDS}
    fields["rope_scaling"] = None if config.rope_scaling is None else _yarn_to_hf(config.rope_scaling)
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    return fields | {
        "architectures": [name],
        "model_type": model_type,
        "num_key_value_heads": config.num_attention_heads,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def with_layers(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Changes the layer counts in `fields` of a config.json to those of `config`."""
    written, before = dict(fields), from_fields(fields)
    for name in ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers"):
        if getattr(before, name) != getattr(config, name):
            for alias in [a for a, meant in _ALIASES.items() if meant == name and a in written] or [name]:
                written[alias] = getattr(config, name)
            if name in written:
                written[name] = getattr(config, name)
    if "mlp_layer_types" in written:
        written["mlp_layer_types"] = ["dense"] * config.num_dense_layers + ["sparse"] * config.num_moe_layers
    return written


def power_of_two_scales(fields: Mapping[str, Any]) -> bool:
    """Whether config.json says that the scales of FP8 blocks are powers of two ("ue8m0", DeepSeek-V3.1).

    Raises ConfigError if `quantization_config` isn't an object.
    """
    quantised = check_type(fields.get("quantization_config"), dict | None, "quantization_config", ConfigError)
    return bool(quantised) and quantised.get("scale_fmt") == "ue8m0"


@functools.cache
def say_once(message: str) -> None:
    """Prints a notice about ignored input on standard error, once."""
    logging.getLogger("dsv3_jax").warning(message)


def _family(fields: Mapping[str, Any]) -> Family:
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    valid = f"it must be one of {', '.join([*FAMILIES, WRAPPER])}"
    if isinstance(model_type, str) and model_type in _OTHERS:
        raise ConfigError(f"model_type is {model_type!r}, which {_OTHERS[model_type]}: {valid}")
    if "llama_4_scaling" in fields:
        raise ConfigError(f"this is Mistral's params.json of a model that {_OTHERS['mistral4']}, not a config.json")
    if model_type is None and {"dim", "n_layers"} & set(fields):
        raise ConfigError("dim and n_layers are fields of another format (params.json): give a config.json")
    raise ConfigError(f"model_type is {show(model_type)}: {valid}")


def _own_fields(fields: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """Renames fields to those of `ModelConfig`, and converts integers that JSON writes as 4096.0."""
    values: dict[str, Any] = {}
    for name in sorted(fields, key=lambda n: n in _ALIASES):
        field = _ALIASES.get(name, name)
        if field not in own - {*_TRAINING_FIELDS, "rope_theta", "rope_scaling"}:
            continue
        value = fields[name]
        if value is None:
            if field not in _NULL:
                raise ConfigError(f"{name} is null: it must have a value, or be left out")
            value = _NULL[field]
        if field not in ("bos_token_id", "eos_token_id"):
            value = _whole(value, _MODEL_HINTS[field])
        if name in _ALIASES and values.get(field, value) != value:
            raise ConfigError(f"{name} is {show(value)}, but {field} is {show(values[field])}: they mean the same")
        values[field] = value
    return values


_MODEL_HINTS = typing.get_type_hints(ModelConfig)
_YARN_HINTS = typing.get_type_hints(Yarn)


def _whole(value: Any, kind: Any) -> Any:
    takes_floats = float in (kind, *typing.get_args(kind))
    return int(value) if not takes_floats and isinstance(value, float) and value.is_integer() else value


def _counts(values: Mapping[str, Any], *names: str) -> bool:
    return all(type(values.get(name)) is int for name in names)


def _check_layer_types(fields: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Reads the number of dense layers from `mlp_layer_types`, if present: dense layers first, then sparse ones."""
    types = fields.get("mlp_layer_types")
    if types is None:
        return
    check_type(types, list[str], "mlp_layer_types", ConfigError)
    dense = types.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise ConfigError(f"mlp_layer_types is {show(types)}: dense layers must come first, and sparse ones after them")
    if len(types) != values.get("num_hidden_layers", ModelConfig.num_hidden_layers):
        raise ConfigError(f"mlp_layer_types has {len(types)} entries: num_hidden_layers must be as many")
    if "first_k_dense_replace" in fields and fields["first_k_dense_replace"] != dense:
        raise ConfigError(
            f"first_k_dense_replace is {show(fields['first_k_dense_replace'])}, but mlp_layer_types has {dense} dense "
            "layers: they must agree"
        )
    values["first_k_dense_replace"] = dense


def _v2_normalisation(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Interprets `norm_topk_prob: true` in a DeepSeek-V2 config, which no released file has and readers treat
    differently.

    The released code, named by `auto_map`, normalises the weights of several experts and then skips
    `routed_scaling_factor`; the class in transformers ignores the field.
    """
    if "auto_map" not in fields:
        say_once("norm_topk_prob is true for a deepseek_v2: ignored, as transformers' DeepseekV2ForCausalLM ignores it")
        return {"norm_topk_prob": False}
    if values.get("num_experts_per_tok") == 1:
        return {"norm_topk_prob": False}
    say_once(
        "norm_topk_prob is true for a deepseek_v2: weights are normalised and not multiplied by routed_scaling_factor, "
        "as by the released code that auto_map names"
    )
    return {"routed_scaling_factor": 1.0}


def _check_derived(fields: Mapping[str, Any], config: ModelConfig) -> None:
    """Checks fields that follow from others. `head_dim` is that of RoPE, or of a cache entry (vLLM)."""
    both = config.qk_nope_head_dim + config.qk_rope_head_dim
    derived = {
        "num_key_value_heads": (config.num_attention_heads, _TRANSFORMERS_DEFAULT_KV_HEADS),
        "head_dim": (config.qk_rope_head_dim, config.kv_lora_rank + config.qk_rope_head_dim),
        "qk_head_dim": (both,),
        "q_head_dim": (both,),
    }
    for name, valid in derived.items():
        if fields.get(name) is not None and fields[name] not in valid:
            raise ConfigError(
                f"{name} is {show(fields[name])}, which contradicts the other fields: they make it {valid[0]}"
            )


def _rope(fields: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Reads RoPE's base and scaling, from `rope_scaling` (released files) or `rope_parameters` (transformers 5)."""
    given = {}
    for name in ("rope_scaling", "rope_parameters"):
        if check_type(fields.get(name), dict | None, name, ConfigError):
            given[name] = _scaling(name, dict(fields[name]))
    scalings = list(given.values())
    if len(scalings) == 2 and scalings[0][1] != scalings[1][1]:
        raise ConfigError("rope_scaling and rope_parameters contradict each other: keep one of them")
    theta = fields.get("rope_theta")
    for name, (own, _) in given.items():
        if own is not None and theta is not None and own != theta:
            raise ConfigError(f"rope_theta is {show(theta)}, but {show(own)} in {name}: they must agree")
        theta = own if own is not None else theta
    theta = ModelConfig.rope_theta if theta is None else theta
    return float(check_type(theta, float, "rope_theta", ConfigError)), scalings[0][1] if scalings else None


def _scaling(where: str, scaling: dict[str, Any]) -> tuple[Any, Yarn | None]:
    """Returns the base, or None, and the scaling in one of the two objects."""
    theta, partial = scaling.pop("rope_theta", None), scaling.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ConfigError(f"{where}.partial_rotary_factor is {show(partial)}: this architecture only has 1.0")
    if "llama_4_scaling_beta" in scaling:
        raise ConfigError(f"{where}.llama_4_scaling_beta is for a model that {_OTHERS['mistral4']}")
    kinds = {
        check_type(scaling.pop(k), str, f"{where}.{k}", ConfigError) for k in ("type", "rope_type") if k in scaling
    }
    kinds = {"yarn" if kind == "deepseek_yarn" else kind for kind in kinds} or {"default"}
    if kinds == {"default"}:
        if scaling:
            raise ConfigError(f"unknown field {', '.join(map(show, sorted(scaling)))} in RoPE of type 'default'")
        return theta, None
    if kinds != {"yarn"}:
        raise ConfigError(f"{where} type is {'/'.join(map(show, sorted(kinds)))}: it must be 'yarn' or 'default'")
    unknown = sorted(set(scaling) - set(_YARN_HINTS))
    if unknown:
        raise ConfigError(f"unknown field {', '.join(map(show, unknown))} in {where}")
    scaling = {k: _whole(v, _YARN_HINTS[k]) for k, v in scaling.items() if v is not None}
    missing = sorted({"factor", "original_max_position_embeddings"} - set(scaling))
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(map(repr, missing))}: YaRN needs it")
    return theta, Yarn(**scaling)


def _yarn_to_hf(yarn: Yarn) -> dict[str, Any]:
    written = {k: v for k, v in dataclasses.asdict(yarn).items() if v is not None}
    if yarn.truncate:
        del written["truncate"]  # the default, which released files don't spell out
    return {"type": "yarn"} | written
