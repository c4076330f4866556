"""The public functions of FP8 grouped matmul and its gradient: validate arguments, and choose a backend by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.devices import interpreter, require_tpu
from pallas_kernels.fp8_grouped_matmul import gpu, gpu_few_rows, gpu_weight_gradient, library, reference

IMPLEMENTATIONS = ("reference", "gpu", "gpu_interpret", "tokamax")
GRADIENT_IMPLEMENTATIONS = ("reference", "gpu", "gpu_interpret")
BLOCK = reference.BLOCK


def fp8_grouped_matmul(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    rhs: jax.Array,
    rhs_scales: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Multiplies consecutive groups of E4M3 rows, each with its own E4M3 matrix (report section 3.3.2).

    Args:
      lhs: (M, K) float8_e4m3fn rows, sorted by group. K is a multiple of 128.
      lhs_scales: (M, K / 128) float32: scale of each tile of 1 x 128 elements.
      rhs: (G, N, K) float8_e4m3fn, one matrix per group, transposed, since the matrix units require both operands
        contiguous along K. N is a multiple of 64.
      rhs_scales: (G, ceil(N / 128), K / 128) float32: scale of each block of 128 x 128.
      group_sizes: (G,) int32, rows of each group; they sum to at most M.
      implementation: "reference" (plain, G times the work), "gpu" (Hopper: one form for many rows, where N is filled up
        to a multiple of 128, and one for few, bound by reading the matrices, see `gpu.few`), "gpu_interpret" (the same
        on a CPU) or "tokamax" (TPUs: rows and matrices are scaled, rounded to bfloat16, and multiplied; N is a multiple
        of 128).

    Returns:
      (M, N) bfloat16, accumulated in float32; for "gpu", across tiles of 128. Rows after the last group are zero.

    The gradient of the rows is another call: the cotangent's rows, quantised along N, and the matrices (G, K, N) with
    transposed scales.

    Raises:
      ValueError: shapes or dtypes don't fit together or the backend, or there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"no FP8 grouped matmul {implementation!r}: there are {', '.join(IMPLEMENTATIONS)}")
    shapes = lhs.shape, lhs_scales.shape, rhs.shape, rhs_scales.shape, group_sizes.shape
    if [len(s) for s in shapes] != [2, 2, 3, 3, 1]:
        raise ValueError(f"fp8_grouped_matmul needs arrays of 2, 2, 3, 3 and 1 axes, but got {shapes}")
    (rows, depth), (groups, columns) = lhs.shape, rhs.shape[:2]
    if depth % BLOCK or columns % (BLOCK // 2):
        raise ValueError(
            f"fp8_grouped_matmul needs K to be a multiple of {BLOCK} and N of {BLOCK // 2}, "
            f"but got {depth} and {columns}"
        )
    expected = (
        lhs.shape,
        (rows, depth // BLOCK),
        (groups, columns, depth),
        (groups, -(-columns // BLOCK), depth // BLOCK),
        (groups,),
    )
    if shapes != expected:
        raise ValueError(f"fp8_grouped_matmul needs shapes {expected}, but got {shapes}")
    if lhs.dtype != jnp.float8_e4m3fn or rhs.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"fp8_grouped_matmul takes float8_e4m3fn, but got {lhs.dtype} and {rhs.dtype}")
    if implementation == "reference":
        return reference.fp8_grouped_matmul(lhs, lhs_scales, rhs, rhs_scales, group_sizes)
    if lhs_scales.dtype != jnp.float32 or rhs_scales.dtype != jnp.float32:
        raise ValueError(f"scales must be float32, but are {lhs_scales.dtype} and {rhs_scales.dtype}")
    if implementation == "tokamax":
        require_tpu("fp8_grouped_matmul by tokamax")
        return library.tokamax(lhs, lhs_scales, rhs, rhs_scales, group_sizes)
    interpret = interpreter("fp8_grouped_matmul", implementation, gpu.INTERPRET)
    form = gpu_few_rows.product if gpu.few(rows, groups) else gpu.fp8_grouped_matmul
    out: jax.Array = form(lhs, lhs_scales, rhs, rhs_scales, group_sizes, interpret=interpret)
    return out


def fp8_grouped_swiglu(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    gate: gpu_few_rows.Matrices,
    up: gpu_few_rows.Matrices,
    group_sizes: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Computes silu(x gate) * (x up) of consecutive groups of rows: (M, N) bfloat16.

    Both products stay in float32, and the result alone is rounded, by "reference" and, in one pass, by "gpu" for few
    rows. Otherwise they are two calls of `fp8_grouped_matmul`, which rounds each to bfloat16.

    Args: as in `fp8_grouped_matmul`; gate and up are values and scales, of one shape.

    Raises ValueError as `fp8_grouped_matmul`.
    """
    product = functools.partial(fp8_grouped_matmul, lhs, lhs_scales, implementation=implementation)
    forms = [jax.eval_shape(product, *of, group_sizes) for of in (gate, up)]
    if implementation == "reference":
        return reference.fp8_grouped_swiglu(lhs, lhs_scales, gate, up, group_sizes)
    if implementation in ("gpu", "gpu_interpret") and forms[0] == forms[1] and gpu.few(len(lhs), len(group_sizes)):
        interpret = interpreter("fp8_grouped_swiglu", implementation, gpu.INTERPRET)
        out: jax.Array = gpu_few_rows.swiglu(lhs, lhs_scales, gate, up, group_sizes, interpret=interpret)
        return out
    g, u = (product(*of, group_sizes).astype(jnp.float32) for of in (gate, up))
    return (jax.nn.silu(g) * u).astype(jnp.bfloat16)


