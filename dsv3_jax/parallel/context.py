"""Context parallelism: sequences sharded over devices with equal shares of the work of causal attention.

If sequences were split in order, the last device would attend to the most keys. Instead, a sequence is split in 2n
pieces for n devices, and device i gets piece i from the front and piece i from the back. The model is given the place
of each token.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.sharding import current_sharding
from dsv3_jax.runtime import Runtime


def sequence_order(length: int, runtime: Runtime) -> np.ndarray | None:
    """Returns the places (T,) int32 of a sequence's tokens, in the order in which the devices of the mesh hold them.

    None if sequences aren't sharded. Raises ConfigError if a sequence doesn't divide into twice as many pieces as
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
