"""FP8: tiles and blocks, and layers that multiply in them.

`fp8` has the numbers, `emulation` the products in plain jnp, `recipe` what varies, `products` the recipe's products by
the device's implementation, `matmul` the layers made of them, forward and backward.
"""

from dsv3_jax.quantization.fp8 import (
    FP8_MAX,
    dequantise_blocks,
    dequantise_tiles,
    quantise_blocks,
    quantise_tiles,
)

__all__ = ["FP8_MAX", "dequantise_blocks", "dequantise_tiles", "quantise_blocks", "quantise_tiles"]
