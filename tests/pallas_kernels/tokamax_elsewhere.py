"""tokamax without the devices that it is for: its TPU kernels interpreted, its Hopper kernels lowered."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ahead_of_time import as_if

KINDS = {"v5p": ("TPU v5p", 2), "v6e": ("TPU v6e", 1), "tpu7x": ("TPU7x", 1)}  # and cores of what JAX calls a device


class Hopper(NamedTuple):
    """The device at hand, as tokamax asks for it."""

    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"
    core_count: int = 132


def pretend_hopper(monkeypatch) -> None:
    """Lets tokamax lower for a Hopper GPU."""
    monkeypatch.setattr("jax.extend.backend.get_default_device", Hopper)


@contextlib.contextmanager
def interpreted_tokamax(generation: str):
    """In its context tokamax's kernels for TPUs run on the CPU as on a generation's chip, on one core.

    jax 0.11.2's interpreter knows neither what starts a kernel on several cores nor references that are reshaped or
    read with a stride of 0. So this takes tokamax's way for one core, and resolves such references itself: in private
    parts of jax, since `pltpu.InterpretParams` has no place for it. What a kernel reads beyond its buffers, and what it
    never wrote, is NaN.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
    from tokamax._src import config

    accesses = {name: getattr(interpreter, name) for name in ("get", "store", "swap")}
    params = pltpu.InterpretParams(out_of_bounds_reads="uninitialized", uninitialized_memory="nan")
    with (
        pltpu.force_tpu_interpret_mode(params),
        config.disable_multi_core_mode(True),
        as_if(*KINDS[generation], "tpu"),
    ):
        try:
            for name, access in accesses.items():
                setattr(interpreter, name, _with_reshapes(interpreter, name, access.__wrapped__))
            yield
        finally:
            for name, access in accesses.items():
                setattr(interpreter, name, access)


def _with_reshapes(interpreter, name: str, access):
    """The interpreter's `access` to a buffer, for transforms that it doesn't know too."""
    from jax._src.state.types import ReshapeTransform

    def known(transform) -> bool:
        return not isinstance(transform, ReshapeTransform) and all(getattr(i, "stride", 1) for i in transform.indices)

    def where(transforms, shape) -> np.ndarray:  # in the flat buffer, -1 beyond it
        place = np.arange(np.prod(shape)).reshape(shape)
        for transform in transforms:
            if isinstance(transform, ReshapeTransform):
                place = place.reshape(transform.shape)
                continue
            for axis, i in reversed(list(enumerate(transform.indices))):
                span = int(i.start) + int(i.stride) * np.arange(int(i.size)) if hasattr(i, "stride") else int(i)
                beyond = np.full_like(place.take([0], axis), -1)
                place = np.append(place, beyond, axis).take(span, axis, mode="clip")
        return place

    def wrapper(token, device, core, space, buffer, transforms, *rest, **kw):
        if all(map(known, transforms)):
            return access(token, device, core, space, buffer, transforms, *rest, **kw)
        space = interpreter.TPU_MEMORY_SPACE_NAMES[int(space)]
        core = interpreter._local_core_id_or_zero_if_hbm(int(core), space)
        content = interpreter._get_shared_memory().mem[space, int(buffer), int(device), core].content
        place = where(transforms, content.shape)
        before = np.where(place < 0, np.nan, content.flat[place]).astype(content.dtype)
        if name != "get":
            content.flat[place[place >= 0]] = np.asarray(rest[0])[place >= 0]
        return token if name == "store" else (token, before)

    wrapper.__wrapped__ = wrapper  # what copies call
    return wrapper
