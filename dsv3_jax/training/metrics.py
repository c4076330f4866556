"""Metrics of a run: JSON lines, TensorBoard events, and Weights & Biases on request."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_FLUSH_SECONDS = 10.0


class MetricsLog:
    """Appends metrics to `metrics.jsonl`, to TensorBoard's event files, and to Weights & Biases on request."""

    def __init__(self, directory: Path | None, *, first_step: int, wandb_project: str | None = None) -> None:
        """Opens a log that continues after `first_step`. Later lines, for steps to be repeated, are dropped.

        Without a directory nothing is written: only one of several processes keeps the log.
        """
        self.path = directory / "metrics.jsonl" if directory else None
        self._directory, self._wandb = directory, None
        if directory is None or self.path is None:
            return
        self._open(first_step)
        if wandb_project is not None:
            self._wandb = _wandb_run(wandb_project, directory)

    def _open(self, first_step: int) -> None:
        assert self.path is not None and self._directory is not None  # noqa: PT018
        kept = [r for r in read_metrics(self.path) if r["step"] <= first_step] if self.path.exists() else []
        beside = self.path.with_name(f".{self.path.name}")
        beside.write_text("".join(json.dumps(r) + "\n" for r in kept))
        beside.replace(self.path)  # in one step: a crash or a full disk leaves the old one
        self._lines = self.path.open("a", buffering=1)
        self._events = _Events(self._directory / "tensorboard", first_step)

    def rewind(self, step: int) -> None:
        """Drops the lines of steps after `step`."""
        if self.path is not None:
            self.close_files()
            self._open(step)

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Records numbers and lists of numbers, and returns them as plain Python values. Omits non-finite values."""
        plain = {k: np.asarray(v).tolist() for k, v in metrics.items() if np.isfinite(np.asarray(v)).all()}
        if self.path is None:
            return plain
        self._line({"step": step, **plain})
        scalars = {}
        for name, value in plain.items():
            for i, scalar in enumerate(value) if isinstance(value, list) else [(None, value)]:
                scalars[name if i is None else f"{name}/{i}"] = scalar
        self._events.write(step, [summary.scalar(name, scalar) for name, scalar in scalars.items()])
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        return plain

    def event(self, step: int, what: str) -> None:
        """Records an event at a step."""
        if self.path is not None:
            self._line({"step": step, "event": what})
            self._events.write(step, [summary.text("event", what)])

    def _line(self, record: dict[str, Any]) -> None:
        with _named(self.path):
            self._lines.write(json.dumps(record) + "\n")

    def close_files(self) -> None:
        """Closes the files; `rewind` opens them again."""
        with contextlib.suppress(OSError):  # what couldn't be written was said by `write`
            self._lines.close()
        with contextlib.suppress(OSError):
            self._events.close()

    def close(self) -> None:
        """Closes the log."""
        if self.path is not None:
            self.close_files()
        if self._wandb is not None:
            self._wandb.finish()


@contextlib.contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Names the path in the message of an OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} couldn't be written: {error.strerror}") from None


class _Events:
    """A TensorBoard event file.

    tensorboardX's `SummaryWriter` writes in a thread, which a full disk ends: its callers then wait forever.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        """Opens a new file in `directory`, whose older files then count up to `first_step`."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._flushed = directory, 0.0
        self._file = EventsWriter(str(directory / "events"), filename_suffix=f".{time.time_ns()}")
        self._write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, summaries: Iterable[Any]) -> None:
        """Writes the summaries of a step. Raises OSError."""
        self._write(*(Event(wall_time=time.time(), step=step, summary=value) for value in summaries))

    def _write(self, *events: Any) -> None:
        with _named(self._directory):
            for event in events:
                self._file.write_event(event)
            if time.monotonic() > self._flushed + _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _wandb_run(project: str, directory: Path) -> Any:
    import wandb

    name = directory.absolute().name
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(directory))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a `metrics.jsonl`. Invalid lines, such as the last one after a crash, are ignored."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def worst_violation(metrics: dict[str, Any]) -> float | None:
    """Returns the largest load violation (max / mean - 1) of any MoE layer, or None if there is none."""
    values = [np.max(v) for k, v in metrics.items() if k.startswith("load_violation/")]
    return float(max(values)) if values else None
