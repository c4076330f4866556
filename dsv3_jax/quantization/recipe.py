"""FP8 recipes: the report's, its variants, and the implementation for the device."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import jax
import jax.numpy as jnp

from dsv3_jax.config import ConfigError
from dsv3_jax.quantization.fp8 import ACTIVATION_FLOOR, TILE, dequantise_tiles, quantise_blocks
from dsv3_jax.runtime import FP8AttentionOutput, FP8Scales
from pallas_kernels.devices import is_hopper, platform
from pallas_kernels.fp8_quantise import Scaling, aligned, fp8_quantise, fp8_quantise_blocks, takes, takes_blocks

Implementation = Literal["emulation", "gpu"]

type Quantised = tuple[jax.Array, jax.Array]
"""E4M3 values and their float32 scales."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices for an FP8 matmul.

    scales: see `Runtime.fp8_scales`.
    power_of_two: for all scales; those of the inputs of experts and of the layer after attention always are (report
      sections 3.3.2, 3.3.3).
    attention_output: see `Runtime.fp8_attention_output`.
    """

    implementation: Implementation = "emulation"
    scales: FP8Scales = "tiles"
    power_of_two: bool = False
    attention_output: FP8AttentionOutput = "e4m3"

    def __str__(self) -> str:
        by = "Hopper kernels" if self.implementation == "gpu" else "emulation"
        scales = {"tiles": "1x128 and 128x128", "block_gradients": "128x128 gradients", "tensor": "one per tensor"}
        power_of_two = ", powers of two" if self.power_of_two else ""
        saved = ", attention's output saved in E5M6" if self.attention_output == "e5m6" else ""
        return f"by {by}, scales {scales[self.scales]}{power_of_two}{saved}"

    def rows(self, x: jax.Array, *, gradient: bool = False, power_of_two: bool = False) -> Quantised:
        """Quantises rows (M, K) along K: values (M, K), scales (M, ceil(K / 128))."""
        rows, _ = self._quantise(x, None, gradient, power_of_two, rows=True)
        return cast(Quantised, rows)

    def columns(
        self,
        x: jax.Array | Quantised,
        group_sizes: jax.Array | None = None,
        *,
        gradient: bool = False,
        power_of_two: bool = False,
    ) -> Quantised:
        """Quantises rows (M, K), or what `rows` returned, along M, for sums over M: transposed.

        Returns values (K', M'), scales (M' / 128, K'), as `fp8_quantise`: tiles start anew for each group, so that the
        scales of a group don't depend on other rows.
        """
        _, columns = self._quantise(x, group_sizes, gradient, power_of_two, columns=True)
        return cast(Quantised, columns)

    def rows_and_columns(
        self, x: jax.Array, group_sizes: jax.Array | None = None, *, gradient: bool = False
    ) -> tuple[Quantised, Quantised]:
        """`rows` and `columns` in one pass."""
        rows, columns = self._quantise(x, group_sizes, gradient, False, rows=True, columns=True)
        return cast(Quantised, rows), cast(Quantised, columns)

    def _quantise(
        self,
        x: jax.Array | Quantised,
        group_sizes: jax.Array | None,
        gradient: bool,
        power_of_two: bool,
        *,
        rows: bool = False,
        columns: bool = False,
    ) -> tuple[Quantised | None, Quantised | None]:
        # A gradient may be smaller everywhere than the released kernels' floor, which is for inference.
        how = Scaling(0.0 if gradient else ACTIVATION_FLOOR, power_of_two or self.power_of_two)
        values, scales = x if isinstance(x, tuple) else (x, None)
        if self.scales == "tiles" or (self.scales == "block_gradients" and not gradient):
            kernel = self.implementation == "gpu" and takes(values)
            forms = how if rows else None, how if columns else None
            by = "gpu" if kernel else "reference"
            return fp8_quantise(values, scales, group_sizes, rows=forms[0], columns=forms[1], implementation=by)
        wide = values if scales is None else dequantise_tiles(values, scales)
        return (
            self._coarse(wide, how, (1, TILE)) if rows else None,
            _turned(self._coarse(aligned(wide, group_sizes), how, (TILE, 1))) if columns else None,
        )

    def _coarse(self, x: jax.Array, how: Scaling, tile: tuple[int, int]) -> Quantised:
        """Quantises (M, K) in blocks, or as a whole; a scale that covers several tiles is repeated for each of them."""
        block = (len(x), x.shape[1]) if self.scales == "tensor" else (TILE, TILE)
        values, scales = quantise_blocks(x, block, power_of_two=how.power_of_two, floor=how.floor)
        for axis in (0, 1):
            count = -(-x.shape[axis] // tile[axis])
            scales = jnp.repeat(scales, -(-block[axis] // tile[axis]), axis)[(slice(None),) * axis + (slice(count),)]
        return values, scales

    def matrices(self, w: jax.Array) -> Quantised:
        """Quantises matrices (..., K, N) in blocks: values, scales (..., ceil(K / 128), ceil(N / 128))."""
        if self.scales != "tensor":
            return quantise_blocks(w, power_of_two=self.power_of_two)
        values, scales = quantise_blocks(w, (w.shape[-2], w.shape[-1]), power_of_two=self.power_of_two)
        return values, jnp.broadcast_to(scales, (*w.shape[:-2], *(-(-n // TILE) for n in w.shape[-2:])))

    def matrices_and_turned(self, w: jax.Array) -> tuple[Quantised, Quantised | None]:
        """`matrices`, and where kernels multiply the same transposed, (..., N, K), which Fprop takes, in one pass.

        Not on a mesh, over which XLA can't partition kernels.
        """
        if self.implementation != "gpu" or self.scales == "tensor" or not takes_blocks(w):
            return self.matrices(w), None
        flat = w.reshape(-1, *w.shape[-2:])
        both = fp8_quantise_blocks(flat, Scaling(0.0, self.power_of_two), implementation="gpu")
        of_w, turned = jax.tree.map(lambda a: a.reshape(*w.shape[:-2], *a.shape[1:]), both)
        return of_w, turned


def _turned(columns: Quantised) -> Quantised:
    return columns[0].T, columns[1]


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
