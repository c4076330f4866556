"""Experts' weights on a CPU, read where they lie.

A loop over layers cuts each layer's weights out of their stack. On a CPU, XLA copies them: in decoding, where few
experts have tokens, more bytes than the step needs. Here the experts' stacks stay out of the loop, and a layer finds
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dsv3_jax.model.auto import experts_impl
from dsv3_jax.model.moe import LAYER, STACKS
from dsv3_jax.model.transformer import DeepSeekV3

_EXPERTS = ("moe_layers", "mlp", "experts")


def experts_in_stacks(model: DeepSeekV3, variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the variables with the same arrays, those of routed experts in `STACKS`, if that helps; else as they are.

    It helps on a CPU without a mesh, where the weights needn't be converted.
    """
    runtime, flat = model.runtime, flatten_dict(variables["params"])
    stacks = {path: array for path, array in flat.items() if path[: len(_EXPERTS)] == _EXPERTS}
    as_they_are = all(array.dtype == runtime.dtype for array in stacks.values())
    plain = runtime.precision == "dtype" and runtime.sharding == "single" and set(variables) <= {"params", "router"}
    if not stacks or not as_they_are or not plain or experts_impl(runtime) != "blocked":
        return variables
    rest = {path: array for path, array in flat.items() if path not in stacks}
    layer = {(*_EXPERTS, "layer"): jnp.arange(model.config.num_moe_layers, dtype=jnp.int32)}
    return {**variables, "params": unflatten_dict(rest), STACKS: unflatten_dict(stacks), LAYER: unflatten_dict(layer)}
