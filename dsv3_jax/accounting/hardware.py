"""Hardware data sheets: vendors' figures with sources, and the fraction of them that sparse training sustains."""

from __future__ import annotations

import dataclasses

from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Figures of one accelerator from its vendor. Bandwidths are in bytes/s, in one direction.

    flops: dense peak by operand dtype, in FLOP/s; no entry "fp8" means that the matrix units don't support it.
    domain: devices that the fast links join: an NVLink node, a TPU pod.
    links: bytes/s of all fast links of a device together. network: bytes/s per device beyond the domain.
    torus_axes: dimensions of the torus that the links form; 0 behind a switch.
    latency: seconds per hop (torus) or per transfer (switch).
    matmul_rows: fewer rows than this take as long as this many.
    watts: per device, where published. dollars_per_hour: where a published price is part of a claim.
    """

    name: str
    title: str
    family: str
    flops: dict[str, float]
    memory: float
    bandwidth: float
    domain: int
    links: float
    network: float
    torus_axes: int
    latency: float
    matmul_rows: int
    watts: float | None
    dollars_per_hour: float | None
    sources: tuple[str, ...]

    def peak(self, operand: str) -> float:
        """Peak FLOP/s with operands of this dtype, or with bfloat16 if the dtype isn't native."""
        return self.flops.get(operand, self.flops["bf16"])

    @property
    def efficiency(self) -> float:
        return EFFICIENCY[self.family].value


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The efficiency of a hardware family: the fraction of every rate in its data sheets that a plan assumes."""

    value: float
    source: str


EFFICIENCY = {
    "NVIDIA": Efficiency(
        468 / 989,
        "Megatron-Core 0.9 trains Mixtral 8x7B in bfloat16 at 468 TFLOP/s of H100's 989 (its MoE README); "
        "also used for B200",
    ),
    "TPU v5": Efficiency(
        0.5256,
        "MaxText trains Mixtral 8x7B on v5p-256 at 52.56% (its docs/reference/models/tiering.md); also for v5e",
    ),
    "TPU v6": Efficiency(0.3523, "MaxText trains Mixtral 8x7B on v6e-256 at 35.23% (the same page); also used for 7x"),
}
"""All three were measured with a different model from those that are planned or compared here."""

_NVIDIA_LATENCY = 3.5e-6  # 64 bytes end to end: NVLink 3.33 us, InfiniBand 2.8 to 3.7 us
_TPU_HOP = 1e-6
_GIB = 2**30
_ISCA = "arXiv 2505.09343 (links and latencies of the H800 cluster)"
_SCALING = "How to Scale Your Model (about 1 us a hop of ICI)"
_HOPPER_SHEET = "NVIDIA H100 data sheet (dense rates are half of those printed with sparsity)"

HARDWARE = {
    h.name: h
    for h in (
        Hardware(
            "h800",
            "NVIDIA H800 SXM",
            "NVIDIA",
            {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
            80e9,
            3.35e12,
            domain=8,
            links=200e9,
            network=50e9,
            torus_axes=0,
            latency=_NVIDIA_LATENCY,
            matmul_rows=64,
            watts=700,
            dollars_per_hour=2.0,
            sources=(_HOPPER_SHEET, _ISCA, "arXiv 2412.19437, table 1 ($2 an hour)"),
        ),
        Hardware(
            "h100",
            "NVIDIA H100 SXM",
            "NVIDIA",
            {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
            80e9,
            3.35e12,
            domain=8,
            links=450e9,
            network=50e9,
            torus_axes=0,
            latency=_NVIDIA_LATENCY,
            matmul_rows=64,
            watts=700,
            dollars_per_hour=None,
            sources=(_HOPPER_SHEET, "DGX H100 data sheet (one 400 Gb/s port a GPU)", _ISCA),
        ),
        Hardware(
            "h200",
            "NVIDIA H200 SXM",
            "NVIDIA",
            {"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
            141e9,
            4.8e12,
            domain=8,
            links=450e9,
            network=50e9,
            torus_axes=0,
            latency=_NVIDIA_LATENCY,
            matmul_rows=64,
            watts=700,
            dollars_per_hour=None,
            sources=("NVIDIA H200 data sheet", "DGX H200 data sheet (one 400 Gb/s port a GPU)", _ISCA),
        ),
        Hardware(
            "b200",
            "NVIDIA B200 (HGX)",
            "NVIDIA",
            {"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12},
            180e9,
            8.0e12,
            domain=8,
            links=900e9,
            network=50e9,
            torus_axes=0,
            latency=_NVIDIA_LATENCY,
            matmul_rows=64,
            watts=1000,
            dollars_per_hour=None,
            sources=("NVIDIA HGX B200 data sheet", "DGX B200 data sheet (one 400 Gb/s port a GPU)", _ISCA),
        ),
        Hardware(
            "v5e",
            "TPU v5e",
            "TPU v5",
            {"bf16": 197e12, "int8": 393e12},
            16 * _GIB,
            819e9,
            domain=256,
            links=200e9,
            network=3.125e9,
            torus_axes=2,
            latency=_TPU_HOP,
            matmul_rows=128,
            watts=None,
            dollars_per_hour=None,
            sources=("docs.cloud.google.com/tpu/docs/v5e", _SCALING),
        ),
        Hardware(
            "v5p",
            "TPU v5p",
            "TPU v5",
            {"bf16": 459e12},
            95 * _GIB,
            2765e9,
            domain=8960,
            links=600e9,
            network=6.25e9,
            torus_axes=3,
            latency=_TPU_HOP,
            matmul_rows=128,
            watts=None,
            dollars_per_hour=None,
            sources=("docs.cloud.google.com/tpu/docs/v5p", "docs.cloud.google.com/tpu/docs/tpu7x", _SCALING),
        ),
        Hardware(
            "v6e",
            "TPU v6e (Trillium)",
            "TPU v6",
            {"bf16": 918e12, "int8": 1836e12},
            32 * _GIB,
            1638e9,
            domain=256,
            links=400e9,
            network=12.5e9,
            torus_axes=2,
            latency=_TPU_HOP,
            matmul_rows=256,
            watts=None,
            dollars_per_hour=None,
            sources=("docs.cloud.google.com/tpu/docs/v6e", "docs.cloud.google.com/tpu/docs/tpu7x", _SCALING),
        ),
        Hardware(
            "7x",
            "TPU7x (Ironwood)",
            "TPU v6",
            {"bf16": 2307e12, "fp8": 4614e12},
            192 * _GIB,
            7380e9,
            domain=9216,
            links=600e9,
            network=12.5e9,
            torus_axes=3,
            latency=_TPU_HOP,
            matmul_rows=256,
            watts=None,
            dollars_per_hour=None,
            sources=("docs.cloud.google.com/tpu/docs/tpu7x", _SCALING),
        ),
    )
}


def hardware(name: str) -> Hardware:
    """Returns a data sheet by name. Raises ConfigError, listing the names, if there is none."""
    if name not in HARDWARE:
        raise ConfigError(f"unknown hardware {name!r}: the sheets are {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hardware_of(device_kind: str) -> Hardware | None:
    """Returns the data sheet for a JAX device by its `device_kind`; None if there is none, as for a CPU."""
    name = _DEVICE_KINDS.get(device_kind)
    return HARDWARE[name] if name else None


_DEVICE_KINDS = {
    "NVIDIA H800": "h800",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}
