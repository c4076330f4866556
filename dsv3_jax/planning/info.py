"""`python -m dsv3_jax info`: parameters and cache of a configuration."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class InfoArgs:
    """Print parameters and cache bytes of a configuration, counted on the model itself without creating any array."""

    preset: str = "v3-671b"
    """tiny, v3-mini, v2-lite-16b, v2-236b, v3-671b, moonlight-16b, glm-4.7-flash or kimi-k2-1t."""
    config: Path | None = None
    """A Hugging Face config.json, or its directory, instead of a preset."""
    json: bool = False
    """Print one JSON object instead of a table."""


def info(config: ModelConfig) -> dict[str, Any]:
    """Returns the numbers of `info`: parameter counts, and bytes of bfloat16 cache per token."""
    from dsv3_jax.accounting.parameters import cache_bytes_per_token, count_parameters

    return dataclasses.asdict(count_parameters(config)) | {"cache_bytes_per_token": cache_bytes_per_token(config)}


def info_command(args: InfoArgs) -> None:
    """Prints the table, or a JSON object with `args.json`."""
    config = ModelConfig.preset(args.preset) if args.config is None else ModelConfig.from_hf(args.config)
    name, facts = args.preset if args.config is None else str(args.config), info(config)
    if args.json:
        print(jsonlib.dumps({"name": name} | facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, title_justify="left")
    table.add_column("component")
    table.add_column("parameters", justify="right")
    table.add_column("used by a token", justify="right")
    for row in facts["components"]:
        table.add_row(row["name"], f"{row['total']:,}", f"{row['activated']:,}")
    table.add_section()
    table.add_row("main model", f"{facts['total']:,}", f"{facts['activated']:,}", style="bold")
    if facts["mtp_total"]:
        table.add_section()
        for row in facts["mtp_components"]:
            table.add_row(f"MTP {row['name'].removeprefix('MTP ')}", f"{row['total']:,}", f"{row['activated']:,}")
        table.add_section()
        table.add_row("unique to MTP", f"{facts['mtp_total']:,}", f"{facts['mtp_activated']:,}", style="bold")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"latent cache: {facts['cache_bytes_per_token']:,} bytes per token in bfloat16")
