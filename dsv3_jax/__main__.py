"""`python -m dsv3_jax COMMAND`."""

from dsv3_jax.cli import process

process()
