"""`python -m dsv3_jax COMMAND`."""

from dsv3_jax.cli import main

if __name__ == "__main__":
    main()
