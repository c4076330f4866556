"""The losses against the report's equations written out, and their gradients against finite differences."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.data import PackedSequences
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.cache import TokenPositions
from dsv3_jax.model.logits import cross_entropy
from dsv3_jax.model.router import Router
from dsv3_jax.model.transformer import expert_load
from dsv3_jax.training.losses import (
    IGNORE,
    LossSums,
    balance_loss,
    forward,
    forward_sums,
    load_violations,
    loss_sums,
    mean_metrics,
    model_inputs,
    objective,
    predictable,
    shift_left,
)
from tests.configs import DOUBLE, SMALL
from tests.conftest import new_rng
from tests.data.corpora import counted
from tests.model import equations


def test_balance_loss_is_eq_17_to_20():
    """Written out per sequence and token, on the router's own weights."""
    x = jax.random.normal(jax.random.key(0), (2, 6, SMALL.hidden_size))
    router = Router(SMALL, Runtime())
    variables = router.init(jax.random.key(1), x)
    stats = router.apply(variables, x)[2]
    experts, k, tokens = SMALL.n_routed_experts, SMALL.num_experts_per_tok, 6
    for b in range(2):
        f, p = np.zeros(experts), np.zeros(experts)
        for t in range(tokens):
            s = 1 / (
                1 + np.exp(-np.asarray(x[b, t], np.float64) @ np.asarray(variables["params"]["weight"], np.float64))
            )
            f[np.argsort(-s)[:k]] += experts / (k * tokens)
            p += s / s.sum() / tokens
        np.testing.assert_allclose(balance_loss(stats)[b], np.sum(f * p), rtol=1e-5)


def test_balance_gradient_lowers_the_overloaded_expert():
    """A step against the gradient must take affinity from the expert that gets too much: the sign of eq. 17."""
    x = jnp.ones((1, 8, SMALL.hidden_size)) + 0.1 * jax.random.normal(jax.random.key(0), (1, 8, SMALL.hidden_size))
    router = Router(SMALL, Runtime())
    variables = router.init(jax.random.key(1), x)
    weight = jnp.zeros_like(variables["params"]["weight"]).at[:, 0].set(0.1).at[:, 1].set(0.05)
    loss = lambda w: jnp.sum(balance_loss(router.apply({**variables, "params": {"weight": w}}, x)[2]))
    stepped = weight - 0.05 * jax.grad(loss)(weight)
    affinity = lambda w: router.apply({**variables, "params": {"weight": w}}, x)[2].affinity[0]
    assert loss(stepped) < loss(weight)
    assert affinity(stepped)[0] < affinity(weight)[0]
    assert affinity(stepped)[3] > affinity(weight)[3]


@pytest.fixture(scope="module")
def small():
    tokens = jax.random.randint(jax.random.key(5), (2, 9), 0, SMALL.vocab_size)
    model = DeepSeekV3(SMALL)
    return model, jax.jit(model.init)(jax.random.key(0), tokens), tokens


def test_mtp_loss_is_eq_24(small):
    """Depth k at position i sees token i+k's embedding and predicts token i+k+1; sums are divided by T."""
    model, variables, row = small
    tokens, targets = row[:, :-1], row[:, 1:]
    sums = jax.jit(lambda v, b: forward_sums(model, v, b))(variables, {"tokens": tokens, "targets": targets})
    length = tokens.shape[1]
    padded = jnp.pad(row, ((0, 0), (0, 2)))  # what lies beyond the sequence must not matter
    further = (padded[:, 1 : 1 + length], padded[:, 2 : 2 + length])
    out = jax.jit(lambda v, t, f: model.apply(v, t, f, method="forward"))(variables, tokens, further)
    expected, correct, count = 0.0, 0, 0
    for k, logits in enumerate(out.mtp_logits, start=1):
        log_p = np.asarray(jax.nn.log_softmax(logits.array()))
        for b in range(2):
            for i in range(length - k):
                target = int(row[b, i + k + 1])
                expected -= log_p[b, i, target] / SMALL.num_nextn_predict_layers
                correct += int(log_p[b, i].argmax() == target)
                count += 1
    np.testing.assert_allclose(sums.mtp_cross_entropy, expected, rtol=1e-5)
    assert (int(sums.mtp_correct), int(sums.mtp_tokens), int(sums.tokens)) == (correct, count, 2 * length)
    depths = SMALL.num_nextn_predict_layers
    np.testing.assert_allclose(mean_metrics(sums)["mtp_loss"], expected * depths / count, rtol=1e-5)
    whole = objective(sums, 1e-2, 0.3, sums.tokens, sums.sequences)
    parts = sums.cross_entropy / 16 + 0.3 * sums.mtp_cross_entropy / 16 + 1e-2 * sums.balance / 2
    np.testing.assert_allclose(whole, parts, rtol=1e-6)


