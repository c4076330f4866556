"""Schedules of learning rate, batch size, MTP weight and bias update speed, by tokens (report section 4.2).

The report's milestones are expressed as fractions of its 14.8T tokens, so that they apply to runs of any length.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError

_PAPER_TOKENS = 14.8e12


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The schedule of a run. Defaults are DeepSeek-V3's, except the length."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 15360
    """Sequences per step after the ramp."""
    initial_batch_size: int | None = None
    """Sequences per step at first (3072 in the report); by default there is no ramp."""
    ramp_stages: int = 8
    """Number of batch sizes in the ramp. One compiled program serves all of them, except with a pipeline."""
    ramp_until: float = 469e9 / _PAPER_TOKENS
    """Fraction of all tokens at which the batch has its full size. The ramp is linear; the report's isn't specified."""

    peak_learning_rate: float = 2.2e-4
    end_learning_rate: float = 2.2e-5
    tail_learning_rate: float = 7.3e-6
    warmup_steps: int = 2000
    constant_until: float = 10e12 / _PAPER_TOKENS
    """Fraction of all tokens at which the cosine decay begins."""
    decay_until: float = 14.3e12 / _PAPER_TOKENS
    """Fraction at which the decay ends, at `end_learning_rate`."""
    tail_from: float = 14.633e12 / _PAPER_TOKENS
    """Fraction from which the learning rate is `tail_learning_rate`."""

    mtp_weight: float = 0.3
    final_mtp_weight: float = 0.1
    """Lambda of eq. 25, before and after `constant_until`."""
    bias_update_speed: float = 1e-3
    """Gamma of auxiliary-loss-free balancing until `decay_until`; zero after it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "ramp_stages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}: it must be at least 1")
        if self.initial_batch_size is not None and not 1 <= self.initial_batch_size <= self.batch_size:
            raise ConfigError(
                f"schedule.initial_batch_size is {self.initial_batch_size}: "
                f"it must be from 1 to batch_size ({self.batch_size})"
            )
        if self.steps >= 2**31:
            raise ConfigError(f"schedule.steps is {self.steps}: it must be below 2**31, which the step counter holds")
        if not 0 < self.peak_learning_rate < math.inf:
            raise ConfigError(f"schedule.peak_learning_rate is {self.peak_learning_rate}: it must be positive")
        for name in (
            "end_learning_rate",
            "tail_learning_rate",
            "warmup_steps",
            "mtp_weight",
            "final_mtp_weight",
            "bias_update_speed",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}: it must be 0 or a positive number")
        if not 0 <= self.ramp_until <= 1:
            raise ConfigError(f"schedule.ramp_until is {self.ramp_until}: it must be from 0 to 1")
        if not 0 <= self.constant_until <= self.decay_until <= self.tail_from <= 1:
            raise ConfigError("schedule: constant_until <= decay_until <= tail_from must hold, between 0 and 1")


@dataclasses.dataclass(frozen=True)
class RampStage:
    """A range of steps with one batch size. start: number of sequences before it."""

    start_step: int
    start: int
    batch_size: int


class Schedule:
    """The schedule as functions of the step, usable under `jit`."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.ramp = _ramp(config)
        last = self.ramp[-1]
        self.total_sequences = last.start + (config.steps - last.start_step) * last.batch_size

    def batch_size(self, step: int) -> int:
        """Returns the number of sequences in step `step` (from 0)."""
        return [s for s in self.ramp if s.start_step <= step][-1].batch_size

    def progress(self, step: jax.Array | int) -> jax.Array:
        """Returns the fraction of all tokens before step `step`, float32."""
        steps = np.array([s.start_step for s in self.ramp] + [self.config.steps], np.float32)
        seen = np.array([s.start for s in self.ramp] + [self.total_sequences], np.float64) / self.total_sequences
        return jnp.interp(jnp.asarray(step, jnp.float32), steps, seen.astype(np.float32))

    def learning_rate(self, step: jax.Array | int) -> jax.Array:
        """The learning rate: linear warm-up, constant, cosine decay, and two constant tails."""
        c, done = self.config, self.progress(step)
        warmup = jnp.minimum((jnp.asarray(step, jnp.float32) + 1) / max(c.warmup_steps, 1), 1.0)
        decay = jnp.clip((done - c.constant_until) / max(c.decay_until - c.constant_until, 1e-9), 0, 1)
        rate = c.end_learning_rate + (c.peak_learning_rate - c.end_learning_rate) * 0.5 * (1 + jnp.cos(jnp.pi * decay))
        return warmup * jnp.where(done >= c.tail_from, c.tail_learning_rate, rate)

    def mtp_weight(self, step: jax.Array | int) -> jax.Array:
        c = self.config
        return jnp.where(self.progress(step) < c.constant_until, c.mtp_weight, c.final_mtp_weight)

    def bias_update_speed(self, step: jax.Array | int) -> jax.Array:
        c = self.config
        return jnp.where(self.progress(step) < c.decay_until, c.bias_update_speed, 0.0)


def _ramp(config: ScheduleConfig) -> list[RampStage]:
    """Batch sizes from `initial_batch_size` to `batch_size`, each for an equal part of the ramp's tokens."""
    first, full = config.initial_batch_size or config.batch_size, config.batch_size
    if first == full:
        return [RampStage(0, 0, full)]
    sizes = np.linspace(first, full, config.ramp_stages + 1)[:-1].round().astype(int)
    # `steps` fixes the number of sequences N in all: each of the k stages sees f N / k, the rest (1 - f) N.
    f = config.ramp_until
    total = config.steps / (f * np.mean(1 / sizes) + (1 - f) / full)
    stages, step, seen = [], 0, 0
    for size in sizes:
        stages.append(RampStage(step, seen, int(size)))
        count = max(1, round(f * total / len(sizes) / size))
        step, seen = step + count, seen + count * int(size)
    return [s for s in [*stages, RampStage(step, seen, full)] if s.start_step < config.steps]
