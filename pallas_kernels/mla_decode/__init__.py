"""Decoding with multi-head latent attention, absorbed form, over a paged cache."""

from pallas_kernels.mla_decode.api import mla_decode
from pallas_kernels.mla_decode.cache import SplitCache, join, pack, pack_rope, quantise, split
from pallas_kernels.mla_decode.schedule import Plan, plan

__all__ = ["Plan", "SplitCache", "join", "mla_decode", "pack", "pack_rope", "plan", "quantise", "split"]
