"""`python -m dsv3_jax plan`: what training costs, where it fits, how fast it will be; and the same for serving."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
from pathlib import Path
from typing import Any, Literal

from dsv3_jax.config import ConfigError, ModelConfig


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Predict memory, time and cost of training a configuration, or with `--serve` of decoding with it.

    Without `--mesh` all meshes are tried and the best few that fit are shown.
    """

    preset: str = "v3-671b"
    """v3-671b, v2-236b, v2-lite-16b, v3-mini or tiny."""
    config: Path | None = None
    """A Hugging Face config.json, or its directory, instead of a preset."""
    hardware: str = "h800"
    """h800, h100, h200, b200, v5e, v5p, v6e or 7x."""
    devices: int = 2048
    """Accelerators in all."""
    tokens: float = 14.8e12
    """Tokens to train on."""
    batch: int = 15360
    """Sequences a step (training), or sequences served at a time (--serve)."""
    length: int = 4096
    """Tokens of a sequence; with --serve, tokens already cached."""
    microbatch: int = 1
    """Sequences a device takes at a time."""
    mesh: str = ""
    """Sizes of mesh axes, as stage=16,data=2,expert=64; empty tries them all."""
    precision: Literal["bf16", "fp8"] = "bf16"
    """Operands of linear layers."""
    remat: Literal["none", "block", "paper"] = "paper"
    """What the backward pass recomputes, as Runtime.remat."""
    schedule: Literal["1f1b", "dualpipe"] = "1f1b"
    """Of pipeline stages; dualpipe hides the exchange of tokens between experts."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of Adam's two moments."""
    mtp: bool = True
    """Train the multi-token prediction modules too."""
    efficiency: float | None = None
    """Share of printed rates to count on; by default the hardware family's."""
    dollars_per_hour: float | None = None
    """Price of a device; by default the hardware's, where a published claim has one."""
    serve: bool = False
    """Plan decoding instead of training."""
    attention_data: int = 0
    """With --serve: groups of devices that serve different sequences; 0 picks the fastest that fits."""
    aot: str | None = None
    """Compile the real training step for a TPU topology that needn't be there, as v5p:8x16x16, over --mesh (one chip
    without it), and report the compiler's memory, FLOPs and communication."""
    validate: bool = False
    """Print predictions beside published measurements instead, as a markdown table."""
    top: int = 5
    """How many meshes to show."""
    json: bool = False
    """Print one JSON object instead of tables."""


def plan_command(args: PlanArgs) -> None:
    """Prints the plan as tables, or with `args.json` as one object."""
    check(args)
    if args.validate:
        from dsv3_jax.planning import published

        rows = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in published.compare()]
        print(jsonlib.dumps(rows, indent=2) if args.json else published.markdown())
        return
    config = ModelConfig.preset(args.preset) if args.config is None else ModelConfig.from_hf(args.config)
    if args.aot is not None:
        from dsv3_jax.planning.aot import aot_plan

        result = aot_plan(args, config)
    elif args.serve:
        result = serving_plan(args, config)
    else:
        result = training_plan(args, config)
    if args.json:
        print(jsonlib.dumps(result, indent=2))
        return
    from dsv3_jax.planning.tables import print_plan

    print_plan(result)


def check(args: PlanArgs) -> None:
    """Raises ConfigError, naming the field, for numbers that no plan can have."""
    for name in ("devices", "tokens", "batch", "length", "microbatch", "top"):
        value = getattr(args, name)
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}: it must be positive")
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        raise ConfigError(f"efficiency is {args.efficiency}: it must be above 0 and at most 1")
    if args.dollars_per_hour is not None and not args.dollars_per_hour >= 0:
        raise ConfigError(f"dollars_per_hour is {args.dollars_per_hour}: it must not be negative")
    if args.attention_data < 0:
        raise ConfigError(f"attention_data is {args.attention_data}: it must not be negative")


# Training --------------------------------------------------------------------------------------------------


