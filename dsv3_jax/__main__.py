"""`python -m dsv3_jax COMMAND`."""

import os
import sys

from dsv3_jax.cli import main

try:
    main()
except SystemExit as stop:
    if stop.code:
        # At once: threads of a failed write would print their tracebacks after the line that says what happened.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    raise
