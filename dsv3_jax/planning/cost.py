"""Conversions between device-hours, days, price and energy."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """device_hours: over all devices. days: of wall time. dollars, megawatt_hours: None if the price or power is
    unknown; energy is the rated power of the devices alone, without hosts, network or cooling.
    """

    device_hours: float
    days: float
    dollars: float | None
    megawatt_hours: float | None


def cost(device_hours: float, devices: int, dollars_per_hour: float | None, watts: float | None) -> Cost:
    """Days, price and energy of `device_hours` on `devices`."""
    return Cost(
        device_hours,
        device_hours / devices / 24,
        None if dollars_per_hour is None else device_hours * dollars_per_hour,
        None if watts is None else device_hours * watts / 1e6,
    )


def training_hours(tokens: float, flops_per_token: float, peak: float, mfu: float) -> float:
    """Device-hours to train on `tokens`: tokens x FLOPs per token / (peak x MFU)."""
    return tokens * flops_per_token / (peak * mfu) / 3600


def sustained_flops(tokens: float, flops_per_token: float, device_hours: float) -> float:
    """Sustained FLOP/s per device if training on `tokens` took `device_hours`."""
    return tokens * flops_per_token / (device_hours * 3600)


def tokens_for(dollars: float, dollars_per_hour: float, flops_per_token: float, sustained: float) -> float:
    """Number of tokens that a budget trains at a price and a sustained rate."""
    return dollars / dollars_per_hour * 3600 * sustained / flops_per_token
