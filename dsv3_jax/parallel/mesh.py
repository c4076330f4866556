"""The device mesh: seven named axes, any of which may have size 1."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsv3_jax.config import ConfigError

AXES = ("stage", "data", "fsdp", "node", "expert", "context", "tensor")
"""Names of the axes, from outermost to innermost: neighbours along `tensor` are the closest devices."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes. `parallel.rules` says what each shards.

    Experts are sharded over `node` x `expert`: `node` is the slow network, which a token crosses at most once per node,
    and `expert` the fast one within a node.
    """

    stage: int = 1
    data: int = 1
    fsdp: int = 1
    node: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"mesh.{name} is {size!r}: it must be a whole number of devices, at least 1")

    @property
    def devices(self) -> int:
        return math.prod(dataclasses.astuple(self))

    @property
    def expert_parallel(self) -> int:
        """Number of devices that routed experts are sharded over."""
        return self.node * self.expert

    @property
    def replicas(self) -> int:
        """Number of parts that a training batch is sharded into."""
        return self.data * self.fsdp * self.expert_parallel

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Parses text such as `stage=16,data=2,expert=64`. Raises ConfigError if it is invalid."""
        sizes = {}
        for part in filter(None, text.split(",")):
            name, _, size = part.partition("=")
            if name.strip() not in AXES or not size.strip().isdecimal() or int(size) < 1 or name.strip() in sizes:
                raise ConfigError(f"mesh {text!r}: {part!r} isn't AXIS=SIZE, each axis once, of {', '.join(AXES)}")
            sizes[name.strip()] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{n}={s}" for n, s in dataclasses.asdict(self).items() if s > 1) or "one device"


def make_mesh(shape: MeshShape | None = None, devices: list[jax.Device] | None = None, **sizes: int) -> Mesh:
    """Makes a mesh from `shape` or from axis sizes, such as `fsdp=4, expert=2`, arranged for the devices' network.

    devices: by default all devices of the job.

    Raises ConfigError unless the sizes multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = MeshShape(**sizes) if shape is None else dataclasses.replace(shape, **sizes)
    if shape.devices != len(devices):
        raise ConfigError(
            f"mesh {shape} has {shape.devices} devices, but there are {len(devices)}: the sizes of "
            f"{', '.join(AXES)} must multiply to that"
        )
    lengths = dataclasses.astuple(shape)
    arranged = mesh_utils.create_device_mesh(lengths, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
