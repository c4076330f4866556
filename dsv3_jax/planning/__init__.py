"""Memory, time and cost of training or serving a configuration, before it runs: `python -m dsv3_jax plan`."""
