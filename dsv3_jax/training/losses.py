"""Training losses: next token, further tokens, balance (report eq. 17 to 20 and 24 to 25)."""

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
"""`tokens` and `targets` (B, T) int32, the latter one token ahead, or `IGNORE` where nothing is to be predicted;
`segments` and `positions` (B, T) int32 if attention stays within documents; `experts`, as `chosen_experts`
returns them, if tokens are to go to those; and the `batch_keys` of the loss."""

Metrics = dict[str, jax.Array]

_KEYS = ("tokens", "targets", "segments", "positions", "experts")

IGNORE = -100
"""The target of a position that isn't trained: PyTorch's and transformers' value."""


@struct.dataclass
class Whole:
    """The whole batch, of which a loss sees a piece. step: int32. tokens: next-token targets. sequences: rows."""

    step: jax.Array
    tokens: jax.Array
    sequences: jax.Array


class Loss:
    """The objective of a training step, as sums over pieces: of the batch, and of the model in a pipeline."""

    batch_keys: tuple[str, ...] = ()
    """Further arrays (B, T) of a batch that it reads, from `ModelInputs.extra`."""
    detach_mtp: bool = False
    """Whether the gradient of what the MTP modules predict stays in them: the rest is trained as if they weren't."""

    def __call__(self, outputs: Outputs, inputs: ModelInputs, whole: Whole) -> tuple[jax.Array, Any]:
        """Returns the part of the objective that this piece adds, a scalar, and sums for metrics: a pytree.

        outputs: in a pipeline those of one stage: `logits` is None but on the last, `stats` those of its own layers.
        """
        raise NotImplementedError

    def metrics(self, sums: Any, whole: Whole) -> Metrics:
        """Means and rates from the sums over all pieces."""
        return {}

    def bias_update_speed(self, step: jax.Array) -> jax.Array:
        """Gamma of auxiliary-loss-free balancing at this step; 0 leaves the routers' biases as they are."""
        return jnp.zeros((), jnp.float32)


@struct.dataclass
class LossSums:
    """Sums over the tokens of a batch, so that pieces of a batch add up. float32 scalars.

    cross_entropy: of the next token, in nats. mtp_cross_entropy: of the further tokens, a mean over depths.
    tokens, mtp_tokens: how many were predicted. mtp_correct: of those, predicted right by the argmax.
    balance: eq. 17 without its factor, summed over sequences and layers. sequences: how many.
    depths, sparse: of multi-token prediction, and whether there are sparse layers: Python values.
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
    """Sums over the pieces of a batch: the objective, the loss's own, and tokens sent to each expert.

    load: {"moe_layers": (L, E), "mtp_0": (E,), ...}, float32, keyed as the `router` collection is.
    exchanges: (2,), as `model.transformer.exchanges` counts them.
    """

    objective: jax.Array
    loss: Any
    load: dict[str, jax.Array]
    exchanges: jax.Array


@dataclasses.dataclass(frozen=True)
class PretrainingLoss(Loss):
    """CE + lambda/D sum_k CE_k (eq. 24, 25) + alpha sum over layers of the balance loss (eq. 17).

    config: of the model, which has alpha. schedule: gives lambda and gamma at a step.
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
    """Cross entropy of the tokens that have a target, and of the MTP modules, whose gradient stays in them.

    So the modules keep up with the model, and its own training is as if there were none.
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
    """x[:, i] becomes x[:, i + by]; the last `by` entries repeat the last one and are for the caller to mask."""
    return jnp.concatenate([x[:, by:], jnp.repeat(x[:, -1:], by, axis=1)], axis=1) if by else x


def predictable(batch: Batch, ahead: int) -> jax.Array:
    """Mask (B, T) of positions with a target `ahead` tokens on: within the sequence and, with segments, the document.

    The row's last target, which lies just past it, counts to the document of the row's last token, unless it is
    `IGNORE`. Nor does any other target that is.
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
    """A batch as the model takes it: its tokens in the order in which devices hold them (context parallelism).

    further_tokens: (B, T) each, the tokens 1 to D ahead, which the MTP modules take. targets, masks: (B, T) each, of
    the next token and of the one k further, for k up to D; `masks` says which of them there are. where: `positions`,
    `segments` and `order`, as the model's methods take them. extra: the loss's own arrays (B, T). sequences: how many,
    padding not counted. experts: the collection `CHOICES` if the batch says which experts its tokens go to, else empty.
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
    """Everything that looks along the sequence, done before its tokens are permuted for context parallelism.

    Args:
      batch_keys: keys that the loss reads beyond the usual ones.
      real: (B,) bool, sequences that aren't padding, whose targets are all `IGNORE`; None if none is.

    Raises:
      ValueError: the batch has a key that isn't known: what it is meant to change would be left out in silence.
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
    """The model's outputs for a batch, MTP and routing included; `detach_mtp` as in `Loss`."""
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
    """Runs the model on a batch and sums everything that pre-training's objective and metrics need."""
    inputs = model_inputs(model, batch)
    return loss_sums(forward(model, variables, inputs), inputs, model.config)


def loss_sums(outputs: Outputs, inputs: ModelInputs, config: ModelConfig) -> LossSums:
    """Sums over a batch what the model made of it; of a pipeline's stage, what the stage has of it."""
    wide = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(outputs)))
    zero, depths = jnp.zeros((), wide), config.num_nextn_predict_layers
    nll = tokens = sequences = mtp_nll = mtp_count = mtp_correct = zero
    if outputs.logits is not None:
        mask = inputs.masks[0]
        nll = jnp.sum(jnp.where(mask, outputs.logits.cross_entropy(inputs.targets[0])[0], 0))
        tokens = jnp.sum(mask).astype(wide)
        sequences = jnp.asarray(inputs.sequences, wide)
    for logits, target, mask in zip(outputs.mtp_logits, inputs.targets[1:], inputs.masks[1:], strict=False):
        each, correct = logits.cross_entropy(target)
        mtp_nll += jnp.sum(jnp.where(mask, each, 0)) / depths
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
    over sequences. `tokens` and `sequences` are those of the whole batch, of which `sums` may be a piece. Without any
    target there is no CE to learn from: 0.
    """
    predicted = (sums.cross_entropy + mtp_weight * sums.mtp_cross_entropy) / jnp.maximum(tokens, 1)
    return predicted + alpha * sums.balance / sequences


def mean_metrics(sums: LossSums) -> Metrics:
    """Readable means: losses in nats per predicted token, accuracy of MTP."""
    metrics = {"loss": sums.cross_entropy / jnp.maximum(sums.tokens, 1)}
    if sums.depths:
        predicted = jnp.maximum(sums.mtp_tokens, 1)  # of all depths, over which `mtp_cross_entropy` is a mean
        metrics["mtp_loss"] = sums.depths * sums.mtp_cross_entropy / predicted
        metrics["mtp_accuracy"] = sums.mtp_correct / predicted
    if sums.sparse:
        metrics["balance_loss"] = sums.balance / sums.sequences
    return metrics


def load_violations(load: Mapping[str, jax.Array]) -> Metrics:
    """Each layer's load violation, max / mean - 1 (section 4.5.2)."""
    return {f"load_violation/{name}": x.max(-1) / x.mean(-1) - 1 for name, x in load.items()}
