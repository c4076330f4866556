"""Estimates of memory, step time and cost, for training and serving: `python -m dsv3_jax plan` and `info`.

`memory`, `communication` and `step_time` model a training step, `serving` a decoding step, `cost` the price.
`aot` compiles the real step for a TPU topology instead, and `published` compares the estimates with measurements.
"""
