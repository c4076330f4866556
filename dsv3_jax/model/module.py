"""Base class of the model's Flax modules, which declares a parameter's shape, init and logical axes together."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.sharding import Logical, current_sharding
from dsv3_jax.runtime import Runtime

LAYERS = {nn.PARTITION_NAME: "layers"}
"""The logical axis that `nn.scan` adds in front of the parameters of stacked layers."""


class Module(nn.Module):
    """A part of the model, with its config and runtime."""

    config: ModelConfig
    runtime: Runtime

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initialises the variables from a key and example inputs. Returns a pytree of arrays."""
        return nn.meta.unbox(super().init(*args, **kwargs))

    def declare(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], logical: Logical
    ) -> jax.Array:
        """Declares a parameter, stored in the runtime's `param_dtype`, and returns it as it is stored.

        Raises ValueError if `logical` doesn't have one logical axis or None for each axis of `shape`.
        """
        if len(shape) != len(logical):
            raise ValueError(f"{name} has shape {shape}, but logical axes {logical}: give one, or None, for each axis")
        boxed = lambda *args: _Declared(init(*args), logical)
        shape = current_sharding(self.runtime).part(shape, logical)
        stored: Any = self.param(name, boxed, shape, jax.numpy.dtype(self.runtime.param_dtype))
        return cast(jax.Array, stored)


def logical_axes(module: Module, *args: Any) -> dict[tuple[str, ...], Logical]:
    """Returns the logical axes of every parameter: from its path, such as ("norm",), to a name or None per axis.

    args: example inputs, as for `init`.
    """
    variables = jax.eval_shape(lambda: nn.Module.init(module, jax.random.key(0), *args))
    boxes = jax.tree_util.tree_leaves_with_path(variables, is_leaf=lambda x: isinstance(x, _Declared))
    return {keys(path[1:]): box.logical for path, box in boxes if isinstance(box, _Declared)}


def keys(path: Any) -> tuple[str, ...]:
    """Returns a path in a tree of nested dicts, as `jax.tree_util` has it, as its keys."""
    return tuple(key.key for key in path)


@struct.dataclass
class _Declared(nn.meta.AxisMetadata[Any]):
    """An initialised parameter with its logical axes, as carried through Flax's transforms."""

    value: Any
    logical: Logical = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(value=val)  # type: ignore[attr-defined]

    def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
        logical = (*self.logical[:index], params[nn.PARTITION_NAME], *self.logical[index:])
        return self.replace(logical=logical)  # type: ignore[attr-defined]

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
        return self.replace(logical=self.logical[:index] + self.logical[index + 1 :])  # type: ignore[attr-defined]
