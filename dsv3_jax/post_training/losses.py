"""The objective of group relative policy optimisation (GRPO)."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.transformer import Outputs
from dsv3_jax.training.losses import Loss, LossSums, Metrics, ModelInputs, Whole, loss_sums, mean_metrics

Normalisation = Literal["token", "sequence"]
"""How the objective is averaged; see `GRPOLoss`."""


@struct.dataclass
class GRPOSums:
    """Sums over the sampled tokens of a batch, float32 scalars.

    policy: the clipped objective, negated. kl: to the reference, in nats. clipped: tokens with a clipped ratio. gap:
    absolute differences between the log-probabilities of training and sampling. tokens: their number. mtp: cross
    entropy of MTP modules.
    """

    policy: jax.Array
    kl: jax.Array
    clipped: jax.Array
    gap: jax.Array
    tokens: jax.Array
    mtp: LossSums


@dataclasses.dataclass(frozen=True)
class GRPOLoss(Loss):
    """GRPO (DeepSeekMath, eq. 3 and 4; DeepSeek-R1, section 2.2.1): a clipped ratio times the advantage, and a KL.

    A batch has, besides tokens and targets, for every target (B, T) float32: `advantages`, the same along a row;
    `old_logprobs`, by the policy that sampled; `reference_logprobs`, by the reference.

    clip_low, clip_high: the ratio's range is 1 - clip_low to 1 + clip_high; DAPO raises the latter. kl_weight: beta.
    normalise: "token" averages over all tokens of the batch (DAPO), "sequence" over each row's and then over rows.
    mtp_weight: of the MTP modules' cross entropy on the sampled tokens, whose gradient stays in them.
    """

    config: ModelConfig
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.01
    normalise: Normalisation = "token"
    mtp_weight: float = 0.1
    detach_mtp: bool = True
    batch_keys: tuple[str, ...] = ("advantages", "old_logprobs", "reference_logprobs")

    def __post_init__(self) -> None:
        if self.normalise not in typing.get_args(Normalisation):
            raise ConfigError(f"normalise is {self.normalise!r}: it must be 'token' or 'sequence'")
        for name in ("clip_low", "clip_high", "kl_weight", "mtp_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")

    def __call__(self, outputs: Outputs, inputs: ModelInputs, whole: Whole) -> tuple[jax.Array, GRPOSums]:
        mask, extra = inputs.masks[0], inputs.extra
        assert outputs.logits is not None, "GRPO needs the model whole: not over the stages of a pipeline"
        logprobs = jnp.where(mask, -outputs.logits.cross_entropy(inputs.targets[0])[0], 0)
        old, reference = (jnp.where(mask, extra[k], 0) for k in ("old_logprobs", "reference_logprobs"))
        objective, clipped = clipped_objective(logprobs, old, extra["advantages"], self.clip_low, self.clip_high)
        each = jnp.where(mask, self.kl_weight * kl_estimate(logprobs, reference) - objective, 0)
        if self.normalise == "token":
            loss = each.sum() / jnp.maximum(whole.tokens, 1)
        else:
            loss = (each.sum(1) / jnp.maximum(mask.sum(1), 1)).sum() / whole.sequences

        def total(x: jax.Array | float) -> jax.Array:
            return jnp.sum(jnp.where(mask, x, 0))

        mtp = loss_sums(outputs, inputs, self.config)
        loss += self.mtp_weight * mtp.mtp_cross_entropy / jnp.maximum(whole.tokens, 1)
        kl = total(kl_estimate(logprobs, reference))
        gap = total(jnp.abs(logprobs - old))
        return loss, GRPOSums(total(-objective), kl, total(clipped), gap, total(1.0), mtp)

    def metrics(self, sums: GRPOSums, whole: Whole) -> Metrics:
        metrics = {"loss": sums.policy, "kl": sums.kl, "clipped": sums.clipped, "sampling_gap": sums.gap}
        of_mtp = {k: v for k, v in mean_metrics(sums.mtp).items() if k.startswith("mtp")}
        return {name: value / jnp.maximum(sums.tokens, 1) for name, value in metrics.items()} | of_mtp


def clipped_objective(
    logprobs: jax.Array, old: jax.Array, advantages: jax.Array, low: float, high: float
) -> tuple[jax.Array, jax.Array]:
    """min(r A, clip(r, 1 - low, 1 + high) A) of r = exp(logprobs - old), and whether the clip decided it."""
    ratio = jnp.exp(logprobs - old)
    plain, cut = ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return jnp.minimum(plain, cut), cut < plain


def kl_estimate(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Unbiased, never negative estimate of the KL to the reference from one sample: q/p - log(q/p) - 1."""
    difference = reference - logprobs
    return jnp.exp(difference) - difference - 1


def group_advantages(rewards: Any) -> Any:
    """(r - mean) / std within each group: (groups, samples) -> the same. Zero where they are all equal."""
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean(1, keepdims=True)
    spread = rewards.std(1, keepdims=True)
    rounding = 1e-9 * np.maximum(1, np.abs(rewards).max(1, keepdims=True))
    return np.where(spread > rounding, centred / np.maximum(spread, rounding), 0.0)
