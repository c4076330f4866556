"""Compilation of kernels for absent accelerators."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# Generations and a small topology of each; bytes of vector memory of a core.
TPUS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
VMEM_BYTES = {"v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20}


def as_if(kind: str, cores: int | None, platform: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for a kind of device, with its number of cores, on "gpu" or "tpu"."""
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def as_if_hopper() -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for an H100."""
    return as_if("NVIDIA H100 80GB HBM3", None, "gpu")


def lower_for_hopper(function: Callable[..., Any], *args: Any) -> str:
    """Lowers `function` for an H100, and returns the module. args are arrays or ShapeDtypeStructs."""
    with as_if_hopper():
        return str(jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


def compile_for_tpu(
    generation: str, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles `function` for one chip of a TPU generation with libtpu.

    args are ShapeDtypeStructs; those with indices `donate` are donated.
    """
    device: Any = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[generation]).devices[0]
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)), args)
    # Our kernels say their precision; splash attention takes the default, and compiles with no other.
    default = jax.default_matmul_precision("default")
    with default, as_if(device.device_kind, getattr(device, "num_cores", 1), "tpu"):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()


def vmem_of_kernels(compiled: jax.stages.Compiled) -> list[int]:
    """Returns the vector memory (memory space 1) in bytes of each Pallas kernel of a compiled program, in order."""
    kernels = [line for line in str(compiled.as_text()).splitlines() if '"custom_call_config"' in line]
    used = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', " ".join(kernels))
    return [int(size) for size in re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', " ".join(used))]


def vmem_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the largest vector memory in bytes of any Pallas kernel of a compiled program."""
    return max(vmem_of_kernels(compiled), default=0)
