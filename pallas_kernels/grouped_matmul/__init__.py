"""Matrix products of consecutive groups of rows, each with its own matrix, and experts made of them."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
