"""Tokens a second, model FLOP/s, and their share of the device's peak where that is known."""

from __future__ import annotations

import time
from typing import Any

import jax

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.accounting.hardware import hardware_of
from dsv3_jax.config import ModelConfig


class Throughput:
    """Rates between two calls of `measure`; the first one, and the first after `restart`, only starts the clock."""

    def __init__(self, config: ModelConfig, sequence_length: int) -> None:
        self._flops_per_token = model_flops(config, sequence_length).total
        self._tokens = 0
        self._since: float | None = None

    def add(self, tokens: int) -> None:
        """Counts a step's tokens."""
        self._tokens += tokens

    def restart(self) -> None:
        """Leaves out the time until the next measurement, in which something else than training runs."""
        self._since = None

    def measure(self, finished: jax.Array) -> dict[str, Any]:
        """Waits for `finished`, then returns what was done since the last measurement, a second."""
        jax.block_until_ready(finished)
        now, since, tokens = time.perf_counter(), self._since, self._tokens
        self._since, self._tokens = now, 0
        if since is None:
            return {}
        rate = tokens / (now - since)
        metrics = {"tokens_per_second": rate, "model_flops_per_second": rate * self._flops_per_token}
        device = hardware_of(jax.devices()[0].device_kind)
        if device is not None:
            metrics["mfu"] = metrics["model_flops_per_second"] / (device.peak("bf16") * jax.device_count())
        return metrics