def fp8_grouped_weight_gradient(
    lhs: jax.Array,
    lhs_scales: jax.Array,
    dout: jax.Array,
    dout_scales: jax.Array,
    group_steps: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Computes the gradient of each group's matrix: its transposed rows times the cotangents of the result.

    Args:
      lhs: (K, M) float8_e4m3fn, transposed rows, contiguous along the contracted axis. K and M are multiples of 128,
        and each group begins at a multiple of 128.
      lhs_scales: (M / 128, K) float32: scale of each tile of 128 rows x 1.
      dout: (N, M), dout_scales: (M / 128, N): likewise for the cotangents.
      group_steps: (G,) int32, rows of each group in units of 128; they sum to at most M / 128.
      implementation: "reference", "gpu" (Hopper) or "gpu_interpret" (the same on a CPU).

    Returns:
      (G, K, N) float32, zero for groups without rows.

    Raises:
      ValueError: shapes or dtypes don't fit together or the backend, or there is no such implementation.
    """
    if implementation not in GRADIENT_IMPLEMENTATIONS:
        raise ValueError(f"no gradient {implementation!r}: there are {', '.join(GRADIENT_IMPLEMENTATIONS)}")
    shapes = lhs.shape, lhs_scales.shape, dout.shape, dout_scales.shape, group_steps.shape
    if [len(s) for s in shapes] != [2, 2, 2, 2, 1]:
        raise ValueError(f"fp8_grouped_weight_gradient needs arrays of 2, 2, 2, 2 and 1 axes, but got {shapes}")
    (depth, rows), columns = lhs.shape, len(dout)
    if depth % BLOCK or rows % BLOCK or columns % BLOCK:
        raise ValueError(
            f"fp8_grouped_weight_gradient needs K, M and N to be multiples of {BLOCK}, "
            f"but got {depth}, {rows} and {columns}"
        )
    steps = rows // BLOCK
    expected = lhs.shape, (steps, depth), (columns, rows), (steps, columns), group_steps.shape
    if shapes != expected:
        raise ValueError(f"fp8_grouped_weight_gradient needs shapes {expected}, but got {shapes}")
    if lhs.dtype != jnp.float8_e4m3fn or dout.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"fp8_grouped_weight_gradient takes float8_e4m3fn, but got {lhs.dtype} and {dout.dtype}")
    if implementation == "reference":
        return reference.weight_gradient(lhs, lhs_scales, dout, dout_scales, group_steps)
    interpret = interpreter("fp8_grouped_weight_gradient", implementation, gpu.INTERPRET)
    out: jax.Array = gpu_weight_gradient.weight_gradient(
        lhs, lhs_scales, dout, dout_scales, group_steps, interpret=interpret
    )
    return out
