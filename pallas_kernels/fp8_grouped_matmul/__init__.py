"""Grouped matmul in FP8: consecutive groups of rows, each times its own matrix; and the gradient of the matrices."""

from pallas_kernels.fp8_grouped_matmul.api import fp8_grouped_matmul, fp8_grouped_swiglu, fp8_grouped_weight_gradient

__all__ = ["fp8_grouped_matmul", "fp8_grouped_swiglu", "fp8_grouped_weight_gradient"]
