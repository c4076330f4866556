"""Hugging Face's `config.json`, read as a `ModelConfig` and written from one.

Every field must be known and possible here: one that isn't may describe another model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn

_TRAINING_FIELDS = ("initializer_range", "aux_loss_alpha")

_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}
"""Fields that have one value in this architecture: another value describes another model."""

_METADATA = frozenset(
    [
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "output_router_logits",
        "pretraining_tp",
        "ep_size",
        "seq_aux",
        "quantization_config",
        "_name_or_path",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "initializer_range",
        "aux_loss_alpha",
        "num_key_value_heads",
        "head_dim",
        "qk_head_dim",
        "model_type",
    ]
)
"""Fields that are read elsewhere, checked below, or say nothing about the architecture."""

_TRANSFORMERS_DEFAULT_KV_HEADS = 128
"""transformers writes this number for V3 when nobody set it; MLA shares one latent, so the number says nothing."""

_V2_DEFAULTS = dict(
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
    routed_scaling_factor=1.0,
)


def read_fields(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} doesn't exist: give a config.json or a directory that holds one") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds a {type(fields).__name__}: it must hold a JSON object of fields")
    return fields


def from_fields(fields: dict[str, Any]) -> ModelConfig:
    model_type = fields.get("model_type", "deepseek_v3")
    if model_type not in ("deepseek_v3", "deepseek_v2"):
        raise ConfigError(f"model_type is {model_type!r}: it must be 'deepseek_v3' or 'deepseek_v2'")
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(fields) - own - set(_REQUIRED) - _METADATA)
    if unknown:
        raise ConfigError(f"unknown field {', '.join(map(repr, unknown))} in the config: it may describe another model")
    for name, value in _REQUIRED.items():
        if fields.get(name, value) not in (value, None):
            raise ConfigError(f"{name} is {fields[name]!r}: this architecture only has {value!r}")

    values = {k: v for k, v in fields.items() if k in own - set(_TRAINING_FIELDS) and v is not None}
    for name in ("q_lora_rank", "bos_token_id", "eos_token_id"):
        if name in fields:  # null says "none": one full projection, no such token; absent says "the default"
            values[name] = fields[name]
    if model_type == "deepseek_v2":
        values = _V2_DEFAULTS | values
    values["rope_theta"], values["rope_scaling"] = _rope_from_hf(fields)
    if "first_k_dense_replace" in values and "num_hidden_layers" in values:
        # A shallow model under a larger first_k_dense_replace has only dense layers.
        values["first_k_dense_replace"] = min(values["first_k_dense_replace"], values["num_hidden_layers"])
    config = ModelConfig(**values)

    derived = {
        "num_key_value_heads": (config.num_attention_heads, _TRANSFORMERS_DEFAULT_KV_HEADS),
        "head_dim": (config.qk_rope_head_dim,),
        "qk_head_dim": (config.qk_nope_head_dim + config.qk_rope_head_dim,),
    }
    for name, valid in derived.items():
        if fields.get(name) is not None and fields[name] not in valid:
            raise ConfigError(
                f"{name} is {fields[name]!r}, which contradicts the other fields: they make it {valid[0]}"
            )
    return config


def _rope_from_hf(fields: dict[str, Any]) -> tuple[float, Yarn | None]:
    """RoPE's base and its scaling, from `rope_scaling` (released files) or `rope_parameters` (transformers 5)."""
    both = [dict(fields[k]) for k in ("rope_scaling", "rope_parameters") if fields.get(k)]
    if len(both) == 2 and _rope_from_hf({"rope_scaling": both[0]})[1] != _rope_from_hf({"rope_scaling": both[1]})[1]:
        raise ConfigError("rope_scaling and rope_parameters contradict each other: keep one of them")
    scaling: dict[str, Any] = both[-1] if both else {}
    theta = scaling.pop("rope_theta", fields.get("rope_theta", ModelConfig.rope_theta))
    if fields.get("rope_theta", theta) != theta:
        raise ConfigError(f"rope_theta is {fields['rope_theta']}, but {theta} in rope_parameters: they must agree")
    kinds = {scaling.pop(k) for k in ("type", "rope_type") if k in scaling} or {"default"}
    if kinds == {"default"}:
        if scaling:
            raise ConfigError(f"unknown field {', '.join(map(repr, sorted(scaling)))} in RoPE of type 'default'")
        return float(theta), None
    if kinds != {"yarn"}:
        raise ConfigError(f"rope_scaling type is {'/'.join(sorted(kinds))}: it must be 'yarn' or 'default'")
    unknown = sorted(set(scaling) - {f.name for f in dataclasses.fields(Yarn)})
    if unknown:
        raise ConfigError(f"unknown field {', '.join(map(repr, unknown))} in rope_scaling")
    missing = sorted({"factor", "original_max_position_embeddings"} - {k for k, v in scaling.items() if v is not None})
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(map(repr, missing))}: YaRN needs it")
    return float(theta), Yarn(**scaling)


def _yarn_to_hf(yarn: Yarn) -> dict[str, Any]:
    written = {k: v for k, v in dataclasses.asdict(yarn).items() if v is not None}
    if yarn.truncate:
        del written["truncate"]  # the default, which released files don't spell out
    return {"type": "yarn"} | written


def to_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` for `config`; `from_fields` reads them back."""
    v3 = config.has_router_bias
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _TRAINING_FIELDS}
    fields["rope_scaling"] = None if config.rope_scaling is None else _yarn_to_hf(config.rope_scaling)
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    return fields | {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "num_key_value_heads": config.num_attention_heads,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
