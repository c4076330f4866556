"""The device for which a kernel is compiled."""

from __future__ import annotations

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
TPUS = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")


def _target() -> tuple[str, str]:
    """Platform and kind of the abstract mesh's device (for ahead-of-time compilation), or of the first device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.devices()[0] if abstract is None else abstract
    return device.platform, device.device_kind


def platform() -> str:
    """Returns the target's platform: "cpu", "gpu" or "tpu"."""
    name = _target()[0]
    return "gpu" if name in ("cuda", "rocm") else name


def has_tpu_kernels() -> bool:
    """Whether the target is a TPU of a kind for which tests compile the kernels."""
    name, kind = _target()
    return name == "tpu" and kind in TPUS


def is_hopper() -> bool:
    """Whether the target is a Hopper GPU (compute capability 9.0)."""
    platform, kind = _target()
    return platform in ("gpu", "cuda") and any(name in kind for name in HOPPER)


def require_hopper(kernel: str) -> None:
    """Raises ValueError unless the target is a Hopper GPU."""
    if not is_hopper():
        raise ValueError(
            f"{kernel} for GPUs needs a Hopper GPU ({', '.join(HOPPER)}), but the device is {_target()[1]}"
        )


def require_tpu(kernel: str) -> None:
    """Raises ValueError unless `has_tpu_kernels`."""
    if not has_tpu_kernels():
        raise ValueError(f"{kernel} for TPUs needs one of {', '.join(TPUS)}, but the device is {_target()[1]}")


def interpreter[T](kernel: str, implementation: str, parameters: T) -> T | None:
    """Returns `parameters`, with which "gpu_interpret" runs a Mosaic kernel on a CPU, or None for "gpu".

    Raises ValueError for "gpu" unless the target is a Hopper GPU.
    """
    if implementation == "gpu":
        require_hopper(kernel)
    return parameters if implementation == "gpu_interpret" else None
