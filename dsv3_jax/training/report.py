"""Progress of a run on the console, and its final report."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.metrics import worst_violation
from dsv3_jax.training.schedule import Schedule


@contextlib.contextmanager
def progress(console: Console, first: int, steps: int, every: int) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Yields `show(done, metrics)`: a bar on a terminal, otherwise a line every `every` steps."""
    if not console.is_terminal:
        began, taken = time.monotonic(), itertools.count(1)  # more than `done - first` in a run that goes back

        def line(done: int, last: dict[str, Any]) -> None:
            each = (time.monotonic() - began) / next(taken)
            if done % every == 0 or done == steps:
                left = each * (steps - done)
                console.print(f"step {done}/{steps}  {summary(last)}  {datetime.timedelta(seconds=round(left))} left")

        yield line
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[summary]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, completed=first, summary="compiling")
        yield lambda done, last: bar.update(task, completed=done, summary=summary(last))


def summary(metrics: dict[str, Any]) -> str:
    """Formats loss, validation loss, rate and load violation, as far as known, on one line."""
    parts = [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    if "validation_loss" in metrics:
        parts.append(f"validation {metrics['validation_loss']:.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if (violation := worst_violation(metrics)) is not None:
        parts.append(f"load violation {violation:.2f}")
    return "  ".join(parts)


def report(config: TrainConfig, records: list[dict[str, Any]], sample: str) -> str:
    """Formats the run's report in Markdown: a table of the last metrics, the figure, the sample."""
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    rows: list[tuple[str, Any]] = [
        ("steps", config.schedule.steps),
        ("tokens", Schedule(config.schedule).total_sequences * config.data.sequence_length),
    ]
    rows += [(k, f"{v:.4g}") for k, v in last.items() if isinstance(v, float)]
    if (violation := worst_violation(last)) is not None:
        rows.append(("largest load violation of a layer (max / mean - 1)", f"{violation:.3f}"))
    rows += [("device", jax.devices()[0].device_kind), ("jax", jax.__version__), ("date", f"{datetime.date.today()}")]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = (
        f"# Training run\n\n| | at the end |\n|---|---|\n{table}\n\n"
        "Losses are in nats per token. The run's config is in `config.json`.\n\n![loss and expert load](metrics.png)\n"
    )
    return text + (f"\n## Sample\n\n```\n{sample}\n```\n" if sample else "")
