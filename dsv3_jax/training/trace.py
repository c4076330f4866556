"""An xprof trace of chosen steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import jax


class Trace:
    """Traces steps, counted from 1, into a directory: once, however often a run that goes back takes them.

    A `with` block ends a trace whose last step didn't come.
    """

    def __init__(self, steps: range, directory: Path) -> None:
        self._steps, self._directory = steps, directory
        self._running = self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()

    def before(self, step: int) -> None:
        """Begins if it is the first step."""
        if step in self._steps[:1] and not (self._running or self._over):
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends if it was the last step, when its results are there."""
        if self._running and step in self._steps[-1:]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running, self._over = False, True
