"""Guards: skipping steps, rolling back and stopping, as decided from metrics and signals."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import functools
import math
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.training.step import TrainState

_LAG = 2
"""Number of recent steps whose metrics aren't read yet, so that the device never waits for the host."""

_WINDOW = 64
"""Number of losses that a new one is compared with."""

_LEAST = 16
"""Minimum number of losses for a comparison."""


class TrainingError(RuntimeError):
    """Training can't continue. The message says why, and what has been saved."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a run skips steps, rolls back, warns or stops by itself."""

    max_skipped: int = 5
    """Stop after this many steps in a row were skipped because their loss or gradient isn't finite."""
    spike_deviations: float = 10.0
    """A loss is a spike if it is this many standard deviations (estimated by the median deviation, at least 1% of the
    loss) above the median of the last 64; 0 for never.
    """
    spike_steps: int = 3
    """Number of spikes in a row after which the run warns or rolls back."""
    rollback: bool = False
    """Whether to roll back to the newest checkpoint before the spike, and continue with the data after it."""
    max_rollbacks: int = 3
    """Number of rollbacks after which the next spike stops the run."""
    collapse_share: float = 0.5
    """Warn if the busiest expert of a layer gets this fraction of the tokens, and three times the mean, for 50 steps
    after the warm-up; 0 for never.
    """
    hang_seconds: float = 1800
    """Stop the process, printing the stacks of its threads to standard error, if a step takes longer; 0 for never."""

    def __post_init__(self) -> None:
        for name in ("max_skipped", "spike_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"guard.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("spike_deviations", "max_rollbacks", "collapse_share", "hang_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"guard.{name} is {getattr(self, name)}: it must be 0 or a positive number")


class Guard:
    """Evaluates the metrics of each step in order, some steps later. All processes of a job see the same metrics.

    skipped: steps skipped so far. skipped_in_a_row, spikes_in_a_row: up to the last evaluated step.
    rollbacks: number of rollbacks.
    """

    def __init__(
        self, config: GuardConfig, experts_per_token: float, warn: Callable[[int, str], None], warmup_steps: int = 0
    ) -> None:
        """experts_per_token: K / E, the share of the tokens that an expert gets on average. warn: of a step, a line.

        warmup_steps: steps whose load isn't judged, since it is uneven until the biases have found their place.
        """
        self._config, self._share, self._warn, self._warmup = config, experts_per_token, warn, warmup_steps
        self._waiting: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._collapsed: collections.Counter[str] = collections.Counter()
        self.skipped = self.skipped_in_a_row = self.spikes_in_a_row = self.rollbacks = 0

    def watch(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, and evaluates those of earlier steps."""
        self._waiting.append((step, metrics))
        while len(self._waiting) > _LAG:
            self._judge(*self._waiting.popleft())

    def settle(self) -> None:
        """Evaluates all remaining steps, waiting for the last one."""
        while self._waiting:
            self._judge(*self._waiting.popleft())

    @property
    def well(self) -> bool:
        """Whether the last evaluated step was neither skipped nor a spike."""
        return not self.skipped_in_a_row and not self.spikes_in_a_row

    @property
    def stuck(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.skipped_in_a_row >= self._config.max_skipped

    @property
    def off_course(self) -> bool:
        """Whether to roll back."""
        return self._config.rollback and self.spikes_in_a_row >= self._config.spike_steps

    def rolled_back(self) -> None:
        """Discards everything after the checkpoint."""
        self._waiting.clear()
        self._collapsed.clear()
        self.skipped_in_a_row = self.spikes_in_a_row = 0
        self.rollbacks += 1

    def state(self) -> dict[str, Any]:
        """Returns the state, JSON-serialisable, such that a restored run behaves like an uninterrupted one."""
        return {
            "losses": list(self._losses),
            "collapsed": dict(self._collapsed),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores `state`. Missing entries keep their initial values."""
        self._losses.extend(state.get("losses", ()))
        self._collapsed.update(state.get("collapsed", {}))
        for name in _COUNTS:
            setattr(self, name, state.get(name, 0))

    def _judge(self, step: int, metrics: Mapping[str, Any]) -> None:
        if float(metrics.get("skipped", 0)):
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == 1:
                self._warn(step, "its loss or gradient isn't finite: skipped, the parameters stay as they are")
            return
        self.skipped_in_a_row = 0
        if "loss" in metrics:
            self._judge_loss(step, float(metrics["loss"]))
        if self._config.collapse_share and step > self._warmup:
            self._judge_load(step, metrics)

    def _judge_loss(self, step: int, loss: float) -> None:
        if self._config.spike_deviations and len(self._losses) >= _LEAST:
            middle = statistics.median(self._losses)
            deviation = max(1.4826 * statistics.median(abs(x - middle) for x in self._losses), 0.01 * abs(middle))
            if loss > middle + self._config.spike_deviations * deviation:
                self.spikes_in_a_row += 1
                if self.spikes_in_a_row == self._config.spike_steps:
                    self._warn(
                        step,
                        f"the loss has been spiking for {self.spikes_in_a_row} steps: {loss:.3f}, before {middle:.3f}",
                    )
                if self.spikes_in_a_row < _WINDOW:
                    return
                self._losses.clear()  # it has stayed there: what was above the usual is the usual now
        self.spikes_in_a_row = 0
        self._losses.append(loss)

    def _judge_load(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if not name.startswith("load_violation/"):
                continue
            for layer, violation in enumerate(np.atleast_1d(np.asarray(value))):
                where = f"{name.removeprefix('load_violation/')}/{layer}"
                if violation < 2 or (violation + 1) * self._share < self._config.collapse_share:
                    self._collapsed.pop(where, None)
                    continue
                self._collapsed[where] += 1
                if self._collapsed[where] == _COLLAPSE_STEPS:
                    share = (violation + 1) * self._share
                    self._warn(step, f"experts collapse: one expert of layer {where} gets {share:.0%} of the tokens")


_COUNTS = ("skipped", "skipped_in_a_row", "spikes_in_a_row", "rollbacks")
_COLLAPSE_STEPS = 50


def all_finite(state: TrainState) -> jax.Array:
    """Whether all numbers are finite, for each floating-point array of a state."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in _floats(state).values()])


def name_not_finite(state: TrainState, finite: Any) -> str:
    """Names the arrays that aren't finite according to `finite`, the result of `all_finite`."""
    names = [name for name, good in zip(_floats(state), np.asarray(finite), strict=True) if not good]
    more = f" and {len(names) - 1} more arrays" if len(names) > 1 else ""
    return f"{names[0]}{more} of the state isn't finite" if names else ""


def _floats(state: TrainState) -> dict[str, jax.Array]:
    """Returns the floating-point arrays of a state by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): x for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields a function that, after its first call, must be called at least every `seconds`; 0 for no limit.

    Otherwise the process prints the stacks of all threads to standard error and exits with code 1, since the step
    hangs, for example in a collective that another process never joins. Each process has its own watchdog.
    """

    stderr = sys.__stderr__  # not a test's, which has no file descriptor

    def alive() -> None:
        if seconds and stderr is not None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)

    try:
        yield alive
    finally:
        if seconds:
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one acts as usual.

    Yields a function that returns whether there was one.
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
