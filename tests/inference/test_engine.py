"""The engine against the plain loop of `generate`, which transformers' outputs are the reference of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.paged_cache import init_pool
from dsv3_jax.inference.pages import PageAllocator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from tests.conftest import new_rng

CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(num_hidden_layers=2, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, vocab_size=64),
)
NEW = 12
SIZES = dict(max_batch=4, max_length=256, prefill_chunk=64)


@pytest.fixture(scope="module")
def model():
    model = DeepSeekV3(CONFIG)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return model, jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, variables)  # so that logits differ clearly


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60, n).tolist() for n in (5, 130, 64, 9, 65)]


@pytest.fixture(scope="module")
def expected(model, prompts):
    return [generate(*model, [prompt], NEW)[0].tolist() for prompt in prompts]


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(*model, EngineConfig(**SIZES, drafts=1), end_ids=())
    yield engine
    engine.close()


def test_greedy_is_generates(engine, prompts, expected):
    for prefix_hits in (0, 64 + 128):  # whole pages, but never a prompt's last token
        assert list(engine.generate(prompts, max_new_tokens=NEW)) == expected
        assert engine.stats().prefix_hits == prefix_hits
    assert engine.pages.available == engine.pages.total  # nothing leaked


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3])
def test_drafts_change_no_token(model, prompts, expected, drafts):
    engine = Engine(*model, EngineConfig(**SIZES, drafts=drafts), end_ids=())
    assert list(engine.generate(prompts, max_new_tokens=NEW)) == expected


def test_preempted_texts_are_the_same(model, prompts, expected):
    engine = Engine(*model, EngineConfig(**SIZES, drafts=1, cache_tokens=5 * 64), end_ids=())
    long = [[*prompts[3], *expected[3]], prompts[1], prompts[2], prompts[4]]
    got = list(engine.generate(long, max_new_tokens=NEW))
    assert got[1:] == [expected[1], expected[2], expected[4]]
    assert engine.stats().preemptions > 0
    assert engine.pages.available == engine.pages.total


def test_sampled_texts_depend_on_their_seed_alone(engine, prompts):
    how = Sampling(temperature=1.0, top_p=0.9, top_k=20, seed=3)
    together = list(engine.generate(prompts, how, max_new_tokens=NEW))
    alone = [next(engine.generate([prompt], how, max_new_tokens=NEW)) for prompt in prompts[:3]]
    assert together[:3] == alone
    assert together != list(engine.generate(prompts, dataclasses.replace(how, seed=4), max_new_tokens=NEW))


def test_ends_and_scores(model, engine, prompts, expected):
    stop = expected[0][4]
    how = Sampling(temperature=0, stop_token_ids=(stop,))
    steps = list(engine.submit(prompts[0], how, max_new_tokens=NEW, logprobs=2, prompt_logprobs=1))
    tokens = [t for step in steps for t in step.tokens]
    assert tokens == expected[0][: expected[0].index(stop) + 1]
    assert (steps[-1].finish_reason, steps[-1].stop_token) == ("stop", stop)
    whole = jnp.asarray([[*prompts[0], *tokens]])
    logprobs = np.asarray(jax.nn.log_softmax(jax.jit(model[0].apply)(model[1], whole)[0]))
    got = [score for step in steps for score in step.logprobs]
    for i, (token, value, best) in enumerate(got):
        row = logprobs[len(prompts[0]) - 1 + i]
        np.testing.assert_allclose(value, row[token], atol=1e-4)
        assert [k for k, _ in best] == np.argsort(-row)[:2].tolist()
    of_prompt = steps[0].prompt_logprobs
    assert of_prompt[0][1] is None
    for i, (token, value, _) in enumerate(of_prompt[1:]):
        assert token == prompts[0][i + 1]
        np.testing.assert_allclose(value, logprobs[i][token], atol=1e-4)


def test_penalties_and_grammars(engine, prompts, expected):
    class Odd:
        finished = False

        def mask(self):
            return np.packbits(np.arange(64) % 2 == 1, bitorder="little")

        def accept(self, token):
            assert token % 2 == 1

    other = engine.submit(prompts[3], max_new_tokens=NEW)  # beside them, unharmed
    steps = engine.submit(prompts[0], max_new_tokens=6, grammar=Odd())
    assert all(t % 2 == 1 for step in steps for t in step.tokens)
    biased = engine.submit(prompts[0], Sampling(temperature=0, logit_bias={7: 100.0}), max_new_tokens=4)
    assert [t for step in biased for t in step.tokens] == [7, 7, 7, 7]
    once = Sampling(
        temperature=0, logit_bias={7: 50.0}, presence_penalty=2, frequency_penalty=2, repetition_penalty=100
    )
    assert [t for step in engine.submit([7], once, max_new_tokens=3) for t in step.tokens].count(7) <= 1
    assert [t for step in other for t in step.tokens] == expected[3]


def test_a_text_that_is_not_finite_fails_alone(model, prompts, expected):
    module, variables = model
    table = variables["params"]["embed_tokens"].at[63].set(jnp.nan)
    variables = {**variables, "params": {**variables["params"], "embed_tokens": table}}
    engine = Engine(module, variables, EngineConfig(**SIZES, drafts=0), end_ids=())
    bad, good = engine.submit([1, 63, 2], max_new_tokens=NEW), engine.submit(prompts[0], max_new_tokens=NEW)
    assert "not finite" in list(bad)[-1].error
    assert [t for step in good for t in step.tokens] == expected[0]
    # The pages that it had come to others without what it left there.
    assert list(engine.generate(prompts[:2], max_new_tokens=NEW)) == expected[:2]


def test_cancelled_texts_give_their_pages_back(engine, prompts):
    request = engine.submit(prompts[1], max_new_tokens=100)
    next(iter(request))
    engine.cancel(request)
    next(engine.generate([prompts[0]], max_new_tokens=2))
    assert engine.pages.available == engine.pages.total


def test_what_cannot_be_is_refused(engine, model):
    for prompt, new, message in (
        ([], 1, "empty"),
        ([64], 1, "outside the vocabulary"),
        ([1] * 250, 7, "exceed the 256 tokens"),
        ([1], 0, "max_new_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.submit(prompt, max_new_tokens=new)
    with pytest.raises(ConfigError, match="one text of max_length"):
        Engine(*model, EngineConfig(**SIZES, cache_tokens=64))


def test_no_program_is_compiled_twice(engine, prompts):
    from dsv3_jax.inference import steps

    before = steps.decode._cache_size(), steps.prefill._cache_size(), engine.stats().programs
    list(engine.generate([prompts[4], prompts[0]] * 3, max_new_tokens=30))
    after = steps.decode._cache_size(), steps.prefill._cache_size(), engine.stats().programs
    assert sum(after[:2]) - sum(before[:2]) == after[2] - before[2]


def test_a_token_takes_70272_bytes():
    config, pages = ModelConfig.preset("v3-671b"), 5
    for dtype, most in ((None, 70272), ("float8_e4m3fn", 0.56 * 70272)):
        pool = jax.eval_shape(lambda d=dtype: init_pool(config, Runtime(dtype="bfloat16"), pages, dtype=d))
        assert pool.bytes / (pages * 64) <= most
    assert jax.eval_shape(lambda: init_pool(config, Runtime(dtype="bfloat16"), pages)).bytes == 70272 * pages * 64


def test_pages_that_were_given_to_others_are_not_found():
    pages = PageAllocator(4)
    first = pages.allocate(3)
    tokens = list(range(192))
    pages.publish(tokens, first)
    pages.release(first)
    held = pages.match([*tokens, 0])
    assert held == first
    pages.release(held)
    taken = pages.allocate(1)  # the end of the longest unused prompt goes first
    assert pages.match([*tokens, 0]) == first[:2]
    pages.release(first[:2])
    pages.publish(list(range(500, 564)), taken)
    rest = pages.allocate(2)
    assert pages.match([*tokens, 0]) == []
    assert sorted([*taken, *rest]) == sorted(first)


def test_kept_tokens_are_those_of_a_sort():
    rng = new_rng()
    logits = jnp.asarray(rng.standard_normal((6, 500)) * 3, jnp.float32)
    from dsv3_jax.inference.sampling import cut

    for top_k, top_p, min_p in (
        (None, 0.9, 0),
        (10, 1.0, 0),
        (50, 0.5, 0),
        (None, 1.0, 0.1),
        (1, 0.3, 0),
        (499, 0.999, 0),
    ):
        got = np.asarray(cut(logits, Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)))
        for row, kept in zip(np.asarray(logits, np.float64) / 0.7, got, strict=True):
            order = np.argsort(-row)[: top_k or 500]
            chances = np.exp(row[order] - row.max())
            chances /= chances.sum()
            order = order[np.cumsum(chances) - chances < top_p]
            order = order[np.exp(row[order] - row.max()) >= min_p]
            assert set(np.flatnonzero(np.isfinite(kept))) == set(order.tolist())
