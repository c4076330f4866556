"""Several processes as one job: how they find each other."""

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
"""A process that isn't heard of for so long is taken for dead, which ends the job."""

_WITNESS = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job. Each is started with the same command; on TPU pods one per host, on GPUs one per node."""

    coordinator: str | None = None
    """`auto` asks SLURM, Open MPI, Kubernetes or the TPU pod; else host:port of process 0. None: one process."""
    count: int | None = None
    """How many processes there are, if `coordinator` is an address."""
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
    """Joins the job, before anything else asks JAX for its devices. Raises ConfigError if there is none to join."""
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
    """Says on standard error what to do if this process of a job dies inside, as it does when another one dies.

    A process in the middle of a collective can't notice that: a thread of JAX's ends it, out of Python's reach. So a
    child waits for the end of a pipe that this process holds, and speaks unless it was told that all is well.
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
