"""The model configuration, `ModelConfig`, and its presets.

Field names are those of the released `config.json`; the values of fields that only matter in training
(`initializer_range`, `aux_loss_alpha`) are the technical report's, which the released file contradicts.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.json_input import check_type, show


class ConfigError(ValueError):
    """An invalid configuration. The message names the field, its value and what would be valid."""


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension of RoPE (report section 4.3; arXiv 2309.00071).

    `mscale_all_dim` scales the softmax, `mscale / mscale_all_dim` the rotation itself; both are optional,
    and without them the rotation carries the whole temperature, as in the YaRN paper.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rope_scaling.{name} is {getattr(self, name)!r}: it must be positive")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model. Defaults are those of DeepSeek-V3 671B (report section 4.2)."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    """Standard deviation of weight matrices at initialisation (report section 4.2)."""
    aux_loss_alpha: float = 1e-4
    """Factor of the sequence-wise balance loss (alpha in eq. 17; report section 4.2)."""
    bos_token_id: int | None = 0
    """Token at the beginning of a text; None for none."""
    eos_token_id: int | tuple[int, ...] | None = 1
    """Token or tokens at which a text ends."""

    # Derived sizes -------------------------------------------------------------------------------------
    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def has_router_bias(self) -> bool:
        """Whether experts are selected with `e_score_correction_bias` (V3), rather than by affinity alone (V2)."""
        return self.topk_method == "noaux_tc"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple of any length."""
        one = self.eos_token_id
        return () if one is None else one if isinstance(one, tuple) else (one,)

    # Validation ----------------------------------------------------------------------------------------
    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):  # as config.json has it: a config is hashed, as a list can't be
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.bos_token_id is not None and not _is_token_id(self.bos_token_id):
            raise ConfigError(f"bos_token_id is {show(self.bos_token_id)}: it must be a token's id, or None")
        if not all(map(_is_token_id, self.eos_token_ids)):
            raise ConfigError(f"eos_token_id is {show(self.eos_token_id)}: it must be a token's id, several, or None")
        check_fields(self)
        positive = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok n_group "
            "topk_group routed_scaling_factor max_position_embeddings rope_theta rms_norm_eps initializer_range"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be positive")
        for name in ("n_shared_experts", "num_nextn_predict_layers", "aux_loss_alpha"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must not be negative")
        for field in dataclasses.fields(self):
            value, most = getattr(self, field.name), _MOST.get(field.name, 2**31 - 1)
            if type(value) is int and value > most:
                raise ConfigError(f"{field.name} is {value}: it must be at most {most}")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ConfigError(
                f"q_lora_rank is {self.q_lora_rank!r}: it must be positive, or None for one full projection"
            )
        if self.rope_scaling is not None and not self.rope_theta > 1:
            raise ConfigError(f"rope_theta is {self.rope_theta!r}: under YaRN it must be greater than 1")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ConfigError(
                f"first_k_dense_replace is {self.first_k_dense_replace}: "
                f"it must be from 0 to num_hidden_layers ({self.num_hidden_layers})"
            )
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: RoPE rotates pairs, so it must be even")
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"n_group is {self.n_group}, which doesn't divide n_routed_experts ({self.n_routed_experts})"
            )
        if self.topk_method == "greedy" and self.n_group != 1:
            raise ConfigError(f"n_group is {self.n_group}, but topk_method 'greedy' knows no groups: n_group must be 1")
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group is {self.topk_group}: it must be at most n_group ({self.n_group})")
        reachable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but topk_group {self.topk_group} of n_group "
                f"{self.n_group} leaves only {reachable} experts to choose from"
            )

    # Presets -------------------------------------------------------------------------------------------
    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Returns a named configuration, one of `PRESETS`."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: the presets are {', '.join(PRESETS)}")
        return PRESETS[name]

    # config.json ---------------------------------------------------------------------------------------
    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json`: its path, its directory, or its content.

        `model_type` is one of `checkpoint.hf_config.FAMILIES`: DeepSeek-V3 and V2, and models of the same arithmetic.
        Every field must be known and supported. `initializer_range` and `aux_loss_alpha` are accepted but ignored,
        since they contradict the report (0.02 and 0.001 rather than 0.006 and 1e-4).

        Raises:
          ConfigError: a field is unknown, has the wrong type, contradicts another, or isn't supported by this
            architecture.
          FileNotFoundError: there is no such file.
        """
        from dsv3_jax.checkpoint import hf_config  # which makes a ModelConfig, so not before there is one

        return hf_config.read(source)

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of a Hugging Face `config.json`, which `from_hf` reads back.

        Raises ConfigError if transformers has no class that computes this model.
        """
        from dsv3_jax.checkpoint import hf_config

        return hf_config.to_fields(self)


def _is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


_MOST = {"num_hidden_layers": 10_000, "num_nextn_predict_layers": 100}
"""Limits, far beyond any model, for sizes that take a Python loop or list. Other sizes must fit in 31 bits."""


def check_fields(config: Any, prefix: str = "") -> None:
    """Raises ConfigError, naming the field after `prefix`, if a value isn't of its annotation's type."""
    for name, kind in typing.get_type_hints(type(config)).items():
        check_type(getattr(config, name), kind, prefix + name, ConfigError)


def build_dataclass(kind: Any, values: Any, what: str = "config", prefix: str = "") -> Any:
    """Builds a dataclass from the JSON of `dataclasses.asdict`, nested dataclasses included.

    Args:
      what: the file, for error messages. prefix: added to the names of fields in them, such as "model.".

    Raises ConfigError, naming the field, if one is unknown, missing or of the wrong type, or if the dataclass rejects
    it.
    """
    hints, built = typing.get_type_hints(kind), dict(check_type(values, dict, what, ConfigError))
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if field.name not in built:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{what} has no {name}")
            continue
        value, options = built[field.name], (hint, *typing.get_args(hint))
        nested = [t for t in options if dataclasses.is_dataclass(t)]
        if nested and not (value is None and type(None) in options):
            check_type(value, dict, f"{what}: {name}", ConfigError)
            built[field.name] = build_dataclass(nested[0], value, what, f"{name}.")
        elif not nested:
            check_type(value, hint, f"{what}: {name}", ConfigError)
            built[field.name] = tuple(value) if isinstance(value, list) else value  # JSON knows no tuples
    if unknown := sorted(set(built) - set(hints)):
        raise ConfigError(f"{what} has an unknown field {', '.join(repr(prefix + name) for name in unknown)}")
    return kind(**built)


# Presets -------------------------------------------------------------------------------------------------

_V3 = ModelConfig(rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0))
_V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_group=3,
    routed_scaling_factor=16.0,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    num_nextn_predict_layers=0,
    rope_scaling=_V3.rope_scaling,
    bos_token_id=100000,
    eos_token_id=100001,
)
_V2_LITE = dataclasses.replace(
    _V2,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    topk_method="greedy",
    rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
)
_KIMI_K2 = ModelConfig(  # Kimi-K2-Instruct's config.json
    vocab_size=163840,
    first_k_dense_replace=1,
    num_attention_heads=64,
    n_routed_experts=384,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    max_position_embeddings=131072,
    rope_theta=50000.0,
    rope_scaling=Yarn(
        factor=32.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    bos_token_id=163584,
    eos_token_id=163585,
)
_GLM_FLASH = ModelConfig(  # GLM-4.7-Flash's
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
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=(154820, 154827, 154829),
)
_MOONLIGHT = ModelConfig(  # Moonlight-16B-A3B-Instruct's
    vocab_size=163840,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    num_nextn_predict_layers=0,
    max_position_embeddings=8192,
    rope_theta=50000.0,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163586,
)
_MINI = ModelConfig(  # about 100M parameters: an afternoon on one GPU
    vocab_size=32768,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=192,
    num_hidden_layers=12,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=4096,
)
_TINY = dataclasses.replace(  # a few million parameters over bytes: minutes on a CPU
    _MINI,
    vocab_size=264,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=2048,
    bos_token_id=256,
    eos_token_id=257,
)
PRESETS: dict[str, ModelConfig] = {
    "v3-671b": _V3,
    "v2-236b": _V2,
    "v2-lite-16b": _V2_LITE,
    "kimi-k2-1t": _KIMI_K2,
    "glm-4.7-flash": _GLM_FLASH,
    "moonlight-16b": _MOONLIGHT,
    "v3-mini": _MINI,
    "tiny": _TINY,
}
