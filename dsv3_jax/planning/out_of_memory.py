"""The error message for a training run out of device memory: the planner's estimate, and options that reduce it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from dsv3_jax.accounting.hardware import hardware
from dsv3_jax.config import ConfigError
from dsv3_jax.model.auto import attention_impl
from dsv3_jax.parallel.rules import rules_of
from dsv3_jax.planning.memory import memory
from dsv3_jax.planning.training_plan import TrainingPlan
from dsv3_jax.training.config import TrainConfig


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is XLA's about a failed allocation."""
    return "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(config: TrainConfig) -> str:
    """Describes in one line what is large on the fullest device, as estimated, and which option reduces it."""
    try:
        parts = memory_parts(config)
    except ConfigError as error:  # nothing that training refuses, but the planner counts whole sequences
        return f"out of device memory; the planner can't count this run ({error}): try a larger microbatches"
    listed = sorted(parts.items(), key=lambda part: -part[1])
    sizes = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in listed if size >= 0.01 * sum(parts.values()))
    return (
        f"out of device memory. Per device the planner counts {sizes}, {sum(parts.values()) / 1e9:.2f} GB in all. "
        f"To shrink {listed[0][0]}: {_remedy(config, listed[0][0])}"
    )


def memory_parts(config: TrainConfig) -> dict[str, float]:
    """Bytes on the fullest device by purpose, with the fields of `planning.memory.Memory`."""
    length, runtime = config.data.sequence_length, config.runtime
    pieces = config.mesh.replicas * config.microbatches
    size = -(-config.schedule.batch_size // pieces)
    attention = attention_impl(runtime, config.model, tokens=length, keys=length, cached=False)
    plan = TrainingPlan(
        config.model,
        hardware("h100"),  # sizes don't depend on it
        config.mesh,
        pieces * size,
        length,
        size,
        remat=runtime.remat,
        stored=jnp.dtype(runtime.param_dtype).itemsize,
        moment=jnp.dtype(config.optimizer.moments_dtype).itemsize,
        weight=0 if runtime.dtype == runtime.param_dtype else jnp.dtype(runtime.dtype).itemsize,
        zero1=bool(rules_of(runtime).zero),
        pipeline_schedule=runtime.pipeline,
        fused_attention="reference" not in attention,
        mtp=bool(config.model.num_nextn_predict_layers),
    )
    parts: dict[str, float] = dataclasses.asdict(memory(plan))
    for name in ("activations", "working", "gathered"):
        parts[name] *= jnp.dtype(runtime.dtype).itemsize / 2  # the planner's are of bfloat16
    return parts


def _remedy(config: TrainConfig, part: str) -> str:
    microbatches = f"--microbatches {2 * config.microbatches} (now {config.microbatches})"
    if config.schedule.batch_size % (2 * config.microbatches):
        microbatches = f"more --microbatches (now {config.microbatches})"
    shard = f"cut it over more devices, --mesh.fsdp (now {config.mesh.fsdp}) with --runtime.sharding fsdp_ep"
    match part:
        case "activations":
            remat = " or --runtime.remat block (now none)" if config.runtime.remat == "none" else ""
            return f"{microbatches}{remat}"
        case "working":
            return f"{microbatches}, or a shorter --data.sequence-length (now {config.data.sequence_length})"
        case "moments" if config.optimizer.moments_dtype == "float32":
            return f"--optimizer.moments-dtype bfloat16 (now float32), or {shard}"
        case "gathered":
            return f"--mesh.tensor {2 * config.mesh.tensor} (now {config.mesh.tensor})"
    return shard
