"""The public functions of grouped matmul and of experts made of it: choose an implementation by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from pallas_kernels.devices import require_hopper, require_tpu
from pallas_kernels.grouped_matmul import cpu, gpu, library, reference

IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "reference": reference.grouped_matmul,
    "ragged": jax.lax.ragged_dot,
    "blocked": cpu.grouped_matmul,
    "gpu": gpu.grouped_matmul,
    "tokamax": library.tpu,
}


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, implementation: str) -> jax.Array:
    """Multiplies consecutive groups of rows, each with its own matrix. Differentiable in `lhs` and `rhs`.

    Args:
      lhs: (M, K) rows, sorted by group.
      rhs: (G, K, N), one matrix per group, of the dtype of `lhs`.
      group_sizes: (G,) int32, rows of each group; they sum to at most M.
      implementation: "reference" (plain, G times the work), "ragged" (`jax.lax.ragged_dot`), "blocked" (CPUs), "gpu"
        (our kernels for Hopper, bfloat16: one for many rows, and one for few rows, bound by reading the matrices; K and
        N are padded to multiples of 64, which copies the matrices) or "tokamax" (TPUs, bfloat16).

    Returns:
      (M, N) of the dtype of `lhs`. Rows after the last group are zero.

    Raises:
      ValueError: shapes or dtypes are inconsistent or unsupported, or there is no such implementation.
    """
    _check(lhs, rhs, group_sizes, implementation)
    if implementation == "gpu":
        require_hopper("grouped_matmul")
    if implementation == "tokamax":  # on Hopper its gradient of the matrices was wrong: see README.md
        require_tpu("grouped_matmul by tokamax")
    return IMPLEMENTATIONS[implementation](lhs, rhs, group_sizes)


def _check(
    lhs: jax.Array | jax.ShapeDtypeStruct,
    rhs: jax.Array | jax.ShapeDtypeStruct,
    group_sizes: jax.Array,
    implementation: str,
) -> None:
    """Raises ValueError as `grouped_matmul`, except for errors specific to a backend."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no grouped matmul {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"grouped matmul needs (M, K), (G, K, N) and (G,), but got {lhs.shape}, {rhs.shape} and {group_sizes.shape}"
        )
    if lhs.dtype != rhs.dtype:
        raise ValueError(f"grouped matmul needs one dtype, but got {lhs.dtype} rows and {rhs.dtype} matrices")


def grouped_swiglu(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    factors: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str,
    keep: Callable[[jax.Array], jax.Array] = lambda a: a,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Applies experts to groups of rows: factor * down(silu(gate(x)) * up(x)) with the three matrices of each group.

    Factors are applied before `down`, where their gradient doesn't need its result; with few rows on a GPU after it.

    Args:
      x: (M, D) rows, sorted by group. gate, up: (G, D, F). down: (G, F, D). factors: (M, 1), float32 or wider.
      group_sizes: as in `grouped_matmul`.
      implementation: as in `grouped_matmul`. "blocked" is one loop, "gpu" with few rows two
        kernels (gate, up and SwiGLU in one), the others three grouped matmuls.
      keep: applied to the outputs of gate and up, (M, F) each, if they are separate arrays, to name them for a
        rematerialisation policy.
      first: () int32, with "blocked": the first group's matrices, where there are those of more groups than sizes.

    Returns:
      (M, D) of the dtype of `x`. Rows after the last group are zero. Raises as `grouped_matmul`.
    """
    hidden = jax.ShapeDtypeStruct((len(x), gate.shape[-1]), x.dtype)
    for rows, matrices in ((x, gate), (x, up), (hidden, down)):
        groups = len(matrices) if isinstance(first, int) else len(group_sizes)
        of_groups = jax.ShapeDtypeStruct((groups, *matrices.shape[1:]), matrices.dtype)
        _check(rows, of_groups, group_sizes, implementation)
    if factors.shape != (len(x), 1):
        raise ValueError(f"grouped_swiglu needs factors ({len(x)}, 1), but got {factors.shape}")
    if implementation == "blocked":
        return cpu.grouped_swiglu(x, gate, up, down, factors, group_sizes, first)
    if implementation == "gpu" and gpu.few(len(x), len(gate)):
        require_hopper("grouped_matmul")
        return (gpu.grouped_swiglu(x, gate, up, down, group_sizes) * factors).astype(x.dtype)
    product = functools.partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation)
    return product(reference.swiglu(keep(product(x, gate)), keep(product(x, up)), factors), down)