def test_documents_bound_what_is_predicted(small):
    """With segments, nothing is predicted across a boundary, at any depth."""
    model, variables, row = small
    tokens, targets = row[:, :-1], row[:, 1:]
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2], [1] * 8])
    batch = {"tokens": tokens, "targets": targets, "segments": segments}
    sums = jax.jit(lambda v, b: forward_sums(model, v, b))(variables, batch)
    assert int(sums.tokens) == 16 - 1  # all but the target across the one boundary
    assert int(sums.mtp_tokens) == (16 - 2 - 2) + (16 - 4 - 3)
    changed = {**batch, "targets": targets.at[0, 2].set((targets[0, 2] + 1) % SMALL.vocab_size)}
    again = jax.jit(lambda v, b: forward_sums(model, v, b))(variables, changed)
    chex.assert_trees_all_close(sums.cross_entropy, again.cross_entropy)


def test_predictable_is_the_definition(tmp_path):
    """Packed rows of short documents: both ends of a prediction in one document, also past the row's end."""
    rng = new_rng()
    lengths = rng.integers(1, 12, 200)
    data, offsets = counted(tmp_path, lengths)
    packed = PackedSequences(data, 16, 0)
    rows = [packed[r] for r in range(len(packed))]
    batch = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    document = np.searchsorted(offsets, np.asarray(batch["tokens"]).ravel(), side="right")
    for ahead in (1, 2, 3):
        place = np.arange(len(rows))[:, None] * 16 + np.arange(16)
        inside = np.arange(16) + ahead <= 16  # the row's targets go one token further than its tokens
        there = document[np.minimum(place + ahead, len(document) - 1)]
        np.testing.assert_array_equal(predictable(batch, ahead), inside & (there == document[place]))


@functools.partial(jax.jit, static_argnums=0)
def gradient_and_sums(model, variables, batch):
    def f(params):
        sums = forward_sums(model, {**variables, "params": params}, batch)
        return objective(sums, 1e-2, 0.3, sums.tokens, sums.sequences), sums

    return jax.grad(f, has_aux=True)(variables["params"])


def sums_and_gradient(small, batch):
    model, variables, _ = small
    return gradient_and_sums(model, variables, batch)[::-1]


def test_ignored_targets_are_as_if_masked(small):
    """At any depth: neither in the count nor in the sum, and without a gradient that isn't finite."""
    _, _, row = small
    tokens, targets = row[:, :-1], row[:, 1:]
    ignored = targets.at[0, 3:6].set(IGNORE).at[1, -1].set(IGNORE)
    sums, gradient = sums_and_gradient(small, {"tokens": tokens, "targets": ignored})
    assert (int(sums.tokens), int(sums.mtp_tokens)) == (16 - 4, (14 - 4) + (12 - 4))
    there = np.asarray(predictable({"tokens": tokens, "targets": ignored}, 1))
    np.testing.assert_array_equal(there, np.asarray(ignored) != IGNORE)
    model, variables, _ = small
    nll = cross_entropy(jax.jit(model.apply)(variables, tokens), targets)
    np.testing.assert_allclose(sums.cross_entropy, np.sum(np.asarray(nll), where=there), rtol=1e-5)
    chex.assert_tree_all_finite(gradient)
    # An MTP module still sees the tokens whose targets are ignored, as attention does.
    load = lambda batch: expert_load(jax.jit(lambda v: forward(model, v, model_inputs(model, batch)))(variables))
    chex.assert_trees_all_equal(*(load({"tokens": tokens, "targets": t}) for t in (ignored, targets)))
    nothing, gradient = sums_and_gradient(small, {"tokens": tokens, "targets": jnp.full_like(targets, IGNORE)})
    assert float(mean_metrics(nothing)["loss"]) == float(mean_metrics(nothing)["mtp_loss"]) == 0
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize(
    "bad", [-1, SMALL.vocab_size, pytest.param(-99, marks=pytest.mark.slow), pytest.param(-101, marks=pytest.mark.slow)]
)
def test_other_targets_outside_the_vocabulary_give_nan(small, bad):
    _, _, row = small
    sums, _ = sums_and_gradient(small, {"tokens": row[:, :-1], "targets": row[:, 1:].at[1, 2].set(bad)})
    assert np.isnan([sums.cross_entropy, sums.mtp_cross_entropy]).all()


def test_an_unknown_key_of_a_batch_is_refused(small):
    model, variables, row = small
    batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "mask": row[:, 1:]}
    with pytest.raises(ValueError, match="a batch has 'mask': its keys are tokens, targets, segments, positions"):
        forward_sums(model, variables, batch)


