"""Causal attention whose queries and keys have a rotary part: training and prefill, with gradients."""

from pallas_kernels.mla_prefill.api import mla_prefill
from pallas_kernels.mla_prefill.residuals import RESIDUALS, residual

__all__ = ["RESIDUALS", "mla_prefill", "residual"]
