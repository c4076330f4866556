"""Sequences cut over devices, each with an equal share of causal attention's work.

Cut in order, the last device would have the most keys to look at. So a sequence is dealt out in 2n pieces to n
devices, a device getting piece i from the front and piece i from the back. The model is told each token's place.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.sharding import current_sharding
from dsv3_jax.runtime import Runtime


def sequence_order(length: int, runtime: Runtime) -> np.ndarray | None:
    """The places (T,) int32 of a sequence's tokens in the order in which they lie over the devices of the mesh in use.

    None where sequences aren't cut. Raises ConfigError if a sequence doesn't divide into twice as many pieces as
    devices.
    """
    sharding = current_sharding(runtime)
    devices = sharding.size("sequence")
    if devices == 1:
        return None
    if length % (2 * devices):
        axes = " x ".join(sharding.axes("sequence"))
        raise ConfigError(
            f"a sequence of {length} tokens can't be shared by {devices} devices ({axes}): "
            f"its length must be a multiple of {2 * devices}"
        )
    pieces = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    return np.concatenate([pieces[[i, 2 * devices - 1 - i]].ravel() for i in range(devices)])
