"""Training losses: next token, multi-token prediction, balance (report eq. 17 to 20 and 24 to 25)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.router import CHOICES, RouterStats
from dsv3_jax.model.transformer import DeepSeekV3, Outputs, router_stats
from dsv3_jax.parallel.context import sequence_order
from dsv3_jax.training.schedule import Schedule

Batch = Mapping[str, Any]
"""`tokens` and `targets` (B, T) int32, the latter one token ahead, or `IGNORE` where masked; `segments` and `positions`
(B, T) int32 if attention is restricted to documents; `experts`, as `chosen_experts` returns them, if tokens are to go
to those; and the `batch_keys` of the loss.
"""

Metrics = dict[str, jax.Array]

_KEYS = ("tokens", "targets", "segments", "positions", "experts")

IGNORE = -100
"""The target at masked positions, as in PyTorch and transformers."""


@struct.dataclass
class Whole:
    """The whole batch, of which a loss gets a piece. step: int32. tokens, sequences: numbers of targets and rows."""

    step: jax.Array
    tokens: jax.Array
    sequences: jax.Array


class Loss:
    """The objective of a training step, as sums over pieces: of the batch, and of the model in a pipeline."""

    batch_keys: tuple[str, ...] = ()
    """Further arrays (B, T) of the batch that the loss reads from `ModelInputs.extra`."""
    detach_mtp: bool = False
    """Whether to stop the gradient of MTP predictions at the MTP modules, so that they don't affect the model."""

    def __call__(self, outputs: Outputs, inputs: ModelInputs, whole: Whole) -> tuple[jax.Array, Any]:
        """Returns the contribution of this piece to the objective, a scalar, and sums for metrics, a pytree.

        outputs: in a pipeline, those of one stage: `logits` is None except on the last, and `stats` is for its own
          layers.
        """
        raise NotImplementedError

    def metrics(self, sums: Any, whole: Whole) -> Metrics:
        """Computes metrics from the sums over all pieces."""
        return {}

    def bias_update_speed(self, step: jax.Array) -> jax.Array:
        """Gamma of auxiliary-loss-free balancing at this step; 0 for no update of router biases."""
        return jnp.zeros((), jnp.float32)


@struct.dataclass
class LossSums:
    """Sums over the tokens of a batch, which add up over pieces. float32 scalars.

    cross_entropy: of the next token, in nats. mtp_cross_entropy: of MTP, a mean over depths.
    tokens, mtp_tokens: numbers of targets. mtp_correct: MTP targets that equal the argmax.
    balance: eq. 17 without its factor, summed over sequences and layers. sequences: their number. depths: of MTP.
    sparse: whether there are sparse layers. The last two are Python values.
    """

    cross_entropy: jax.Array
    tokens: jax.Array
    mtp_cross_entropy: jax.Array
    mtp_tokens: jax.Array
    mtp_correct: jax.Array
    balance: jax.Array
    sequences: jax.Array
    depths: int = struct.field(pytree_node=False)
    sparse: bool = struct.field(pytree_node=False)


@struct.dataclass
class StepSums:
    """Sums over the pieces of a batch: the objective, the sums of the loss, and tokens sent to each expert.

    load: {"moe_layers": (L, E), "mtp_0": (E,), ...}, float32, with the keys of the `router` collection.
    exchanges: see `model.transformer.exchanges`.
    """

    objective: jax.Array
    loss: Any
    load: dict[str, jax.Array]
    exchanges: jax.Array


@dataclasses.dataclass(frozen=True)
class PretrainingLoss(Loss):
    """CE + lambda/D sum_k CE_k (eq. 24, 25) + alpha sum over layers of the balance loss (eq. 17).

    config: of the model, with alpha. schedule: returns lambda and gamma at a step.
    """

    config: ModelConfig
    schedule: Schedule

    def __call__(self, outputs: Outputs, inputs: ModelInputs, whole: Whole) -> tuple[jax.Array, LossSums]:
        sums, alpha = loss_sums(outputs, inputs, self.config), self.config.aux_loss_alpha
        return objective(sums, alpha, self.schedule.mtp_weight(whole.step), whole.tokens, whole.sequences), sums

    def metrics(self, sums: LossSums, whole: Whole) -> Metrics:
        return mean_metrics(sums) | {"learning_rate": self.schedule.learning_rate(whole.step)}

    def bias_update_speed(self, step: jax.Array) -> jax.Array:
        return self.schedule.bias_update_speed(step)