def test_shift_left():
    assert shift_left(jnp.arange(5)[None], 2).tolist() == [[2, 3, 4, 4, 4]]
    assert shift_left(jnp.arange(5)[None], 0).tolist() == [[0, 1, 2, 3, 4]]


def test_sums_are_the_equations(x64):
    """All of eq. 17 to 25 in NumPy, with documents, untrained targets and a sparse stack."""
    config, rng = dataclasses.replace(SMALL, first_k_dense_replace=0), new_rng()
    model = DeepSeekV3(config, DOUBLE)
    variables = equations.random_variables(model, rng)
    rows = rng.integers(0, config.vocab_size, (2, 10), np.int32)
    segments = np.array([[1, 1, 2, 2, 2, 3, 3, 3, 3], [1] * 9], np.int32)
    trained = np.array([[1, 1, 1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0]], bool)
    batch = {"tokens": rows[:, :-1], "targets": np.where(trained, rows[:, 1:], IGNORE), "segments": segments}
    outputs = jax.jit(lambda v: forward(model, v, model_inputs(model, batch)))(variables)
    sums = loss_sums(outputs, model_inputs(model, batch), config)
    trees = equations.float64(variables["params"]), equations.float64(variables["router"])
    total, loads, (ce, count, hits, balance) = equations.objective(*trees, rows, config, 0.1, 0.3, segments, trained)
    np.testing.assert_allclose(objective(sums, 0.1, 0.3, sums.tokens, sums.sequences), total, rtol=1e-6)
    np.testing.assert_allclose(sums.cross_entropy, ce[0], rtol=1e-6)
    np.testing.assert_allclose(sums.mtp_cross_entropy, ce[1:].mean(), rtol=1e-6)
    np.testing.assert_allclose(sums.balance, balance, rtol=1e-6)
    assert (sums.tokens, sums.mtp_tokens, sums.mtp_correct) == (count[0], count[1:].sum(), hits[1:].sum())
    assert sums.sequences == 2
    for name, load in loads.items():
        np.testing.assert_array_equal(expert_load(outputs)[name], load)


def test_metrics_of_one_target_and_of_none():
    """Means over what there is: one token of 2 nats; two depths, of which one has a target, of 3 nats."""
    load = {"moe_layers": jnp.asarray([[1.0, 3.0]]), "mtp_0": jnp.asarray([2.0, 2.0]), "mtp_1": jnp.asarray([0.0, 4.0])}
    sums = LossSums(*map(jnp.float32, (2.0, 1, 3.0 / 2, 1, 1, 0.5, 2)), depths=2, sparse=True)
    metrics = mean_metrics(sums) | load_violations(load)
    metrics = {name: np.asarray(value).tolist() for name, value in metrics.items()}
    assert metrics == {
        **{"loss": 2.0, "mtp_loss": 3.0, "mtp_accuracy": 1.0, "balance_loss": 0.25},
        **{"load_violation/moe_layers": [0.5], "load_violation/mtp_0": 0.0, "load_violation/mtp_1": 1.0},
    }
    assert objective(sums, 0.1, 0.3, sums.tokens, sums.sequences) == pytest.approx(2 + 0.3 * 1.5 + 0.1 * 0.25)
    counts = ("cross_entropy", "tokens", "mtp_cross_entropy", "mtp_tokens", "mtp_correct")
    none = mean_metrics(sums.replace(**dict.fromkeys(counts, jnp.float32(0))))
    assert (none["loss"], none["mtp_loss"], none["mtp_accuracy"]) == (0, 0, 0)
    assert mean_metrics(sums.replace(depths=0, sparse=False)).keys() == {"loss"}
    assert load_violations({}) == {}


# Finite differences, in float64 ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_attention_gradient(x64, form):
    runtime = dataclasses.replace(DOUBLE, attention_form=form)
    module = MultiHeadLatentAttention(SMALL, runtime)
    x = jax.random.normal(jax.random.key(0), (1, 5, SMALL.hidden_size), jnp.float64)
    index = TokenPositions(jnp.arange(5)[None])
    variables = jax.jit(module.init)(jax.random.key(1), x, index)
    f = jax.jit(lambda v, x: jnp.sum(jnp.sin(module.apply(v, x, index)[0])))
    check_grads(f, (variables, x), order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-6)


def test_router_gradient(x64):
    module = Router(SMALL, DOUBLE)
    x = jax.random.normal(jax.random.key(0), (2, 5, SMALL.hidden_size), jnp.float64)
    variables = module.init(jax.random.key(1), x)

    @jax.jit
    def f(params, x):
        _, weights, stats = module.apply({**variables, "params": params}, x)
        return jnp.sum(jnp.sin(weights)) + jnp.sum(balance_loss(stats))

    check_grads(f, (variables["params"], x), order=1, modes=["rev"], eps=1e-6, atol=1e-7, rtol=1e-6)
