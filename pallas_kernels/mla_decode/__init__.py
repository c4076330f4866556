"""Decoding with multi-head latent attention over a paged cache."""

from pallas_kernels.mla_decode.api import mla_decode
from pallas_kernels.mla_decode.schedule import Plan, plan
from pallas_kernels.mla_decode.tpu import PackedCache, pack, unpack

__all__ = ["PackedCache", "Plan", "mla_decode", "pack", "plan", "unpack"]
