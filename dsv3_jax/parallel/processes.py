"""Jobs of several processes: initialisation and failure messages."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
import sys
from collections.abc import Iterator

import jax

from dsv3_jax.config import ConfigError

HEARTBEAT_SECONDS = 30
"""Seconds without heartbeat after which a process is considered dead, which ends the job."""

_WITNESS = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job, all started with the same command: one per host on TPU pods, one per node on GPUs."""

    coordinator: str | None = None
    """`auto` for SLURM, Open MPI, Kubernetes or a TPU pod; or host:port of process 0. By default a single process."""
    count: int | None = None
    """Number of processes, if `coordinator` is an address."""
    index: int | None = None
    """Index of this process, from 0, if `coordinator` is an address."""

    def __post_init__(self) -> None:
        if self.coordinator in (None, "auto"):
            if self.count is not None or self.index is not None:
                raise ConfigError("processes.count and .index go with an address as processes.coordinator")
        elif self.count is None or self.index is None:
            raise ConfigError(f"processes.coordinator is {self.coordinator!r}: it needs processes.count and .index too")
        elif not 0 <= self.index < self.count:
            raise ConfigError(f"processes.index is {self.index}: it must be from 0 to processes.count - 1")
        else:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ConfigError(f"processes.coordinator is {self.coordinator!r}: it must be 'auto' or HOST:PORT")


def join(processes: Processes) -> None:
    """Joins the job. Must be called before JAX's devices are used. Raises ConfigError if there is no job to join."""
    if processes.coordinator is None:
        return
    address = None if processes.coordinator == "auto" else processes.coordinator
    try:
        if address is not None:  # else JAX tries for five minutes and then ends the process with a stack trace
            host, _, port = address.rpartition(":")
            socket.getaddrinfo(host.strip("[]"), port)
    except OSError as error:
        raise ConfigError(f"processes.coordinator is {address!r}: its host isn't known here ({error})") from None
    try:
        jax.distributed.initialize(
            address, processes.count, processes.index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"can't join the job at processes.coordinator {processes.coordinator!r}: {error}") from None


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """Prints to standard error what to do if this process of a job dies, as it does when another one dies.

    A process inside a collective is ended by a thread of JAX, out of reach of Python. Therefore a child process waits
    for the end of a pipe held by this process, and prints the message unless it was told that all is well.
    """
    if jax.process_count() == 1:
        yield
        return
    words = (
        f"error: process {jax.process_index()} of {jax.process_count()} lost the others, most likely, and died: "
        "start all of them again with --resume, from the newest checkpoint"
    )
    witness = subprocess.Popen([sys.executable, "-c", _WITNESS, words], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        witness.communicate(b"all is well")
