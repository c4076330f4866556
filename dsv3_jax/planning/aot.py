"""Compiles the real training step for a TPU topology without the hardware, and compares the planner's estimates."""

from __future__ import annotations

import os
import time
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.planning.options import PlanArgs

_GIB = 2**30


def topology_devices(name: str) -> Any:
    """Returns the devices of a TPU topology such as `v5p:2x2x1`, described by libtpu without any TPU.

    Raises ConfigError if libtpu isn't installed or doesn't know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # don't ask the cloud for a machine that isn't there
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so processes needn't take turns
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu raises several kinds
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"can't describe the topology {name!r} (`pip install libtpu` is needed): {reason}") from None


def aot_plan(args: PlanArgs, config: ModelConfig) -> dict[str, Any]:
    """Compiles the step that `args` describes for the topology `args.aot` and the mesh `args.mesh`, and compares.

    Without a mesh, the step is that of one chip.

    Raises ConfigError if mesh, topology, batch and microbatch don't fit together, or for another precision or pipeline
    schedule than those that are compiled.
    """
    import jax
    import jax.numpy as jnp

    from dsv3_jax.accounting.flops import count_flops
    from dsv3_jax.accounting.hardware import hardware
    from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
    from dsv3_jax.parallel.mesh import MeshShape
    from dsv3_jax.parallel.placement import Placement
    from dsv3_jax.planning.compiled import collectives, costs, device_bytes
    from dsv3_jax.planning.memory import memory
    from dsv3_jax.planning.training_plan import TrainingPlan
    from dsv3_jax.runtime import Runtime
    from dsv3_jax.training.losses import PretrainingLoss
    from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
    from dsv3_jax.training.schedule import Schedule, ScheduleConfig
    from dsv3_jax.training.step import init_state, make_train_step

    for name, compiled_with in (("precision", "bf16"), ("pipeline_schedule", "1f1b")):
        if (value := getattr(args, name)) != compiled_with:
            raise ConfigError(
                f"{name} is {value}: --aot compiles steps with precision bf16 and pipeline_schedule 1f1b only"
            )
    topology, mesh = args.aot or "", MeshShape.parse(args.mesh)
    sheet = hardware(topology.split(":")[0].removeprefix("tpu"))
    devices = list(topology_devices(topology))
    plan = TrainingPlan(
        config,
        sheet,
        mesh,
        args.batch,
        args.length,
        args.microbatch_size,
        remat=args.remat,
        moment=4 if args.moments == "float32" else 2,
        zero1=mesh.stage > 1,
        fused_attention=args.attention != "reference",
        mtp=bool(config.num_nextn_predict_layers),
    )
    runtime = Runtime(
        dtype="bfloat16",
        attention_impl=args.attention,
        experts_impl="ragged",
        remat=args.remat,
        sharding="single" if mesh.devices == 1 else "pp_ep_dp" if mesh.stage > 1 else "fsdp_ep",
        dispatch="ragged_all_to_all",
    )
    model, schedule = DeepSeekV3(config, runtime), Schedule(ScheduleConfig(steps=1000, batch_size=args.batch))
    optimizer = make_optimizer(OptimizerConfig(moments_dtype=args.moments), schedule)
    placement = Placement(mesh, runtime, parameter_axes(model), devices[:1] if mesh.devices == 1 else devices)
    step = make_train_step(model, optimizer, PretrainingLoss(model.config, schedule), microbatches=plan.microbatches)
    tokens = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    state, batch = placement.abstract(
        lambda key: init_state(model, optimizer, key), {"tokens": tokens, "targets": tokens}
    )
    start = time.perf_counter()
    compiled = placement.lower(step, state, batch).compile()
    seconds = time.perf_counter() - start

    used, estimate = device_bytes(compiled), memory(plan).total
    chips = len({tuple(d.coords) for d in devices})
    room = sheet.memory * chips // len(devices)  # some chips are several devices, which share their memory
    sent: dict[tuple[str, str], int] = {}
    for c in collectives(compiled):
        if "cond/branch_0" in c.where:
            continue  # the exchange of tokens in several rounds, for batches that are routed very unevenly
        key = c.kind, " x ".join(c.axes)
        sent[key] = sent.get(key, 0) + c.bytes * c.times
    gib, giga = (lambda x: f"{x / _GIB:.2f} GiB"), (lambda x: f"{x / 1e9:,.1f} GFLOP")
    rows: list[tuple[str, float, float, Any]] = [("memory", used, estimate, gib)]
    if mesh.devices == 1:  # what is counted in a program over many devices isn't one device's
        counted = count_flops(step, state, batch, repeat_loops=False)
        rows.append(("FLOPs, bodies of loops once", costs(compiled).flops, counted, giga))
    return {
        "kind": "aot",
        "model": args.preset if args.config is None else str(args.config),
        "topology": topology,
        "mesh": str(mesh),
        "compile_seconds": seconds,
        "memory": room,
        "fits": used <= room,
        "rows": [
            {"what": what, "compiler": a, "estimate": b, "compiler_text": text(a), "estimate_text": text(b)}
            for what, a, b, text in rows
        ],
        "collectives": [
            {"kind": kind, "axes": axes, "bytes": total}
            for (kind, axes), total in sorted(sent.items(), key=lambda x: -x[1])
        ],
    }
