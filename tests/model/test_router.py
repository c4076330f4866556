"""Routing against a plain loop, and the statistics that balancing uses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime
from dsv3_jax.model.moe import ExpertWeights, experts, experts_reference
from dsv3_jax.model.router import CHOICES, Router, affinities, highest_in_turns, normalised_affinities, select_experts
from dsv3_jax.training.losses import balance_loss
from tests.conftest import new_rng

BASE = dataclasses.replace(
    ModelConfig.preset("tiny"), n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2
)


def choose_by_loop(scores, bias, config):
    """Eq. 14 to 16 and node-limited routing, token by token."""
    chosen = []
    for s in scores:
        biased = s + bias
        groups = np.split(np.arange(config.n_routed_experts), config.n_group)
        best = 2 if config.has_router_bias else 1
        rank = sorted(range(len(groups)), key=lambda g: -np.sum(np.sort(biased[groups[g]])[-best:]))
        allowed = [e for g in rank[: config.topk_group] for e in groups[g]]
        chosen.append(sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok])
    return np.array(chosen)


@given(seed=st.integers(0, 10**6), offset=st.sampled_from([-2.0, 0.0, 2.0]), v3=st.booleans())
def test_selection_equals_a_plain_loop(seed, offset, v3):
    config = BASE if v3 else dataclasses.replace(BASE, topk_method="group_limited_greedy", norm_topk_prob=False)
    rng = np.random.default_rng(seed)
    scores = rng.uniform(size=(5, 8)).astype(np.float32)
    # Scores with bias below zero: a mask of zero instead of -inf would choose masked experts.
    bias = (rng.normal(size=8) + offset).astype(np.float32) if v3 else np.zeros(8, np.float32)
    ids, weights = select_experts(jnp.asarray(scores), jnp.asarray(bias) if v3 else None, config)
    expected = choose_by_loop(scores, bias, config)
    np.testing.assert_array_equal(np.sort(ids), np.sort(expected))
    gathered = np.take_along_axis(scores, np.asarray(ids), 1)
    if config.norm_topk_prob:
        gathered /= gathered.sum(1, keepdims=True)
    np.testing.assert_allclose(weights, gathered * config.routed_scaling_factor, rtol=1e-6)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-jnp.inf, -1.0, 0.0, 0.5, 2.0, jnp.nan]), min_size=6, max_size=6),
        min_size=1,
        max_size=9,
    ),
    k=st.integers(1, 6),
)
def test_one_after_another_is_top_k(rows, k):
    """Ties, masked groups and NaN too: of many rows on a GPU."""
    x = jnp.array(rows, jnp.float32)
    np.testing.assert_array_equal(highest_in_turns(x, k), jax.lax.top_k(x, k)[1])


def test_bias_moves_the_choice_and_not_the_weight():
    config = dataclasses.replace(BASE, n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0)
    scores = jnp.array([[0.9, 0.8, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1]])
    ids, weights = select_experts(scores, jnp.array([0, 0, 0, 1.0, 0, 0, 0, 0]), config)
    assert ids.tolist() == [[3, 0]]
    np.testing.assert_allclose(weights, [[0.1, 0.9]])


def test_statistics_are_those_of_the_equations():
    x = jax.random.normal(jax.random.key(0), (3, 7, BASE.hidden_size))
    router = Router(BASE, Runtime())
    variables = router.init(jax.random.key(1), x)
    variables["router"]["e_score_correction_bias"] = jnp.linspace(-0.02, 0.02, 8)
    ids, _, stats = router.apply(variables, x)
    s = np.asarray(jax.nn.sigmoid(x @ variables["params"]["weight"]), np.float64)
    top = np.argsort(-s, -1)[..., :2]
    for b in range(3):
        for e in range(8):
            assert stats.load[b, e] == np.sum(np.asarray(ids)[b] == e)
            np.testing.assert_allclose(stats.fraction[b, e], 8 / (2 * 7) * np.sum(top[b] == e), rtol=1e-6)
    np.testing.assert_allclose(stats.affinity, (s / s.sum(-1, keepdims=True)).mean(1), rtol=1e-5)


@pytest.mark.parametrize("base", [10.0, 0.0, -20.0, -44.0, -50.0, -80.0, -120.0, -300.0])
def test_gradients_of_saturated_affinities(base):
    """Gradients of sum_i a_i s_i / sum(s) over all experts and over the chosen ones, in float64 by hand."""
    config = dataclasses.replace(BASE, n_routed_experts=4, n_group=1, topk_group=1)
    logits = np.float32(base) + np.array([0, 0.3, 0.7, 1], np.float32)
    z, of_all, of_chosen = np.float64(logits), np.arange(4.0), np.arange(1.0, 3.0)
    s, ds = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-z)) / (1 + np.exp(z))
    chosen = np.argsort(-s)[:2] if base > -100 else np.arange(2)  # in float32 all are 0 there, and so are the weights
    expected = ds * (of_all - (of_all * s).sum() / s.sum()) / s.sum()
    total, weights = s[chosen].sum() + 1e-20, np.zeros(4)
    weights[chosen] = ds[chosen] * (of_chosen - (of_chosen * s[chosen]).sum() / total) / total
    got = jax.grad(lambda z: jnp.sum(normalised_affinities(z, config) * of_all))(jnp.asarray(logits))
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    f = lambda z: jnp.sum(select_experts(affinities(z, config)[None], None, config)[1] * of_chosen)
    got = jax.grad(f)(jnp.asarray(logits))
    rtol = 1e-3 if base > 0 else 2e-5  # near 1 the float32 affinity has no more digits of 1 - s
    np.testing.assert_allclose(got, weights * config.routed_scaling_factor, rtol=rtol, atol=1e-30)


def test_scaling_changes_no_bit_of_the_weights():
    scores = jnp.asarray(new_rng().uniform(size=(1000, 8)), jnp.float32)
    ids, weights = select_experts(scores, None, BASE)
    chosen = jnp.take_along_axis(scores, ids, 1)
    plain = chosen / (chosen.sum(-1, keepdims=True) + 1e-20) * BASE.routed_scaling_factor
    np.testing.assert_array_equal(weights, plain)


def test_a_saturated_token_among_others_leaves_the_router_a_gradient():
    config = dataclasses.replace(BASE, hidden_size=8)
    router, x = Router(config, Runtime()), jax.random.normal(jax.random.key(0), (1, 5, 8))
    variables = router.init(jax.random.key(1), x)
    weight = jax.random.normal(jax.random.key(2), (8, 8)) - 1.0

    def loss(weight, x):
        _, weights, stats = router.apply({**variables, "params": {"weight": weight}}, x)
        return jnp.sum(balance_loss(stats)) + jnp.sum(weights * jnp.arange(1.0, 3.0))

    for size in (1.0, 6.0, 8.0, 30.0):
        for g in jax.grad(loss, (0, 1))(weight, x.at[0, 2].set(size)):
            assert jnp.isfinite(g).all()
            assert jnp.any(g != 0)


@pytest.mark.parametrize("impl", ["ragged", "blocked"])
@pytest.mark.parametrize("routing", ["spread", "one expert", "one token"])
def test_experts_drop_no_token(impl, routing):
    tokens, width, hidden, count, k = 1 if routing == "one token" else 150, 16, 24, 8, 2
    keys = jax.random.split(jax.random.key(3), 5)
    w = ExpertWeights(
        jax.random.normal(keys[0], (count, width, hidden)) / 8,
        jax.random.normal(keys[1], (count, width, hidden)) / 8,
        jax.random.normal(keys[2], (count, hidden, width)) / 8,
    )
    x = jax.random.normal(keys[3], (tokens, width))
    ids = jnp.argsort(jax.random.uniform(keys[4], (tokens, count)))[:, :k]
    if routing == "one expert":
        ids = jnp.broadcast_to(jnp.array([5, 2]), ids.shape)
    weights = jax.random.uniform(keys[4], ids.shape)

    def value_and_gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, w, g: jnp.sum(jnp.sin(f(x, ids, g, w))), (0, 1, 2)))(x, w, weights)

    expected = value_and_gradients(experts_reference)
    got = value_and_gradients(
        lambda x, i, g, w: experts(x[None], i[None], g[None], w, BASE, Runtime(experts_impl=impl))[0]
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=1e-5)


@pytest.mark.parametrize("interleave", [1, 2])
def test_choices_are_replayed_at_every_gate(interleave):
    """With other parameters the tokens go to the experts of before, by today's weights."""
    config = dataclasses.replace(BASE, num_hidden_layers=3, hidden_size=32, initializer_range=0.5)
    model, rng = DeepSeekV3(config, Runtime(interleave=interleave)), new_rng()
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 9)), jnp.int32)
    variables, others = (model.init(jax.random.key(seed), tokens) for seed in (0, 1))
    run = jax.jit(functools.partial(model.apply, method="forward", mutable=[CHOICES]))
    outputs, chosen = run(variables, tokens, (tokens,))
    assert set(chosen[CHOICES]) == {"moe_layers", "mtp_0"}
    assert {ids.shape[-3:-1] for ids in jax.tree.leaves(chosen)} == {tokens.shape}
    unrecorded = jax.jit(functools.partial(model.apply, method="forward"))(variables, tokens, (tokens,))
    np.testing.assert_array_equal(unrecorded.stats.load, outputs.stats.load)
    replayed, again = run(variables | chosen, tokens, (tokens,))
    chex.assert_trees_all_equal(again, chosen)
    chex.assert_trees_all_equal(replayed.logits.array(), outputs.logits.array())

    own, of_others = run(others, tokens, (tokens,))
    replayed, again = run(others | chosen, tokens, (tokens,))
    chex.assert_trees_all_equal(again, chosen)
    for mine, theirs in zip(jax.tree.leaves(of_others), jax.tree.leaves(chosen), strict=True):
        assert jnp.any(mine != theirs)
    assert jnp.any(replayed.logits.array() != own.logits.array())
    np.testing.assert_array_equal(replayed.stats.load.sum(-1), own.stats.load.sum(-1))