@dataclasses.dataclass(frozen=True)
class SFTLoss(Loss):
    """Cross entropy of the targets, and of the MTP modules, whose gradient is stopped at the modules.

    The modules follow the model, whose own training is unaffected.
    """

    config: ModelConfig
    mtp_weight: float = 0.1
    detach_mtp: bool = True

    def __call__(self, outputs: Outputs, inputs: ModelInputs, whole: Whole) -> tuple[jax.Array, LossSums]:
        sums = loss_sums(outputs, inputs, self.config)
        predicted = sums.cross_entropy + self.mtp_weight * sums.mtp_cross_entropy
        return predicted / jnp.maximum(whole.tokens, 1), sums

    def metrics(self, sums: LossSums, whole: Whole) -> Metrics:
        return mean_metrics(sums)


def balance_loss(stats: RouterStats) -> jax.Array:
    """The sequence-wise balance loss, sum_i f_i P_i (eq. 17 without alpha): stats of (..., B, E) -> (..., B)."""
    return jnp.sum(stats.fraction * stats.affinity, axis=-1)


def shift_left(x: jax.Array, by: int) -> jax.Array:
    """Shifts x[:, i + by] to x[:, i]. The last `by` entries repeat the last one; the caller must mask them."""
    return jnp.concatenate([x[:, by:], jnp.repeat(x[:, -1:], by, axis=1)], axis=1) if by else x


def predictable(batch: Batch, ahead: int) -> jax.Array:
    """Mask (B, T) of positions with a target `ahead` tokens later, within the sequence and, with segments, the
    document.

    The last target of a row, just after it, belongs to the document of the row's last token. Targets that are `IGNORE`
    are masked.
    """
    tokens, segments, targets = batch["tokens"], batch.get("segments"), batch.get("targets")
    there = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < tokens.shape[1] - (ahead - 1), tokens.shape)
    if segments is not None:
        there &= shift_left(segments, ahead) == segments
    if targets is not None:
        there &= shift_left(targets, ahead - 1) != IGNORE
    return there


@struct.dataclass
class ModelInputs:
    """A batch as input of the model, with tokens in the order in which devices hold them (context parallelism).

    further_tokens: (B, T) each, the tokens 1 to D ahead, for the MTP modules. targets, masks: (B, T) each, of
    the next token and of the one k further, for k up to D; `masks` says which of them exist. where: `positions`,
    `segments` and `order` for the model's methods. extra: the loss's own arrays (B, T). sequences: their number,
    without padding. experts: the collection `CHOICES` if the batch says which experts its tokens go to, else empty.
    """

    tokens: jax.Array
    further_tokens: tuple[jax.Array, ...]
    targets: tuple[jax.Array, ...]
    masks: tuple[jax.Array, ...]
    where: dict[str, Any]
    extra: dict[str, jax.Array]
    sequences: jax.Array | int
    experts: Mapping[str, Any]


@jax.named_scope("model_inputs")
def model_inputs(
    model: DeepSeekV3, batch: Batch, batch_keys: tuple[str, ...] = (), real: jax.Array | None = None
) -> ModelInputs:
    """Prepares everything that depends on the order of tokens, before they are permuted for context parallelism.

    Args:
      batch_keys: additional keys that the loss reads.
      real: (B,) bool, false for padding, whose targets are all `IGNORE`; None if there is no padding.

    Raises:
      ValueError: the batch has an unknown key, which would otherwise silently have no effect.
    """
    if unknown := sorted(set(batch) - {*_KEYS, *batch_keys}):
        raise ValueError(f"a batch has {unknown[0]!r}: its keys are {', '.join((*_KEYS, *batch_keys))}")
    tokens, ahead = batch["tokens"], range(model.config.num_nextn_predict_layers + 1)
    last = batch["targets"][:, -1:]
    following = jnp.concatenate([tokens[:, 1:], jnp.where(last == IGNORE, tokens[:, -1:], last)], axis=1)
    order = sequence_order(tokens.shape[1], model.runtime)

    def permute(x: jax.Array) -> jax.Array:
        return x if order is None else x[:, order]

    def in_layers(ids: jax.Array) -> jax.Array:
        return jnp.moveaxis(ids if order is None else jnp.take(ids, order, axis=-2), 0, -3)

    positions, segments = batch.get("positions"), batch.get("segments")
    if order is not None and positions is None:
        positions = jnp.broadcast_to(jnp.arange(len(order), dtype=jnp.int32), tokens.shape)
    return ModelInputs(
        permute(tokens),
        tuple(permute(shift_left(following, k)) for k in ahead[:-1]),
        tuple(permute(shift_left(batch["targets"], k)) for k in ahead),
        tuple(permute(predictable(batch, k + 1)) for k in ahead),
        {
            "positions": None if positions is None else permute(positions),
            "segments": None if segments is None else permute(segments),
            "order": None if order is None else jnp.asarray(order),
        },
        {key: permute(batch[key]) for key in batch_keys},
        tokens.shape[0] if real is None else jnp.sum(real),
        jax.tree.map(in_layers, batch.get("experts", {})),
    )


