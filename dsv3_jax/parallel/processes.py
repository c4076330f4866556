"""Several processes as one job: how they find each other."""

from __future__ import annotations

import dataclasses

import jax

from dsv3_jax.config import ConfigError

HEARTBEAT_SECONDS = 30
"""A process that isn't heard of for so long is taken for dead, which ends the job."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job. Each is started with the same command; on TPU pods one a host, on GPUs one a node."""

    coordinator: str | None = None
    """`auto` asks SLURM, Open MPI, Kubernetes or the TPU pod; else host:port of process 0. None: one process."""
    count: int | None = None
    """How many processes there are, if `coordinator` is an address."""
    index: int | None = None
    """Which of them this is, from 0, if `coordinator` is an address."""

    def __post_init__(self) -> None:
        if self.coordinator in (None, "auto"):
            if self.count is not None or self.index is not None:
                raise ConfigError("processes.count and .index go with an address as processes.coordinator")
        elif self.count is None or self.index is None:
            raise ConfigError(f"processes.coordinator is {self.coordinator!r}: it needs processes.count and .index too")
        elif not 0 <= self.index < self.count:
            raise ConfigError(f"processes.index is {self.index}: it must be from 0 to processes.count - 1")


def join(processes: Processes) -> None:
    """Joins the job, before anything else asks JAX for its devices. Raises ConfigError if there is none to join."""
    if processes.coordinator is None:
        return
    address = None if processes.coordinator == "auto" else processes.coordinator
    try:
        jax.distributed.initialize(
            address, processes.count, processes.index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"can't join the job at processes.coordinator {processes.coordinator!r}: {error}") from None
