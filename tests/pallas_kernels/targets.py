"""Compiling for accelerators that aren't there."""

from __future__ import annotations

import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

TPUS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
VMEM_BYTES = {"v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20}


def _as_if(kind: str, cores: int | None, platform: str):
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def as_if_hopper():
    """In its context, programs are traced as for an H100."""
    return _as_if("NVIDIA H100 80GB HBM3", None, "gpu")


def lower_for_hopper(function, *args) -> str:
    """The module of `function` lowered for an H100; args are arrays or ShapeDtypeStructs."""
    with as_if_hopper():
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def compile_for_tpu(generation: str, function, *args):
    """`function` compiled for one chip of a TPU generation; args are ShapeDtypeStructs."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[generation]).devices[0]
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=SingleDeviceSharding(device)), args)
    # Our kernels say their precision; splash attention takes the default, which the tests otherwise set to the highest.
    default = jax.default_matmul_precision("default")
    with default, _as_if(device.device_kind, getattr(device, "num_cores", 1), "tpu"):
        return jax.jit(function).lower(*placed).compile()


def vmem_bytes(compiled) -> int:
    """What the greediest Pallas kernel of a compiled program takes of the vector memory (memory space 1)."""
    kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    used = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', " ".join(kernels))
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', " ".join(used))
    return max(map(int, sizes), default=0)
