"""Compiles the real training step for TPUs that needn't be there, and sets the estimates beside the compiler's."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from dsv3_jax.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from dsv3_jax.planning.plan import PlanArgs

_GIB = 2**30


def topology_devices(name: str) -> Any:
    """Devices of a TPU topology such as `v5p:2x2x1`, described by libtpu without any TPU.

    Raises ConfigError if libtpu isn't installed or doesn't know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # don't ask the cloud for a machine that isn't there
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu raises several kinds
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"can't describe the topology {name!r} (`pip install libtpu` is needed): {reason}") from None


def aot_plan(args: PlanArgs, config: ModelConfig) -> dict[str, Any]:
    """Compiles the step that `args` describes for one chip of `args.aot`, and compares.

    Raises ConfigError for a plan of several devices: the step that is compiled is the unsharded one.
    """
    import jax
    import jax.numpy as jnp

    from dsv3_jax.config import Runtime
    from dsv3_jax.model.transformer import DeepSeekV3
    from dsv3_jax.planning.compiled import costs, device_bytes
    from dsv3_jax.planning.flops import count_flops
    from dsv3_jax.planning.hardware import hardware
    from dsv3_jax.planning.memory import memory
    from dsv3_jax.planning.mesh import Mesh, TrainingPlan
    from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
    from dsv3_jax.training.schedule import Schedule, ScheduleConfig
    from dsv3_jax.training.step import init_state, make_train_step

    topology = args.aot or ""
    if args.devices != 1 or args.mesh:
        raise ConfigError("--aot compiles the step of one chip: give --devices 1 and no --mesh")
    if args.batch > args.microbatch and args.batch % args.microbatch:
        raise ConfigError(f"batch {args.batch} isn't a multiple of microbatch {args.microbatch}")
    sheet = hardware(topology.split(":")[0].removeprefix("tpu"))
    place = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])

    runtime = Runtime(dtype="bfloat16", remat=args.remat)
    model, schedule = DeepSeekV3(config, runtime), Schedule(ScheduleConfig(steps=1000, batch_size=args.batch))
    optimizer = make_optimizer(OptimizerConfig(moments_dtype=args.moments), schedule)
    step = make_train_step(model, optimizer, schedule, microbatches=args.batch // args.microbatch)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((args.batch, args.length), jnp.int32)
    arguments = (state, {"tokens": tokens, "targets": tokens})
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(*placed).compile()
    seconds = time.perf_counter() - start

    plan = TrainingPlan(
        config,
        sheet,
        Mesh(),
        args.batch,
        args.length,
        args.microbatch,
        remat=args.remat,
        moment=4 if args.moments == "float32" else 2,
        fused_attention=False,
        mtp=bool(config.num_nextn_predict_layers),
    )
    used, estimate = device_bytes(compiled), memory(plan).total
    flops, counted = costs(compiled).flops, count_flops(step, *arguments, repeat_loops=False)
    gib, giga = (lambda x: f"{x / _GIB:.2f} GiB"), (lambda x: f"{x / 1e9:,.1f} GFLOP")
    rows = [
        ("memory", used, estimate, gib),
        ("FLOPs, bodies of loops once", flops, counted, giga),
    ]
    return {
        "kind": "aot",
        "model": args.preset if args.config is None else str(args.config),
        "topology": topology,
        "mesh": "one device",
        "compile_seconds": seconds,
        "fits": used <= sheet.memory,
        "rows": [
            {"what": what, "compiler": a, "estimate": b, "compiler_text": text(a), "estimate_text": text(b)}
            for what, a, b, text in rows
        ],
    }
