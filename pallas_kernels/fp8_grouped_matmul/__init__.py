"""Matrix products of consecutive groups of FP8 rows, each with its own FP8 matrix."""

from pallas_kernels.fp8_grouped_matmul.api import fp8_grouped_matmul

__all__ = ["fp8_grouped_matmul"]
