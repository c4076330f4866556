"""Matrix products of consecutive groups of rows, each with its own matrix."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
