"""Rules: which mesh axes cut each logical axis. Presets by name, and the logical axes of every parameter."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from dsv3_jax.config import ConfigError, Runtime
from dsv3_jax.parallel.mesh import AXES

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """For each logical axis, the mesh axes that cut it, outermost first."""

    batch: Axes = ()
    sequence: Axes = ()
    layers: Axes = ()
    """The stacked layers of one kind."""
    vocab: Axes = ()
    embed: Axes = ()
    """The model's width, or the rank projected up from, in parameters, which are put together just before use."""
    heads: Axes = ()
    ffn: Axes = ()
    """Hidden width of dense feed-forwards and shared experts."""
    experts: Axes = ()
    expert_ffn: Axes = ()
    zero: Axes = ()
    """Cuts `embed` of the optimizer's state and master weights further than that of the weights in use (ZeRO-1)."""


LOGICAL = tuple(f.name for f in dataclasses.fields(Rules))
"""Names of logical axes."""

_TENSOR: dict[str, Axes] = {"vocab": ("tensor",), "heads": ("tensor",), "ffn": ("tensor",), "expert_ffn": ("tensor",)}
_EXPERTS: Axes = ("node", "expert")

PRESETS = {
    "single": Rules(),
    "fsdp": Rules(batch=("data", "fsdp"), sequence=("context",), embed=("fsdp",), **_TENSOR),
    "fsdp_ep": Rules(
        batch=("data", "fsdp", *_EXPERTS), sequence=("context",), embed=("fsdp",), experts=_EXPERTS, **_TENSOR
    ),
    "ep_tp": Rules(batch=("data",), experts=_EXPERTS, **_TENSOR),
    "pp_ep_dp": Rules(
        batch=("data", "fsdp", *_EXPERTS),
        sequence=("context",),
        layers=("stage",),
        experts=_EXPERTS,
        zero=("stage", "data", "fsdp"),
        **_TENSOR,
    ),
}
"""`fsdp_ep` trains; `ep_tp` decodes, its tokens not cut over the experts; `pp_ep_dp` is the report's own (3.2)."""

PARAMETERS: dict[tuple[str, int], tuple[str | None, ...]] = {
    ("embed_tokens", 2): ("vocab", "embed"),
    ("lm_head", 2): ("embed", "vocab"),
    ("q_proj", 3): ("embed", "heads", None),
    ("q_a_proj", 2): ("embed", None),
    ("q_b_proj", 3): ("embed", "heads", None),
    ("kv_a_proj_with_mqa", 2): ("embed", None),
    ("k_b_proj", 3): ("embed", "heads", None),
    ("v_b_proj", 3): ("embed", "heads", None),
    ("o_proj", 3): ("heads", None, "embed"),
    ("weight", 2): ("embed", None),  # the router's
    ("gate_proj", 2): ("embed", "ffn"),
    ("up_proj", 2): ("embed", "ffn"),
    ("down_proj", 2): ("ffn", "embed"),
    ("gate_proj", 3): ("experts", "embed", "expert_ffn"),
    ("up_proj", 3): ("experts", "embed", "expert_ffn"),
    ("down_proj", 3): ("experts", "expert_ffn", "embed"),
    ("eh_proj", 2): (None, "embed"),
    ("e_score_correction_bias", 1): (None,),
    ("slot_of", 2): (None, None),
    ("copies", 1): (None,),
} | {
    (f"{of}norm", 1): (None,) for of in ("", "e", "h", "input_layer", "post_attention_layer", "q_a_layer", "kv_a_layer")
}
"""Logical axes of each parameter, by its name and number of axes; stacked ones have `layers` before them."""

STACKS = ("dense_layers", "moe_layers")


@functools.cache
def rules_of(runtime: Runtime) -> Rules:
    """The runtime's preset with its overrides. Raises ConfigError for an override that isn't `axis=mesh,axes`."""
    rules = PRESETS[runtime.sharding]
    for text in runtime.sharding_overrides:
        name, equals, axes = text.partition("=")
        cut = tuple(filter(None, axes.split(",")))
        if not equals or name not in LOGICAL or not set(cut) <= set(AXES):
            raise ConfigError(
                f"runtime.sharding_overrides has {text!r}: it must be NAME=MESH,AXES with a name of "
                f"{', '.join(LOGICAL)} and mesh axes of {', '.join(AXES)}"
            )
        rules = dataclasses.replace(rules, **{name: cut})
    return rules


def parameter_axes(path: tuple[Any, ...], rank: int) -> tuple[str | None, ...]:
    """Logical axes of the parameter at a path of a pytree: of a parameter's own, its gradient's, a moment's."""
    keys = [str(getattr(p, "key", p)) for p in path]
    stacked = any(k in STACKS for k in keys)
    axes = PARAMETERS[keys[-1], rank - stacked]
    return ("layers", *axes) if stacked else axes
