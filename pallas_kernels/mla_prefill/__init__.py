"""Causal attention whose queries and keys have a rotary part: training and prefill, with gradients."""

from pallas_kernels.mla_prefill.api import mla_prefill

__all__ = ["mla_prefill"]
