"""Normalises, rotates and writes new tokens into a paged latent cache."""

from pallas_kernels.cache_update.api import cache_update

__all__ = ["cache_update"]
