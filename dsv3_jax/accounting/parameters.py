"""Parameter counts of a configuration, taken from the model's own abstract variables: no array is created.

There is no separate formula: `jax.eval_shape` runs the real `init`, and the functions here group its arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import init_cache
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class Variable:
    """One array of the model. path: its names below the collection, e.g. ("moe_layers", "mlp", "gate", "weight")."""

    collection: str
    path: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_mtp(self) -> bool:
        """Whether the array belongs to a multi-token prediction module, which inference can drop."""
        return self.path[0].startswith("mtp_")

    @property
    def is_routed(self) -> bool:
        """Whether the array holds routed experts, of which a token uses only its own."""
        return "experts" in self.path

    @property
    def is_norm(self) -> bool:
        return self.path[-1].endswith("norm")


@dataclasses.dataclass(frozen=True)
class Component:
    """A row of the table: all parameters, and those that one token uses."""

    name: str
    total: int
    activated: int


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameter counts of one configuration.

    total, activated: the main model, embedding included. mtp_total, mtp_activated: of the MTP modules alone, which
    share embedding and head with the main model. components, mtp_components: the same by component.
    """

    total: int
    activated: int
    mtp_total: int
    mtp_activated: int
    components: tuple[Component, ...]
    mtp_components: tuple[Component, ...]


@functools.cache
def model_variables(config: ModelConfig) -> tuple[Variable, ...]:
    """Lists every array of the model, from its abstract initialisation."""
    # The key is made inside too: outside, it would start the accelerator.
    tree = jax.eval_shape(lambda: DeepSeekV3(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    paths = ((tuple(str(k.key) for k in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
    return tuple(Variable(names[0], names[1:], tuple(leaf.shape)) for names, leaf in paths)


def activated(variable: Variable, config: ModelConfig) -> int:
    """Parameters of `variable` that one token uses: K of E routed experts, else all; the embedding counts in full."""
    if not variable.is_routed:
        return variable.size
    return variable.size * config.num_experts_per_tok // config.n_routed_experts


@functools.cache
def count_parameters(config: ModelConfig) -> Parameters:
    """Counts the parameters of `config`: total, and activated per token (report section 4.2)."""
    main = tuple(variable for variable in model_variables(config) if not variable.is_mtp)
    mtp = tuple(variable for variable in model_variables(config) if variable.is_mtp)

    def count(group: tuple[Variable, ...]) -> tuple[int, int]:
        return sum(variable.size for variable in group), sum(activated(variable, config) for variable in group)

    return Parameters(*count(main), *count(mtp), _table(main, config), _table(mtp, config))


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bfloat16") -> int:
    """Bytes of latent cache per token of one sequence, summed over layers."""
    runtime = Runtime(dtype=dtype)  # type: ignore[arg-type]

    def size(length: int) -> int:
        cache = jax.eval_shape(lambda: init_cache(config, runtime, 1, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    return size(2) - size(1)


def component(variable: Variable) -> str:
    """Returns the row of the table that `variable` belongs to."""
    path, last = variable.path, variable.path[-1]
    if last in ("embed_tokens", "lm_head", "eh_proj"):
        return {"embed_tokens": "embedding", "lm_head": "output head", "eh_proj": "MTP projection"}[last]
    if "self_attn" in path:
        if last.startswith("q_"):
            return "attention: queries"
        if last.startswith("kv_a"):
            return "attention: latent"
        return "attention: output" if last == "o_proj" else "attention: key and value up-projections"
    if variable.is_norm:
        return "norms"
    if "gate" in path:
        return "router: gate" if last == "weight" else "router: bias"
    if variable.is_routed:
        return "routed experts"
    return "shared experts" if "shared_experts" in path else "dense feed-forward"


_ORDER = (
    "embedding",
    "MTP projection",
    "attention: queries",
    "attention: latent",
    "attention: key and value up-projections",
    "attention: output",
    "dense feed-forward",
    "routed experts",
    "shared experts",
    "router: gate",
    "router: bias",
    "norms",
    "output head",
)


def _table(group: tuple[Variable, ...], config: ModelConfig) -> tuple[Component, ...]:
    rows = []
    for name in _ORDER:
        members = [variable for variable in group if component(variable) == name]
        if members:
            used = sum(activated(variable, config) for variable in members)
            rows.append(Component(name, sum(variable.size for variable in members), used))
    return tuple(rows)
