"""Grouped matmul: consecutive groups of rows, each times its own matrix; and SwiGLU experts made of it."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

__all__ = ["grouped_matmul", "grouped_swiglu"]