def forward(model: DeepSeekV3, variables: Mapping[str, Any], inputs: ModelInputs, detach_mtp: bool = False) -> Outputs:
    """Returns the model's outputs for a batch, including MTP and routing. `detach_mtp`: see `Loss`."""
    how, variables = inputs.where | {"detach_mtp": detach_mtp}, {**variables, **inputs.experts}
    outputs = model.apply(variables, inputs.tokens, inputs.further_tokens, method="forward", **how)
    return cast(Outputs, outputs)


def chosen_experts(model: DeepSeekV3, variables: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """The experts of each token of a batch, as its key `experts`: a step of other weights then sends it to the same.

    Ids (B, ..., T, K) int32 per gate, the dots for the layers of a stack.
    """
    inputs = model_inputs(model, batch)
    call: Any = functools.partial(model.apply, method="forward", mutable=[CHOICES], **inputs.where)
    _, chosen = call(variables, inputs.tokens, inputs.further_tokens)
    return {CHOICES: jax.tree.map(lambda ids: jnp.moveaxis(ids, -3, 0), chosen[CHOICES])}


def forward_sums(model: DeepSeekV3, variables: Mapping[str, Any], batch: Batch) -> LossSums:
    """Runs the model on a batch, and sums everything that the pre-training objective and metrics need."""
    inputs = model_inputs(model, batch)
    return loss_sums(forward(model, variables, inputs), inputs, model.config)


def loss_sums(outputs: Outputs, inputs: ModelInputs, config: ModelConfig) -> LossSums:
    """Sums the outputs of the model over a batch or, for a pipeline stage, the outputs of that stage."""
    wide = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(outputs)))
    zero, depths = jnp.zeros((), wide), config.num_nextn_predict_layers
    nll = tokens = sequences = mtp_nll = mtp_count = mtp_correct = zero
    if outputs.logits is not None:
        mask = inputs.masks[0]
        nll = outputs.logits.cross_entropy_sum(inputs.targets[0], mask)[0]
        tokens = jnp.sum(mask).astype(wide)
        sequences = jnp.asarray(inputs.sequences, wide)
    for logits, target, mask in zip(outputs.mtp_logits, inputs.targets[1:], inputs.masks[1:], strict=False):
        total, correct = logits.cross_entropy_sum(target, mask)
        mtp_nll += total / depths
        mtp_count += jnp.sum(mask)
        mtp_correct += jnp.sum(correct & mask)
    balance = sum((jnp.sum(balance_loss(s)) for s in router_stats(outputs).values()), zero)
    sparse = config.num_moe_layers + depths > 0
    return LossSums(nll, tokens, mtp_nll, mtp_count, mtp_correct, balance, sequences, depths, sparse)


def objective(
    sums: LossSums, alpha: float, mtp_weight: jax.Array | float, tokens: jax.Array, sequences: jax.Array
) -> jax.Array:
    """The training loss: CE + lambda/D sum_k CE_k (eq. 24, 25) + alpha sum over layers of the balance loss (eq. 17).

    Each CE_k is divided by the number of next-token targets, as eq. 24 divides by T; the balance loss is a mean
    over sequences. `tokens` and `sequences` are for the whole batch, of which `sums` may be a piece. Without any target
    CE is 0.
    """
    predicted = (sums.cross_entropy + mtp_weight * sums.mtp_cross_entropy) / jnp.maximum(tokens, 1)
    return predicted + alpha * sums.balance / sequences


def mean_metrics(sums: LossSums) -> Metrics:
    """Returns means: losses in nats per target, and the accuracy of MTP."""
    metrics = {"loss": sums.cross_entropy / jnp.maximum(sums.tokens, 1)}
    if sums.depths:
        predicted = jnp.maximum(sums.mtp_tokens, 1)  # of all depths, over which `mtp_cross_entropy` is a mean
        metrics["mtp_loss"] = sums.depths * sums.mtp_cross_entropy / predicted
        metrics["mtp_accuracy"] = sums.mtp_correct / predicted
    if sums.sparse:
        metrics["balance_loss"] = sums.balance / sums.sequences
    return metrics


def load_violations(load: Mapping[str, jax.Array]) -> Metrics:
    """Load violation of each layer, max / mean - 1 (section 4.5.2)."""
    return {f"load_violation/{name}": x.max(-1) / x.mean(-1) - 1 for name, x in load.items()}
