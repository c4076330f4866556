"""Metrics of a run: JSON lines, TensorBoard events, and a figure of loss and expert load."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX


class MetricsLog:
    """Appends metrics to `metrics.jsonl` and to TensorBoard's event files under a run's directory."""

    def __init__(self, directory: Path | None, *, first_step: int) -> None:
        """A log that continues after `first_step`: later lines, of steps that will be taken again, are dropped.

        Without a directory nothing is written: of several processes, one keeps the log.
        """
        self.path = directory / "metrics.jsonl" if directory else None
        if directory is None or self.path is None:
            return
        kept = [r for r in read_metrics(self.path) if r["step"] <= first_step] if self.path.exists() else []
        beside = self.path.with_name(f".{self.path.name}")
        beside.write_text("".join(json.dumps(r) + "\n" for r in kept))
        beside.replace(self.path)  # in one step: a crash or a full disk leaves the old one
        self._lines = self.path.open("a", buffering=1)
        self._events = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Records numbers and lists of numbers; returns them as plain Python values."""
        plain = {k: np.asarray(v).tolist() for k, v in metrics.items()}
        if self.path is None:
            return plain
        try:
            self._lines.write(json.dumps({"step": step, **plain}) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"{self.path} couldn't be written: {error.strerror}") from None
        for name, value in plain.items():
            for i, scalar in enumerate(value) if isinstance(value, list) else [(None, value)]:
                self._events.add_scalar(name if i is None else f"{name}/{i}", scalar, step)
        return plain

    def close(self) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # what couldn't be written was said by `write`
            self._lines.close()
        with contextlib.suppress(OSError):
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a line that is none, as the last one after a crash, is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def worst_violation(metrics: dict[str, Any]) -> float | None:
    """The largest load violation (max / mean - 1) of any MoE layer, or None without such layers."""
    values = [np.max(v) for k, v in metrics.items() if k.startswith("load_violation/")]
    return float(max(values)) if values else None


def plot_metrics(path: Path, records: list[dict[str, Any]], title: str) -> None:
    """Draws loss and expert load against the step into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, load) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for key, label in (
        ("loss", "training"),
        ("validation_loss", "validation"),
        ("mtp_loss", "training, one token further (MTP)"),
    ):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            losses.plot(
                *zip(*points, strict=True), label=label, marker="o" if key == "validation_loss" else None, markersize=3
            )
    losses.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    losses.legend()
    for name in sorted({k for r in records for k in r if k.startswith("load_violation/")}):
        steps = [r["step"] for r in records if name in r]
        values = np.array([np.atleast_1d(r[name]) for r in records if name in r])
        for i, curve in enumerate(values.T):
            load.plot(
                steps,
                curve,
                label=f"{name.removeprefix('load_violation/')} {i}"
                if values.shape[1] > 1
                else name.removeprefix("load_violation/"),
            )
    load.set(xlabel="step", ylabel="load violation (max / mean - 1)", title="expert load", ylim=(0, 2))
    if load.lines:
        load.legend()
    for axes in (losses, load):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
