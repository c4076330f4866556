"""Plans as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30


def print_plan(result: dict[str, Any]) -> None:
    """Prints what `plan` found: `result` as `training_plan`, `serving_plan` or `aot_plan` returned it."""
    console = Console(highlight=False, soft_wrap=False)
    {"training": _training, "serving": _serving, "aot": _aot}[result["kind"]](console, result)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _training(console: Console, result: dict[str, Any]) -> None:
    best, sheet = result["plans"][0], result["hardware"]
    console.print(
        f"{result['model']} on {result['devices']:,} x {sheet['title']}: {result['tokens']:.4g} tokens, "
        f"{result['batch']:,} x {result['length']:,} per step, {result['precision']}, remat {result['remat']}; "
        f"at {sheet['efficiency']:.1%} of data-sheet rates"
    )
    if not result["meshes_fitting"]:
        console.print(
            f"[bold]doesn't fit[/bold]: of {result['meshes_tried']} meshes the smallest needs "
            f"{best['memory']['total'] / _GIB:.1f} GiB of a device's {sheet['memory'] / _GIB:.1f} GiB"
        )
    console.print()

    sweep = _table(
        f"{result['meshes_fitting']} of {result['meshes_tried']} meshes fit; the fastest",
        "mesh",
        "GiB",
        "s/step",
        "tok/s/dev",
        "MFU",
        "days",
    )
    for row in result["plans"]:
        sweep.add_row(
            row["mesh"],
            f"{row['memory']['total'] / _GIB:.1f}",
            f"{row['step_seconds']:.2f}",
            f"{row['tokens_per_device_second']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['cost']['days']:.1f}",
        )
    console.print(sweep)

    memory = _table("memory of the fullest device", "what", "GiB")
    for name, size in best["memory"].items():
        if name == "total":
            memory.add_section()
        memory.add_row(name, f"{size / _GIB:.2f}")
    memory.add_row("device", f"{sheet['memory'] / _GIB:.2f}")
    console.print(memory)

    time = _table("time of a step", "what", "s", "share")
    for name, seconds in best["seconds"].items():
        if name != "hidden_by_compute":
            time.add_row(name, f"{seconds:.3f}", f"{seconds / best['step_seconds']:.1%}")
    time.add_section()
    time.add_row("total", f"{best['step_seconds']:.3f}", "")
    time.add_row("links behind compute", f"{best['seconds']['hidden_by_compute']:.3f}", "")
    console.print(time)

    if best["traffic"]:
        links = _table("received by a device in a step", "axis and what for", "GB", "s at data-sheet rates", "hidden")
        for t in best["traffic"]:
            hidden = "yes" if t["hidden"] else "no"
            links.add_row(f"{t['axis']}: {t['what']}", f"{t['received'] / 1e9:.2f}", f"{t['seconds']:.3f}", hidden)
        console.print(links)

    price = best["cost"]
    money = _table("cost", "what", "value")
    money.add_row("model FLOPs per token (no recomputation)", f"{best['model_flops_per_token']:.4g}")
    money.add_row("FLOPs per token as executed", f"{best['executed_flops_per_token']:.4g}")
    money.add_row("model TFLOP/s per device", f"{best['flops_per_device_second'] / 1e12:.1f}")
    money.add_row("device-hours", f"{price['device_hours']:,.0f}")
    money.add_row("days", f"{price['days']:.1f}")
    dollars = "give --dollars-per-hour" if price["dollars"] is None else f"${price['dollars']:,.0f}"
    money.add_row("cost", dollars)
    energy = "no published power" if price["megawatt_hours"] is None else f"{price['megawatt_hours']:,.0f} MWh"
    money.add_row("energy of the devices alone", energy)
    console.print(money)
    console.print("sources: " + "; ".join(sheet["sources"]), style="dim")


def _serving(console: Console, result: dict[str, Any]) -> None:
    sheet, best = result["hardware"], result["plans"][0]
    console.print(
        f"{result['model']} on {result['devices']:,} x {sheet['title']}: decoding {result['batch']:,} sequences of "
        f"{result['length']:,} cached tokens, {result['precision']} weights, at {sheet['efficiency']:.1%} of rates\n"
    )
    sweep = _table(
        "groups of devices that serve different sequences", "groups x devices", "weights GiB", "largest batch"
    )
    for column in ("ms per step", "tok/s/dev"):
        sweep.add_column(column, justify="right")
    for row in result["plans"]:
        last = row["decode"][-1]
        sweep.add_row(
            f"{row['attention_data']} x {row['tensor']}",
            f"{row['weight_bytes'] / _GIB:.1f}",
            f"{row['largest_batch']:,}",
            f"{last['step_seconds'] * 1e3:.1f}",
            f"{last['tokens_per_device_second']:,.1f}",
        )
    console.print(sweep)
    layout, prefill = f"{best['attention_data']} x {best['tensor']}", best["prefill_tokens_per_second"]
    alone = best["prompt_seconds"] * 1e3
    title = f"by batch, {layout}; prefill at most {prefill:,.0f} tokens/s, a prompt alone {alone:,.0f} ms"
    parts = list(best["decode"][0]["seconds"])
    table = _table(title, "batch", "ms per step", *parts, "tok/s/dev")
    for row in best["decode"]:
        table.add_row(
            f"{row['batch']:,}",
            f"{row['step_seconds'] * 1e3:.1f}",
            *(f"{row['seconds'][p] * 1e3:.1f}" for p in parts),
            f"{row['tokens_per_device_second']:,.1f}",
        )
    console.print(table)
    console.print("sources: " + "; ".join(sheet["sources"]), style="dim")


def _aot(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['model']} compiled for {result['topology']}, mesh {result['mesh']}, in "
        f"{result['compile_seconds']:.0f} s; it {'fits' if result['fits'] else '[bold]does not fit[/bold]'} "
        f"a device's {result['memory'] / _GIB:.1f} GiB"
    )
    table = _table("", "what", "compiler", "estimate", "estimate / compiler")
    for row in result["rows"]:
        ratio = f"{row['estimate'] / row['compiler']:.3f}" if row["compiler"] else ""
        table.add_row(row["what"], row["compiler_text"], row["estimate_text"], ratio)
    console.print(table)
    if result["collectives"]:
        sent = _table("results of collectives, one device, one step", "collective", "along", "GB")
        for row in result["collectives"]:
            sent.add_row(row["kind"], row["axes"] or "?", f"{row['bytes'] / 1e9:,.2f}")
        console.print(sent)
