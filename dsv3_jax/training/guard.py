"""Reasons to stop a run: numbers that aren't finite, and signals."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.training.step import TrainState


class TrainingError(RuntimeError):
    """Training can't go on: the message says why, and what is saved."""


def all_finite(state: TrainState) -> jax.Array:
    """For each floating-point array of a state, whether all of its numbers are finite."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in _floats(state).values()])


def name_not_finite(state: TrainState, finite: Any) -> str:
    """Names the arrays of a state that `finite`, the result of `all_finite`, tells of; empty if none."""
    names = [name for name, good in zip(_floats(state), np.asarray(finite), strict=True) if not good]
    more = f" and {len(names) - 1} more arrays" if len(names) > 1 else ""
    return f"{names[0]}{more} of the state isn't finite" if names else ""


def _floats(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state that hold floats, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): x for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second acts as ever.

    Yields a function that tells whether one came.
    """
    asked: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: Any) -> None:
        asked.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    try:
        for s in before:
            signal.signal(s, ask)
    except ValueError:  # not in the main thread, where Python lets nobody set handlers
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
