"""FP8 recipes: the report's, its variants, and the implementation for the device."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError
from dsv3_jax.quantization.fp8 import ACTIVATION_FLOOR, TILE, quantise_blocks
from dsv3_jax.runtime import FP8Scales
from pallas_kernels.devices import is_hopper, platform

Implementation = Literal["emulation", "gpu"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices for an FP8 matmul.

    scales: see `Runtime.fp8_scales`.
    power_of_two: for all scales; those of the inputs of experts and of the layer after attention always are (report
      sections 3.3.2, 3.3.3).
    """

    implementation: Implementation = "emulation"
    scales: FP8Scales = "tiles"
    power_of_two: bool = False

    def __str__(self) -> str:
        by = "Hopper kernels" if self.implementation == "gpu" else "emulation"
        scales = {"tiles": "1x128 and 128x128", "block_gradients": "128x128 gradients", "tensor": "one per tensor"}
        return f"by {by}, scales {scales[self.scales]}{', powers of two' if self.power_of_two else ''}"

    def rows(self, x: jax.Array, *, gradient: bool = False, power_of_two: bool = False) -> tuple[jax.Array, jax.Array]:
        """Quantises rows (M, K) along K: values, scales (M, ceil(K / 128))."""
        return self._quantise(x, (1, TILE), gradient, power_of_two)

    def columns(
        self, x: jax.Array, *, gradient: bool = False, power_of_two: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Quantises rows (M, K) along M, for sums over them: values, scales (ceil(M / 128), K)."""
        return self._quantise(x, (TILE, 1), gradient, power_of_two)

    def _quantise(
        self, x: jax.Array, tile: tuple[int, int], gradient: bool, power_of_two: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Quantises (M, K); a scale that covers several tiles is repeated for each of them."""
        block = tile
        if self.scales == "block_gradients" and gradient:
            block = (TILE, TILE)
        if self.scales == "tensor":
            block = len(x), x.shape[1]
        # A gradient may be smaller everywhere than the released kernels' floor, which is for inference.
        floor = 0.0 if gradient else ACTIVATION_FLOOR
        values, scales = quantise_blocks(x, block, power_of_two=power_of_two or self.power_of_two, floor=floor)
        for axis in (0, 1):
            count = -(-x.shape[axis] // tile[axis])
            scales = jnp.repeat(scales, -(-block[axis] // tile[axis]), axis)[(slice(None),) * axis + (slice(count),)]
        return values, scales

    def matrices(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Quantises matrices (..., K, N) in blocks: values, scales (..., ceil(K / 128), ceil(N / 128))."""
        if self.scales != "tensor":
            return quantise_blocks(w, power_of_two=self.power_of_two)
        values, scales = quantise_blocks(w, (w.shape[-2], w.shape[-1]), power_of_two=self.power_of_two)
        return values, jnp.broadcast_to(scales, (*w.shape[:-2], *(-(-n // TILE) for n in w.shape[-2:])))


def fp8_implementation() -> Implementation:
    """Returns the implementation for the device: our kernels on Hopper, the emulation on a CPU.

    Raises ConfigError on other devices, where it would be slower than bfloat16.
    """
    if platform() == "cpu":
        return "emulation"
    if is_hopper():
        return "gpu"
    raise ConfigError(
        f"runtime.precision 'fp8' needs a Hopper GPU, or a CPU, which emulates it; on this {platform()} "
        "choose precision 'dtype'"
    )
