"""`python -m dsv3_jax plan`: memory, step time and cost of training or serving."""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.planning.options import PlanArgs, check


def plan_command(args: PlanArgs) -> None:
    """Prints the plan as tables, or as a JSON object with `args.json`."""
    check(args)
    if args.validate:
        from dsv3_jax.planning import published

        rows = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in published.compare()]
        print(jsonlib.dumps(rows, indent=2) if args.json else published.markdown())
        return
    config = ModelConfig.preset(args.preset) if args.config is None else ModelConfig.from_hf(args.config)
    if not args.mtp:
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
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


# Training --------------------------------------------------------------------------------------------------


def training_plan(args: PlanArgs, config: ModelConfig) -> dict[str, Any]:
    """Returns the plan as plain values, for the requested mesh or for the fastest that fit."""
    from dsv3_jax.accounting.hardware import hardware
    from dsv3_jax.parallel.mesh import MeshShape
    from dsv3_jax.planning.training_plan import TrainingPlan, meshes

    sheet = hardware(args.hardware)
    if sheet.torus_axes == 0 and args.devices > sheet.domain and args.devices % sheet.domain:
        raise ConfigError(f"{args.devices} devices don't make whole nodes of {sheet.domain} {sheet.title}")
    if args.devices > sheet.domain and sheet.torus_axes and args.devices % sheet.domain:
        raise ConfigError(f"{args.devices} devices don't make whole pods of {sheet.domain} {sheet.title}")
    base = TrainingPlan(
        config,
        sheet,
        MeshShape(),
        args.batch,
        args.length,
        args.microbatch_size,
        args.precision,
        args.remat,
        moment=4 if args.moments == "float32" else 2,
        weight=1 if args.precision == "fp8" else 2,
        pipeline_schedule=args.pipeline_schedule,
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
                f"no mesh of {args.devices} devices takes {args.batch} sequences per step: data x fsdp x expert must "
                f"divide {args.batch // args.microbatch_size}, expert n_routed_experts, tensor the heads"
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
    """Plans decoding of `args.batch` sequences of `args.length` cached tokens, in 1 byte (FP8) or 2 per weight."""
    from dsv3_jax.accounting.hardware import hardware
    from dsv3_jax.planning.serving import (
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
    from dsv3_jax.planning.serving import decode_step

    step = decode_step(serving, batch, args.length, args.efficiency)
    parts = {n: getattr(step, n) for n in ("attention", "experts", "other", "links", "latency")}
    return {
        "batch": batch,
        "step_seconds": step.total,
        "seconds": parts,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_device_second": step.tokens_per_device_second,
    }
