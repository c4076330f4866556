"""Matrix products of consecutive groups of FP8 rows, each with its own FP8 matrix, and their gradients."""

from pallas_kernels.fp8_grouped_matmul.api import fp8_grouped_matmul, fp8_grouped_weight_gradient

__all__ = ["fp8_grouped_matmul", "fp8_grouped_weight_gradient"]
