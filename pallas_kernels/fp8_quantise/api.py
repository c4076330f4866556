"""The public functions of quantisation: validate arguments, and choose a backend by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.devices import interpreter
from pallas_kernels.fp8_quantise import gpu, gpu_blocks, reference
from pallas_kernels.fp8_quantise.reference import ALIGNMENT, Scaling, aligned, tiles_of

__all__ = [
    "ALIGNMENT",
    "Scaling",
    "aligned",
    "fp8_quantise",
    "fp8_quantise_blocks",
    "takes",
    "takes_blocks",
    "tiles_of",
]

IMPLEMENTATIONS = ("reference", "gpu", "gpu_interpret")
TILE = reference.TILE

type Quantised = tuple[jax.Array, jax.Array]


def fp8_quantise(
    x: jax.Array,
    scales: jax.Array | None = None,
    group_sizes: jax.Array | None = None,
    *,
    rows: Scaling | None = None,
    columns: Scaling | None = None,
    implementation: str,
) -> tuple[Quantised | None, Quantised | None]:
    """Quantises a matrix in tiles along rows, along columns, or both in one pass (report section 3.3.2).

    Args:
      x: (M, K) bfloat16 or float32; or float8_e4m3fn with scales, which is dequantised first, in float32.
      scales: (M, ceil(K / 128)) float32 of 1 x 128 tiles of x, if that is FP8.
      group_sizes: (G,) int32: consecutive rows, which sum to at most M. Tiles along columns start anew for each.
      rows: how to scale tiles of 1 x 128; None: not asked for, as of FP8.
      columns: how to scale tiles of 128 x 1.
      implementation: "reference", "gpu" (Hopper, see `takes`) or "gpu_interpret" (the same on a CPU).

    Returns:
      Rows: values (M, K) float8_e4m3fn, scales (M, ceil(K / 128)) float32; or None. All rows, whatever the groups.
      Columns, transposed: values (K', M') and scales (M' / 128, K'), or None. K' is K, and M' M, filled up with zeros
      to a multiple of 128. With groups, each has `tiles_of` tiles, one group after another, and then the rows of no
      group; M' is the most that this can take, and what isn't needed of it is arbitrary. A group's first tile begins at
      the multiple of 8 rows at or before its own first, where the copy engine can; other groups' rows are zero there.

    A tile that isn't all finite gets a scale of NaN.

    Raises:
      ValueError: shapes or dtypes don't fit together or the backend, or there is no such implementation.
    """
    _check_name(implementation)
    if x.ndim != 2 or (group_sizes is not None and group_sizes.ndim != 1):
        raise ValueError(f"fp8_quantise needs rows (M, K) and groups (G,), but got {x.shape} and {group_sizes}")
    expected = (len(x), -(-x.shape[1] // TILE))
    if (x.dtype == jnp.float8_e4m3fn) != (scales is not None) or (scales is not None and scales.shape != expected):
        given = None if scales is None else scales.shape
        raise ValueError(f"fp8_quantise needs scales {expected} of float8_e4m3fn alone, but got {x.dtype}, {given}")
    if rows and scales is not None:
        raise ValueError("fp8_quantise doesn't quantise rows again that are in FP8")
    if implementation == "reference":
        return reference.fp8_quantise(x, scales, group_sizes, rows, columns)
    if not takes(x):
        raise ValueError(
            f"fp8_quantise on Hopper takes bfloat16, float32 or float8_e4m3fn in a multiple of {gpu.HALF} columns, "
            f"but got {x.dtype}, {x.shape}"
        )
    interpret = interpreter("fp8_quantise", implementation, gpu.INTERPRET)
    out: tuple[Quantised | None, Quantised | None] = gpu.fp8_quantise(
        x, scales, group_sizes, rows, columns, interpret=interpret
    )
    return out


def fp8_quantise_blocks(w: jax.Array, how: Scaling, *, implementation: str) -> tuple[Quantised, Quantised]:
    """Quantises matrices in blocks of 128 x 128, as they are and transposed, in one pass (report section 3.3.2).

    Args:
      w: (G, K, N) bfloat16 or float32.
      how: how to scale a block.
      implementation: "reference", "gpu" (Hopper, see `takes_blocks`) or "gpu_interpret" (the same on a CPU).

    Returns:
      As they are: values (G, K, N) float8_e4m3fn, scales (G, ceil(K / 128), ceil(N / 128)) float32.
      Transposed: the same numbers, values (G, N, K), scales (G, ceil(N / 128), ceil(K / 128)).

    A block that isn't all finite gets a scale of NaN.

    Raises:
      ValueError: the shape or dtype doesn't fit or the backend doesn't take it, or there is no such implementation.
    """
    _check_name(implementation)
    if w.ndim != 3:
        raise ValueError(f"fp8_quantise_blocks needs matrices (G, K, N), but got {w.shape}")
    if implementation == "reference":
        return reference.fp8_quantise_blocks(w, how)
    if not takes_blocks(w):
        raise ValueError(
            f"fp8_quantise_blocks on Hopper takes bfloat16 or float32 whose K and N are multiples of {gpu.HALF}, "
            f"but got {w.dtype}, {w.shape}"
        )
    interpret = interpreter("fp8_quantise_blocks", implementation, gpu.INTERPRET)
    out: tuple[Quantised, Quantised] = gpu_blocks.fp8_quantise_blocks(w, how, interpret=interpret)
    return out


def _check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no FP8 quantisation {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")


def takes(x: jax.Array) -> bool:
    """Whether "gpu" takes this matrix: its dtype, and the number of its columns."""
    return x.dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn) and x.shape[1] % gpu.HALF == 0


def takes_blocks(w: jax.Array) -> bool:
    """Whether "gpu" takes these matrices: their dtype, and the lengths of both axes."""
    return w.dtype in (jnp.bfloat16, jnp.float32) and w.shape[-2] % gpu.HALF == w.shape[-1] % gpu.HALF == 0