def training_plan(args: PlanArgs, config: ModelConfig) -> dict[str, Any]:
    """The plan as plain values: the mesh that was asked for, or the best of all that fit."""
    from dsv3_jax.parallel.mesh import MeshShape
    from dsv3_jax.planning.hardware import hardware
    from dsv3_jax.planning.mesh import TrainingPlan, meshes

    sheet = hardware(args.hardware)
    if sheet.torus_axes == 0 and args.devices > sheet.domain and args.devices % sheet.domain:
        raise ConfigError(f"{args.devices} devices don't make whole nodes of {sheet.domain} {sheet.title}")
    if args.devices > sheet.domain and sheet.torus_axes and args.devices % sheet.domain:
        raise ConfigError(f"{args.devices} devices don't make whole pods of {sheet.domain} {sheet.title}")
    config = dataclasses.replace(config, num_nextn_predict_layers=config.num_nextn_predict_layers if args.mtp else 0)
    base = TrainingPlan(
        config,
        sheet,
        MeshShape(),
        args.batch,
        args.length,
        args.microbatch,
        args.precision,
        args.remat,
        moment=4 if args.moments == "float32" else 2,
        weight=1 if args.precision == "fp8" else 2,
        schedule=args.schedule,
        mtp=bool(config.num_nextn_predict_layers),
    )
    if args.mesh:
        mesh = MeshShape.parse(args.mesh)
        if mesh.devices != args.devices:
            raise ConfigError(f"mesh {args.mesh} has {mesh.devices} devices, but --devices is {args.devices}")
        candidates = [dataclasses.replace(base, mesh=mesh)]
    else:
        candidates = list(meshes(base, args.devices))
        if not candidates:
            raise ConfigError(
                f"no mesh of {args.devices} devices takes {args.batch} sequences a step: data x fsdp x expert must "
                f"divide {args.batch // args.microbatch}, expert n_routed_experts, tensor the heads"
            )
    rows = [_training_row(p, args) for p in candidates]
    fitting = [r for r in rows if r["fits"]]
    best = sorted(fitting, key=lambda r: r["step_seconds"]) or sorted(rows, key=lambda r: r["memory"]["total"])
    return {
        "kind": "training",
        "model": args.preset if args.config is None else str(args.config),
        "hardware": dataclasses.asdict(sheet) | {"efficiency": args.efficiency or sheet.efficiency},
        "devices": args.devices,
        "tokens": args.tokens,
        "batch": args.batch,
        "length": args.length,
        "precision": args.precision,
        "remat": args.remat,
        "meshes_tried": len(rows),
        "meshes_fitting": len(fitting),
        "plans": best[: args.top],
    }


def _training_row(plan: Any, args: PlanArgs) -> dict[str, Any]:
    from dsv3_jax.planning.cost import cost
    from dsv3_jax.planning.memory import memory
    from dsv3_jax.planning.step_time import step_time

    sheet, used, time = plan.hardware, memory(plan), step_time(plan, args.efficiency)
    hours = args.tokens / time.tokens_per_device_second / 3600
    price = sheet.dollars_per_hour if args.dollars_per_hour is None else args.dollars_per_hour
    parts = {n: getattr(time, n) for n in ("matmuls", "elementwise", "optimizer", "exchange", "bubble")}
    return {
        "mesh": str(plan.mesh),
        "fits": used.total <= sheet.memory,
        "memory": dataclasses.asdict(used) | {"total": used.total},
        "step_seconds": time.total,
        "seconds": parts | {"hidden_by_compute": time.hidden},
        "traffic": [dataclasses.asdict(t) for t in time.traffic],
        "tokens_per_device_second": time.tokens_per_device_second,
        "model_flops_per_token": time.model_flops / time.tokens,
        "executed_flops_per_token": time.executed_flops / time.tokens,
        "flops_per_device_second": time.flops_per_device_second,
        "mfu": time.mfu,
        "cost": dataclasses.asdict(cost(hours, args.devices, price, sheet.watts)),
    }


# Serving ---------------------------------------------------------------------------------------------------


def serving_plan(args: PlanArgs, config: ModelConfig) -> dict[str, Any]:
    """Decoding at `args.batch` sequences of `args.length` cached tokens; FP8 weights take 1 byte, bfloat16 2."""
    from dsv3_jax.planning.hardware import hardware
    from dsv3_jax.planning.inference import (
        Serving,
        largest_batch,
        prefill_step,
        prefill_tokens_per_second,
        weight_bytes,
    )

    sheet = hardware(args.hardware)
    weight = 1 if args.precision == "fp8" else 2
    groups = [args.attention_data] if args.attention_data else list(range(1, args.devices + 1))
    rows: list[dict[str, Any]] = []
    for group in groups:
        try:
            serving = Serving(config, sheet, args.devices, group, weight=weight)
        except ConfigError:
            if args.attention_data:
                raise
            continue
        batches = sorted({args.batch} | {2**i for i in range(0, 1 + int(math.log2(args.batch)), 2)})
        rows.append(
            {
                "attention_data": group,
                "tensor": serving.tensor,
                "weight_bytes": weight_bytes(serving),
                "largest_batch": largest_batch(serving, args.length),
                "prefill_tokens_per_second": prefill_tokens_per_second(serving, args.length, args.efficiency),
                "prompt_seconds": prefill_step(serving, 1, args.length, args.efficiency),
                "decode": [_decode_row(serving, b, args) for b in batches],
            }
        )
    if not rows:
        raise ConfigError(
            f"{args.devices} devices can't split {config.num_attention_heads} heads evenly in any grouping"
        )
    rows.sort(key=lambda r: (r["largest_batch"] < args.batch, r["decode"][-1]["step_seconds"]))
    return {
        "kind": "serving",
        "model": args.preset if args.config is None else str(args.config),
        "hardware": dataclasses.asdict(sheet) | {"efficiency": args.efficiency or sheet.efficiency},
        "devices": args.devices,
        "batch": args.batch,
        "length": args.length,
        "precision": args.precision,
        "plans": rows[: args.top],
    }


def _decode_row(serving: Any, batch: int, args: PlanArgs) -> dict[str, Any]:
    from dsv3_jax.planning.inference import decode_step

    step = decode_step(serving, batch, args.length, args.efficiency)
    parts = {n: getattr(step, n) for n in ("attention", "experts", "other", "links", "latency")}
    return {
        "batch": batch,
        "step_seconds": step.total,
        "seconds": parts,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_device_second": step.tokens_per_device_second,
    }
