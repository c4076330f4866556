"""Sharding rules: the mesh axes that shard each logical axis. Presets by name."""

from __future__ import annotations

import dataclasses
import functools

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.runtime import Runtime

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes that shard each logical axis, outermost first."""

    batch: Axes = ()
    sequence: Axes = ()
    layers: Axes = ()
    """The stacked layers of one kind."""
    vocab: Axes = ()
    embed: Axes = ()
    """The model's width, or the rank of an up-projection, in parameters, which are all-gathered just before use."""
    heads: Axes = ()
    ffn: Axes = ()
    """Hidden width of dense feed-forwards and shared experts."""
    experts: Axes = ()
    expert_ffn: Axes = ()
    zero: Axes = ()
    """Additional sharding of `embed` for the optimizer state and master weights (ZeRO-1)."""


LOGICAL = tuple(f.name for f in dataclasses.fields(Rules))
"""Names of logical axes."""

_TENSOR: dict[str, Axes] = {"vocab": ("tensor",), "heads": ("tensor",), "ffn": ("tensor",), "expert_ffn": ("tensor",)}
_EXPERTS: Axes = ("node", "expert")

RULES = {
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
"""`fsdp_ep` is for training, `ep_tp` for decoding (tokens are replicated over experts), `pp_ep_dp` the report's (3.2).
"""


@functools.cache
def rules_of(runtime: Runtime) -> Rules:
    """Returns the runtime's preset with its overrides. Raises ConfigError unless they are `axis=mesh,axes`."""
    rules = RULES[runtime.sharding]
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
