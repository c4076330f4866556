"""Plots of one or several training runs: losses, expert load and rates by step."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv3_jax.training.metrics import worst_violation

Records = list[dict[str, Any]]
"""Lines of a `metrics.jsonl`."""

_PANELS = (
    ("loss", "loss (nats per token)"),
    ("load_violation", "load violation (max / mean - 1)"),
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens per second"),
    ("goodput", "goodput (share of the wall time spent on steps)"),
)


def draw_runs(runs: Mapping[str, Records]) -> bytes:
    """Draws a PNG with the curves of all runs; for a single run also the MTP loss and the load of each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(3, 2, figsize=(11, 10), constrained_layout=True)
    for axes, (key, title) in zip(grid.flat, _PANELS, strict=True):
        for i, (name, records) in enumerate(runs.items()):
            for label, steps, values in _curves(key, records, alone=len(runs) == 1):
                validation = label.startswith("validation")
                style: dict[str, Any] = {"marker": "o", "markersize": 3, "ls": "--"} if validation else {}
                axes.plot(steps, values, label=label if len(runs) == 1 else f"{name}: {label}", **style)
                if len(runs) > 1:
                    axes.lines[-1].set_color(f"C{i % 10}")
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if key in ("loss", "load_violation") and axes.lines:
            axes.legend(fontsize="small")
    grid[0, 1].set_ylim(0, 2)
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file.getvalue()


def _curves(key: str, records: Records, *, alone: bool) -> list[tuple[str, list[int], list[float]]]:
    """Returns label, steps and values of a run's curves in a panel."""
    if key == "loss":
        names = {"loss": "training", "validation_loss": "validation"}
        names |= {"mtp_loss": "training, one token further (MTP)"} if alone else {}
        return [(label, *points) for name, label in names.items() if (points := _points(name, records))[0]]
    if key != "load_violation":
        return [(key, *points)] if (points := _points(key, records))[0] else []
    if not alone:
        worst = [(r["step"], v) for r in records if (v := worst_violation(r)) is not None]
        return [("worst layer", [s for s, _ in worst], [v for _, v in worst])] if worst else []
    curves = []
    for name in sorted({k for r in records for k in r if k.startswith("load_violation/")}):
        steps = [r["step"] for r in records if name in r]
        layers = np.array([np.atleast_1d(r[name]) for r in records if name in r]).T
        label = name.removeprefix("load_violation/")
        curves += [(f"{label} {i}" if len(layers) > 1 else label, steps, list(c)) for i, c in enumerate(layers)]
    return curves


def _points(name: str, records: Records) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[name]) for r in records if name in r]
    return [s for s, _ in found], [v for _, v in found]
