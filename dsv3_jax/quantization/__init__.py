"""FP8: tiles and blocks, and the layers that multiply in them.

`fp8` quantises, `emulation` multiplies in plain `jnp`, `recipe` holds the choices, `products` picks the implementation
for the device, and `matmul` builds the layers, forward and backward.
"""

from dsv3_jax.quantization.fp8 import (
    FP8_MAX,
    dequantise_blocks,
    dequantise_tiles,
    quantise_blocks,
    quantise_tiles,
)

__all__ = ["FP8_MAX", "dequantise_blocks", "dequantise_tiles", "quantise_blocks", "quantise_tiles"]
