"""Options of `python -m dsv3_jax plan`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from dsv3_jax.config import ConfigError
from dsv3_jax.runtime import Remat

Precision = Literal["bf16", "fp8"]
PlannedSchedule = Literal["1f1b", "zero_bubble", "dualpipe"]
"""Pipeline schedules that the planner models; `runtime.PipelineSchedule` has those that are implemented."""


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Estimate memory, time and cost of training a configuration or, with `--serve`, of decoding.

    Without `--mesh`, all meshes are tried, and the fastest that fit are shown.
    """

    preset: str = "v3-671b"
    """tiny, v3-mini, v2-lite-16b, v2-236b, v3-671b, moonlight-16b, glm-4.7-flash or kimi-k2-1t."""
    config: Path | None = None
    """A Hugging Face config.json, or its directory, instead of a preset."""
    hardware: str = "h800"
    """h800, h100, h200, b200, v5e, v5p, v6e or 7x."""
    devices: int = 2048
    """Number of accelerators."""
    tokens: float = 14.8e12
    """Tokens to train on."""
    batch: int = 15360
    """Sequences per training step; with --serve, sequences decoded at a time."""
    length: int = 4096
    """Tokens per sequence; with --serve, tokens already cached."""
    microbatch_size: int = 1
    """Sequences per device in a microbatch."""
    mesh: str = ""
    """Mesh axes, such as stage=16,data=2,expert=64; if empty, all meshes are tried."""
    precision: Precision = "bf16"
    """Dtype of the operands of linear layers."""
    remat: Remat = "paper"
    """Rematerialisation policy, as in runtime.remat."""
    pipeline_schedule: PlannedSchedule = "1f1b"
    """Pipeline schedule; dualpipe hides the exchange of tokens between experts."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's two moments."""
    mtp: bool = True
    """Include the multi-token prediction modules."""
    efficiency: float | None = None
    """Sustained fraction of the data-sheet rates; by default that of the hardware family."""
    dollars_per_hour: float | None = None
    """Price per device-hour; by default that of a published claim about the hardware, if any."""
    serve: bool = False
    """Plan decoding instead of training."""
    attention_data: int = 0
    """With --serve: number of device groups that serve different sequences; 0 selects the fastest that fits."""
    aot: str | None = None
    """Compile the real training step for a TPU topology, such as v5p:8x16x16, without the hardware, over --mesh (by
    default one chip), and report the compiler's memory, FLOPs and communication.
    """
    attention: Literal["reference", "blockwise", "tpu"] = "reference"
    """With --aot: implementation of attention, as in runtime.attention_impl; `reference` stores all scores."""
    validate: bool = False
    """Print a markdown table of predictions and published measurements instead."""
    top: int = 5
    """Number of meshes to show."""
    json: bool = False
    """Print one JSON object instead of tables."""


def check(args: PlanArgs) -> None:
    """Raises ConfigError, naming the field, for invalid numbers."""
    for name in ("devices", "tokens", "batch", "length", "microbatch_size", "top"):
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}: it must be positive")
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        raise ConfigError(f"efficiency is {args.efficiency}: it must be above 0 and at most 1")
    if args.dollars_per_hour is not None and not args.dollars_per_hour >= 0:
        raise ConfigError(f"dollars_per_hour is {args.dollars_per_hour}: it must not be negative")
    if args.attention_data < 0:
        raise ConfigError(f"attention_data is {args.attention_data}: it must not be negative")
