"""Generation against recomputing everything at each token, and sampling against the distribution it should have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3
from dsv3_jax.config import ConfigError
from dsv3_jax.inference import sampling as of_sampling
from dsv3_jax.inference.generate import _prefill, generate, stream
from dsv3_jax.inference.sampling import ALL, DRAWN, GREEDY, TOP_P, Sampling, cut, kind, rows, sample, sample_rows
from dsv3_jax.model.cache import init_cache
from tests.conftest import new_rng
from tests.training.test_losses import SMALL


@pytest.fixture(scope="module")
def model():
    model = DeepSeekV3(SMALL)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_greedy_generation_equals_full_passes_for_prompts_of_any_length(model):
    model, variables = model
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    expected = []
    apply = jax.jit(model.apply)
    for prompt in prompts:
        row = list(prompt)
        for _ in range(6):
            # A fixed width, so that one program serves: what follows a token can't change its logits.
            logits = apply(variables, jnp.array([row + [0] * (12 - len(row))]))
            row.append(int(logits[0, len(row) - 1].argmax()))
        expected.append(row[len(prompt) :])
    assert generate(model, variables, prompts, 6).tolist() == expected


def test_a_prompt_computes_the_logits_of_its_last_token_alone(model):
    model, variables = model
    prefill = functools.partial(_prefill.__wrapped__, model, Sampling(temperature=0), variables)
    cache = init_cache(model.config, model.runtime, 3, 40)
    program = str(jax.make_jaxpr(prefill)(np.zeros((3, 40), np.int32), np.array([40, 2, 7]), cache, jax.random.key(0)))
    assert "f32[3,1,17]" in program  # B, 1, V
    assert "[3,40,17]" not in program


def test_end_tokens_end_each_prompt_and_then_all(model):
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    free = generate(*model, prompts, 8)
    for ends in ([int(free[0, 2])], [int(free[0, 2]), int(free[1, 3])], sorted({int(row[4]) for row in free})):
        drawn = generate(*model, prompts, 8, end_ids=ends)
        length = 0
        for row, whole in zip(drawn, free, strict=True):
            at = next((i for i, token in enumerate(whole) if token in ends), 7)
            assert row[: at + 1].tolist() == whole[: at + 1].tolist()
            assert set(row[at + 1 :].tolist()) <= {int(whole[at])}
            length = max(length, at + 1)
        assert drawn.shape == (3, length)


def test_draws_depend_on_the_key_alone(model):
    model, variables = model
    draw = lambda seed: generate(model, variables, [[1, 2]], 8, sampling=Sampling(), key=jax.random.key(seed)).tolist()
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(
    ("prompts", "new", "how", "named"),
    [
        ([[]], 3, {}, "empty"),
        ([[1], [17]], 3, {}, "token id 17 is outside the vocabulary"),
        ([[1, 2]], 0, {}, "max_new_tokens is 0"),
        ([[1, 2]], 3, {"cache_length": 4}, "exceed the cache's 4 tokens"),
        ([[1, 2]], 5000, {}, "max_position_embeddings"),
        ([[1, 2]], 3, {"sampling": Sampling()}, "needs a key"),
    ],
)
def test_bad_requests_are_named(model, prompts, new, how, named):
    with pytest.raises(ValueError, match=named):
        stream(*model, prompts, new, **how)


PROBABILITIES = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


def frequencies(sampling):
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (20000, 5))
    return np.bincount(sample(logits, sampling, jax.random.key(0)), minlength=5) / 20000


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0, 0]),
        (Sampling(top_p=0.8), np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9),  # the fewest that reach 0.8
        (Sampling(top_p=0.5), [1, 0, 0, 0, 0]),
        (Sampling(top_k=2**40, top_p=0.5), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_sampling_has_the_distribution(sampling, expected):
    np.testing.assert_allclose(frequencies(sampling), expected, atol=0.015)


def expected_distribution(logits, sampling):
    """By the definition, token after token, in float64: temperature, top-k with ties, top-p of what is left."""
    values = np.exp((logits - logits.max()) / sampling.temperature)
    ranked = sorted(range(len(values)), key=lambda i: -values[i])  # equal ones by their ids
    if sampling.top_k is not None:
        last = values[ranked[min(sampling.top_k, len(values)) - 1]]
        ranked = [i for i in ranked if values[i] >= last]
    share, kept = values[ranked] / values[ranked].sum(), []
    for i in ranked:
        kept.append(i)
        if share[: len(kept)].sum() >= sampling.top_p:
            break
    distribution = np.zeros(len(values))
    distribution[kept] = values[kept] / values[kept].sum()
    return distribution


@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-30])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 20, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.55, 0.05])
def test_cut_logits_are_those_of_the_definition(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    logits = np.random.default_rng(3).normal(0, 2, (8, 20)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    logits[2] = 0
    got = jax.nn.softmax(cut(jnp.asarray(logits), sampling), axis=-1)
    for row, of in zip(got, logits.astype(np.float64), strict=True):
        np.testing.assert_allclose(row, expected_distribution(of, sampling), atol=1e-6)


@pytest.mark.parametrize("at_a_time", [1, 2, 4])
def test_the_limit_is_the_same_however_many_bits_are_found_at_a_time(at_a_time):
    rng = new_rng()
    keys = rng.integers(0, 2**32, (6, 50), dtype=np.uint32)
    keys[0] >>= 20
    keys[1, 10:] = keys[1, 0]
    weights = rng.integers(0, 9, keys.shape).astype(np.float32)
    wanted = np.maximum(weights.sum(1) * rng.random(6), 1).astype(np.float32)
    got = jax.jit(of_sampling._least, static_argnums=(3, 4))(keys, weights, wanted, 32, at_a_time)
    for row, w, least, value in zip(keys, weights, wanted, np.asarray(got), strict=True):
        assert value == max(k for k in row if w[row >= k].sum() >= least)


def test_a_batch_computes_no_more_than_it_wants():
    for want, samplings in (
        (GREEDY, [Sampling(0, 5, 0.5), Sampling(0)]),
        (DRAWN, [Sampling(0, 5), Sampling(0.5)]),
        (TOP_P, [Sampling(1), Sampling(1, None, 0.5)]),
        (ALL, [Sampling(1, None, 0.5), Sampling(1, 3)]),
        (ALL, [Sampling(min_p=0.1)]),
    ):
        assert kind(samplings) == want
    how = rows([Sampling(0.7, None, 0.5)] * 2, [0, 1])
    program = lambda of: str(jax.make_jaxpr(lambda x: sample_rows(x, how, jnp.arange(2), of))(jnp.zeros((2, 40))))
    texts = [program(of) for of in (GREEDY, DRAWN, TOP_P, ALL)]
    assert [text.count("while") + text.count("scan") > 0 for text in texts[:2]] == [False, False]  # no search
    assert "random" not in texts[0]
    assert not any("cond[" in text for text in texts)  # the host would wait for it


def test_a_top_p_that_is_0_in_float32_leaves_the_most_likely_token():
    np.testing.assert_array_equal(cut(jnp.array([[1.0, 3.0, 2.0]]), Sampling(top_p=1e-50)), [[-np.inf, 0, -np.inf]])


def test_top_p_is_of_what_top_k_left():
    """Top-k of 0.5 and 0.25, then 2/3 and 1/3: the first reaches 0.6 alone, though it has half of all probability."""
    np.testing.assert_allclose(frequencies(Sampling(top_k=2, top_p=0.6)), [1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "bad", [{"temperature": float("nan")}, {"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)
