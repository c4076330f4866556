"""Tokens per second, model FLOP/s, MFU if the device's peak is known, and a breakdown of time."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.accounting.hardware import hardware_of
from dsv3_jax.config import ModelConfig


class Throughput:
    """Rates between two calls of `measure`. The first call, and the first after `restart`, only starts the clock."""

    def __init__(self, config: ModelConfig, sequence_length: int, devices: int) -> None:
        """devices: number of devices that train, whose peaks add up."""
        self._flops_per_token = model_flops(config, sequence_length).total
        self._tokens, self._devices = 0, devices
        self._since: float | None = None

    def add(self, tokens: int) -> None:
        """Counts the tokens of a step."""
        self._tokens += tokens

    def restart(self) -> None:
        """Excludes the time until the next measurement, during which something other than training runs."""
        self._since = None

    @contextlib.contextmanager
    def paused(self, finished: jax.Array) -> Iterator[None]:
        """Waits for `finished`, then excludes the time of a `with` block, which leaves nothing to compute behind."""
        jax.block_until_ready(finished)
        began = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - began

    def measure(self, finished: jax.Array) -> dict[str, Any]:
        """Waits for `finished`, then returns rates per second since the last measurement."""
        jax.block_until_ready(finished)
        now, since, tokens = time.perf_counter(), self._since, self._tokens
        self._since, self._tokens = now, 0
        if since is None:
            return {}
        rate = tokens / (now - since)
        metrics = {"tokens_per_second": rate, "model_flops_per_second": rate * self._flops_per_token}
        device = hardware_of(jax.devices()[0].device_kind)
        if device is not None:
            metrics["mfu"] = metrics["model_flops_per_second"] / (device.peak("bf16") * self._devices)
        return metrics


class Clock:
    """Wall time of a run since the clock's creation, by activity of the host. The remainder is spent in steps."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def spent_on(self, name: str) -> Iterator[None]:
        """Counts the time of a `with` block; blocks must not nest."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    @property
    def wall(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._began

    def metrics(self) -> dict[str, float]:
        """Returns `goodput`: the fraction of wall time spent in steps."""
        return {"goodput": max(0.0, 1 - sum(self.seconds.values()) / self.wall)}

    def __str__(self) -> str:
        wall, metrics = self.wall, self.metrics()
        rest = ", ".join(f"{name} {seconds / wall:.1%}" for name, seconds in self.seconds.items())
        return f"goodput {metrics['goodput']:.1%}" + (f" ({rest})" if rest else "")
