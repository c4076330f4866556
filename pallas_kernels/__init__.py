"""Pallas kernels for latent attention and sparse experts, independent of `dsv3_jax`.

One folder per kernel: `api.py` has the signature, `reference.py` the same function in plain `jnp`, `gpu.py` and
`tpu.py` the kernels, and `README.md` the design.
"""
