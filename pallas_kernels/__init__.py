"""Kernels for latent attention and sparse experts: one folder a kernel, each beside its plain reference."""
