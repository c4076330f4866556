"""Pallas kernels for latent attention and sparse experts, independent of `dsv3_jax`.

One folder per kernel: `api.py` has the signature, `reference.py` the same function in plain `jnp`, `gpu.py` and
`tpu.py` the kernels, and `README.md` the design.

Letters of shapes: B sequences, T new tokens, S keys, H heads, R latent rank, and the widths of heads: N without
rotation, P rotary, V of values. In grouped matmul: G groups, M rows, K contracted and N output widths, D and F those of
experts.
"""
