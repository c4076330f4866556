"""`python -m dsv3_jax report`: a self-contained page about one or several runs."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html
import statistics
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.checkpoint.remote import fetched
from dsv3_jax.config import ConfigError
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import CONFIG, METRICS, replace_file
from dsv3_jax.training.figure import Records, draw_runs
from dsv3_jax.training.metrics import read_metrics, worst_violation
from dsv3_jax.training.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Compare training runs on one page: curves, a table, configs and events."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Directories of runs, finished or running, or URLs, such as gs://bucket/run."""
    out: Path = Path("report.html")
    """The page, a single HTML file; its figure is also written beside it as a PNG."""


def report_command(args: ReportArgs) -> None:
    """Writes the page and the figure. Raises ConfigError if a directory contains no run, or one without steps."""
    if args.out.suffix not in (".html", ".htm"):
        raise ConfigError(f"out is {args.out}: it must end with .html, the figure is written beside it as .png")
    if not args.runs:
        raise ConfigError("no run is named: give the directory of one or more")
    names = _names(args.runs)
    runs = {name: _read(fetched(directory, weights=False)) for name, directory in zip(names, args.runs, strict=True)}
    picture = draw_runs({name: records for name, (_, records) in runs.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out.with_suffix(".png"), picture)
    replace_file(args.out, _page(runs, picture).encode())
    print(f"{args.out} and {args.out.with_suffix('.png')}")


def _names(directories: tuple[Path, ...]) -> list[str]:
    """Returns the last parts of the directories, or the full paths if those are equal."""
    short = [d.absolute().name for d in directories]
    names = short if len(set(short)) == len(short) else [str(d) for d in directories]
    if len(set(names)) < len(names):
        raise ConfigError(f"{next(n for n in names if names.count(n) > 1)} is named twice: name each run once")
    return names


def _read(directory: Path) -> tuple[TrainConfig, Records]:
    if not (directory / CONFIG).is_file() or not (directory / METRICS).is_file():
        raise ConfigError(f"{directory} holds no run: it has no {CONFIG} or no {METRICS}")
    records = read_metrics(directory / METRICS)
    if not any("loss" in r for r in records):
        raise ConfigError(f"{directory / METRICS} has no step yet: let the run reach one that is logged")
    return TrainConfig.from_json(directory / CONFIG), records


def _page(runs: dict[str, tuple[TrainConfig, Records]], picture: bytes) -> str:
    rows = {name: _row(*run) for name, run in runs.items()}
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    table = [["", *runs], *([key, *(row.get(key, "") for row in rows.values())] for key in keys)]
    first = next(iter(runs.values()))[0]
    parts = [_table(table), f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">']
    others = list(runs.items())[1:]
    if others:
        changes = [[name, line] for name, (config, _) in others for line in config.changes(first).values()]
        parts += [f"<h2>Compared with {_text(next(iter(runs)))}</h2>", _table([["run", "its value"], *changes])]
    events = [[name, r["step"], r["event"]] for name, (_, records) in runs.items() for r in records if "event" in r]
    if events:
        parts += ["<h2>Events</h2>", _table([["run", "step", "event"], *events])]
    for name, (config, _) in runs.items():
        fields = [[key, value] for key, value in config.flat().items()]
        parts.append(f"<details><summary>Config of {_text(name)}</summary>{_table(fields)}</details>")
    title = f"Training: {', '.join(runs)}"
    return _PAGE.format(title=_text(title), date=datetime.date.today(), body="\n".join(parts))


def _row(config: TrainConfig, records: Records) -> dict[str, str]:
    """Summarises a run: the last value of each metric, and the median of rates."""
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    done, schedule = max(r["step"] for r in records if "loss" in r), Schedule(config.schedule)
    tokens = sum(schedule.batch_size(step) for step in range(done)) * config.data.sequence_length
    row = {"steps": f"{done:,} of {config.schedule.steps:,}", "tokens": f"{tokens:,}"}
    for key, label in (("loss", "loss"), ("validation_loss", "validation loss"), ("mtp_loss", "MTP loss")):
        row |= {label: f"{last[key]:.4f}"} if key in last else {}
    for key, form in (("tokens_per_second", ",.0f"), ("mfu", ".1%")):
        if values := [r[key] for r in records if key in r]:
            row[f"{key.replace('_', ' ')}, median"] = f"{statistics.median(values):{form}}"
    row |= {"goodput": f"{last['goodput']:.1%}"} if "goodput" in last else {}
    if (violation := worst_violation(last)) is not None:
        row["largest load violation of a layer"] = f"{violation:.3f}"
    row["steps skipped"] = str(last.get("skipped", 0))
    row["rollbacks"] = str(sum("rolled back" in r.get("event", "") for r in records))
    return row


def _table(rows: list[list[Any]]) -> str:
    head, *body = [[_text(cell) for cell in row] for row in rows]
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _text(value: Any) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ border: 1px solid #ddd; padding: .2em .7em; text-align: left; vertical-align: top; }}
th {{ background: #f5f5f5; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>{title}</h1>
<p>{date}. Losses are in nats per token.</p>
{body}
</body></html>
"""
