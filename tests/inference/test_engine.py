"""The engine against transformers' greedy continuations, whatever else it does at the time."""

import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.config import ConfigError
from dsv3_jax.inference import engine as engine_module
from dsv3_jax.inference import steps
from dsv3_jax.inference.engine import Engine, EngineConfig
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.runtime import Runtime

GOLDEN = Path(__file__).parents[1] / "golden"
GREEDY = Sampling(temperature=0)
EXPECTED = json.loads((GOLDEN / "generated.json").read_text())
FEW = 192 + 128
"""Tokens of a cache that has no room for eight texts."""


@pytest.fixture(scope="module")
def checkpoints():
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_pretrained(GOLDEN / name)
        return loaded[name]

    return get


def engine(checkpoint, end_ids=(), **sizes):
    """An engine of one of few sizes: engines of the same model and sizes share their programs."""
    sizes = {"max_batch": 8, "max_length": 160} | sizes
    return Engine(*checkpoint, EngineConfig(**sizes), end_ids=end_ids)


def compiled():
    programs = steps.prefill, steps.decode, steps.draw, steps.score_prompt
    return sum(program._cache_size() for program in programs)


def assert_nothing_leaks(e):
    e.close()
    stats = e.stats()
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)
    assert e.pages.available == e.pages.total


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("v3_base", {}, marks=pytest.mark.slow),
        pytest.param("v3_base", {"prefill_chunk": 17}, marks=pytest.mark.slow),
        pytest.param("v3_yarn", {}, marks=pytest.mark.slow),
        pytest.param("v2_greedy", {}, marks=pytest.mark.slow),
        pytest.param("mtp_1", {"drafts": 1}, marks=pytest.mark.slow),
        ("mtp_1", {"drafts": 3}),
        pytest.param("mtp_1", {"drafts": 2, "drafts_up_to": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items()) or "plain",
)
def test_a_batch_is_continued_as_by_transformers(checkpoints, name, sizes):
    expected = EXPECTED[name]
    e, before = engine(checkpoints(name), **sizes), compiled()
    assert list(e.generate(expected["prompts"], GREEDY, max_new_tokens=64)) == expected["new"]
    stats = e.stats()
    assert compiled() - before <= stats.programs  # none twice
    if e.drafts:
        assert stats.drafts > 0
        assert stats.accepted_tokens == sum(stats.accepted_per_position)
        assert stats.accepted_tokens > 0
    assert_nothing_leaks(e)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (5, [1, 2, 4, 5]), (32, [1, 2, 4, 8, 16, 32]), (33, [1, 2, 4, 8, 16, 33])],
)
def test_no_program_is_compiled_for_nearly_the_largest_size(most, sizes):
    assert engine_module._buckets(most, 2) == sizes


@pytest.mark.slow
def test_after_warming_up_nothing_is_compiled(checkpoints):
    expected = EXPECTED["mtp_1"]
    e = engine(checkpoints("mtp_1"), drafts=1, max_batch=4)
    thread = threading.Thread(target=e.warm_up)  # as the engine's own: tests set this one's precision
    thread.start()
    thread.join()
    assert e.stats().programs > 0
    before = e.stats().programs, compiled()
    assert list(e.generate(expected["prompts"], GREEDY, max_new_tokens=64)) == expected["new"]
    ways = [{}, dict(top_p=0.9), dict(top_k=5, min_p=0.1), dict(presence_penalty=1.0), dict(logit_bias={3: 2.0})]
    prompts = expected["prompts"]
    requests = [e.submit(prompts[i], Sampling(**how), max_new_tokens=20) for i, how in enumerate(ways)]
    requests += [e.submit(prompt, GREEDY, max_new_tokens=9, logprobs=2, prompt_logprobs=1) for prompt in prompts]
    assert all(list(request)[-1].finish_reason == "length" for request in requests)
    assert (e.stats().programs, compiled()) == before
    assert_nothing_leaks(e)


def test_preempted_texts_are_continued_as_by_transformers(checkpoints):
    expected = EXPECTED["v3_base"]
    e = engine(checkpoints("v3_base"), cache_tokens=FEW)
    assert list(e.generate(expected["prompts"], GREEDY, max_new_tokens=64)) == expected["new"]
    assert e.stats().preemptions > 0
    assert_nothing_leaks(e)


def test_a_prefix_is_found_and_one_after_another_is_the_same(checkpoints):
    expected = EXPECTED["mtp_1"]
    e = engine(checkpoints("mtp_1"), drafts=3)
    for prompt, new in zip(expected["prompts"], expected["new"], strict=True):
        before = e.stats().prefix_hits
        request = e.submit(prompt, GREEDY, max_new_tokens=64)
        steps = list(request)
        assert [t for s in steps for t in s.tokens] == new
        assert steps[-1].finish_reason == "length"
        hit = 64 if len(prompt) > 66 else 0
        assert steps[0].cached_tokens == e.stats().prefix_hits - before == hit
    programs = e.stats().programs
    assert list(e.generate(expected["prompts"][:1], GREEDY, max_new_tokens=64)) == expected["new"][:1]
    assert e.stats().programs == programs
    assert_nothing_leaks(e)


def test_many_short_prompts_go_together_and_are_continued_as_alone(checkpoints):
    prompts = [p[:40] for p in EXPECTED["mtp_1"]["prompts"]]
    e = engine(checkpoints("mtp_1"), drafts=3)
    together = list(e.generate(prompts, GREEDY, max_new_tokens=8))
    assert max(shape[0] for what, shape, *_ in e._programs if what == "prefill") == len(prompts) == 8
    assert [next(iter(e.generate([prompt], GREEDY, max_new_tokens=8))) for prompt in prompts] == together
    assert_nothing_leaks(e)


@pytest.mark.parametrize("up_to", [0, 2])
def test_drafts_are_used_up_to_a_number_of_texts(checkpoints, up_to):
    expected = EXPECTED["mtp_1"]
    e = engine(checkpoints("mtp_1"), drafts=3, drafts_up_to=up_to)
    ends = (8, 8, 20, 24)  # two of the texts go on alone
    requests = [e.submit(expected["prompts"][i], GREEDY, max_new_tokens=n) for i, n in enumerate(ends)]
    for request, n, new in zip(requests, ends, expected["new"], strict=False):
        assert [t for s in request for t in s.tokens] == new[:n]
    assert (e.stats().drafts > 0) == (up_to > 0)
    assert e.stats().drafts_up_to == up_to
    assert_nothing_leaks(e)


@pytest.mark.slow
def test_drafts_are_as_good_after_steps_without(checkpoints):
    """The MTP module's cache has no gaps: every second step without drafts, and each draft is as it would be."""
    model, variables = checkpoints("mtp_1")
    expected = EXPECTED["mtp_1"]
    made = {}
    for name, choose in (("all", lambda step: 1), ("every second", lambda step: step % 2)):
        e = engine((model, variables), drafts=1, max_batch=1)
        steps = iter(range(1000))
        e.speculation.choose = lambda *_, choose=choose, steps=steps: choose(next(steps))
        made[name] = seen = {}
        decode = e._decode

        def record(packed, drafts, e=e, decode=decode, seen=seen):
            logits = decode(packed, drafts)
            if drafts:
                slots = jax.device_get(e._slots)
                seen[int(slots.length[0])] = int(slots.drafts[0, 0])
            return logits

        e._decode = record
        assert list(e.generate(expected["prompts"][:1], GREEDY, max_new_tokens=64)) == expected["new"][:1]
        assert_nothing_leaks(e)
    both = made["all"].keys() & made["every second"].keys()
    assert len(both) > 10
    assert {n: made["all"][n] for n in both} == {n: made["every second"][n] for n in both}


@pytest.mark.slow
def test_seeded_texts_dont_depend_on_the_batch_or_on_drafts(checkpoints):
    prompts = EXPECTED["mtp_1"]["prompts"]
    sampling = Sampling(seed=7, top_k=20, top_p=0.9)
    drawn = []
    for drafts, rows in ((0, prompts[:4]), (2, prompts[:4]), (2, prompts[:1])):
        e = engine(checkpoints("mtp_1"), drafts=drafts)
        drawn.append(list(e.generate(rows, sampling, max_new_tokens=30)))
        assert_nothing_leaks(e)
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[0][:1]


def test_logprobs_penalties_biases_and_masks(checkpoints):
    model, variables = checkpoints("v3_base")
    prompt = EXPECTED["v3_base"]["prompts"][3]
    e = engine((model, variables), cache_tokens=FEW)
    (plain,) = e.generate([prompt], GREEDY, max_new_tokens=8)
    request = e.submit(prompt, GREEDY, max_new_tokens=8, logprobs=3, prompt_logprobs=1)
    steps = list(request)
    scores = [*steps[0].prompt_logprobs, *(score for step in steps for score in step.logprobs)]
    whole = [*prompt, *plain]
    assert [token for token, _, _ in scores] == whole
    logits = jax.jit(model.apply)(variables, jnp.array([whole]))[0]
    expected = np.take_along_axis(jax.nn.log_softmax(logits[:-1]), np.array(whole[1:])[:, None], 1)[:, 0]
    assert scores[0][1] is None
    np.testing.assert_allclose([value for _, value, _ in scores[1:]], expected, atol=1e-4)
    assert [best[0][0] for _, _, best in scores[len(prompt) :]] == plain

    def take(sampling, **how):
        return [t for step in e.submit(prompt, sampling, max_new_tokens=8, **how) for t in step.tokens]

    assert take(Sampling(temperature=0, logit_bias={5: 100.0})) == [5] * 8
    how = Sampling(
        temperature=0, logit_bias={5: 1.0}, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.5
    )
    got, forward, start = take(how), jax.jit(model.apply), len(prompt)
    for n in range(8):
        tokens = np.zeros((1, start + 8), np.int32)
        tokens[0, : start + n] = [*prompt, *got[:n]]
        row = np.array(forward(variables, tokens)[0, start + n - 1], np.float64)
        for token in {*prompt, *got[:n]}:
            row[token] = row[token] / 1.5 if row[token] > 0 else row[token] * 1.5
        for token in set(got[:n]):
            row[token] -= 1.5 + 0.5 * got[:n].count(token)
        row[5] += 1
        assert got[n] == row.argmax()

    class OnlyOdd:
        finished = False
        taken = ()

        def mask(self):
            return np.array([0xAAAAAAAA, 0xAAAAAAAA], np.uint32)

        def accept(self, token):
            self.taken = (*self.taken, token)

    grammar = OnlyOdd()
    assert all(t % 2 for t in take(GREEDY, grammar=grammar))
    assert len(grammar.taken) == 8
    assert_nothing_leaks(e)


def test_end_tokens_cancellation_and_errors_of_one_request(checkpoints):
    expected = EXPECTED["mtp_1"]
    prompt, new = expected["prompts"][4], expected["new"][4]
    e = engine(checkpoints("mtp_1"), end_ids=(new[3], new[5]), drafts=3)
    first = min(new.index(new[3]), new.index(new[5]))
    steps = list(e.submit(prompt, GREEDY, max_new_tokens=64))
    assert [t for s in steps for t in s.tokens] == new[: first + 1]
    assert (steps[-1].finish_reason, steps[-1].stop_token) == ("stop", new[first])
    free = e.submit(prompt, Sampling(temperature=0, ignore_eos=True), max_new_tokens=64)
    assert [t for s in free for t in s.tokens] == new
    for bad, named in (([], "empty"), ([64], "outside the vocabulary"), ([1] * 150, "exceed")):
        with pytest.raises(ConfigError, match=named):
            e.submit(bad, GREEDY, max_new_tokens=64)
    request = e.submit(prompt, Sampling(temperature=0, ignore_eos=True), max_new_tokens=64)
    other = e.submit(prompt, Sampling(temperature=0, ignore_eos=True), max_new_tokens=64)
    next(iter(request))
    e.cancel(request)
    assert list(request)[-1].finish_reason == "cancelled"
    assert [t for s in other for t in s.tokens] == new
    before = e.stats().tokens
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        list(e.generate([prompt, [64]], Sampling(temperature=0, ignore_eos=True), max_new_tokens=64))
    assert_nothing_leaks(e)
    assert e.stats().tokens - before < 64  # the first was cancelled


@pytest.mark.slow
def test_over_a_mesh_pages_are_spread_and_texts_are_the_same():
    expected = EXPECTED["mtp_1"]
    mesh = make_mesh(MeshShape(data=2, expert=2, tensor=2))
    model, variables = load_pretrained(GOLDEN / "mtp_1", runtime=Runtime(sharding="fsdp_ep"), mesh=mesh)
    e = engine((model, variables), drafts=1)
    pages = e.pages.total + 1

    def on_each_device():
        return {s.data.shape[1] for x in jax.tree.leaves(e._pool) for s in x.addressable_shards}

    assert on_each_device() == {pages // 4}  # data x expert
    prompts, new = expected["prompts"][:3], [text[:8] for text in expected["new"][:3]]
    assert list(e.generate(prompts, GREEDY, max_new_tokens=8)) == new
    assert on_each_device() == {pages // 4}
    assert_nothing_leaks(e)


def with_a_bad_token(checkpoint, token=63):
    """The model, with an embedding of a token that is not a number."""
    model, variables = checkpoint
    params = dict(variables["params"])
    params["embed_tokens"] = jnp.asarray(params["embed_tokens"]).at[token].set(jnp.nan)
    return model, variables | {"params": params}


def test_logits_that_arent_finite_end_their_request_alone(checkpoints):
    expected = EXPECTED["v3_base"]
    healthy = [i for i in range(8) if 63 not in expected["prompts"][i] + expected["new"][i]]
    assert healthy
    e = engine(with_a_bad_token(checkpoints("v3_base")), cache_tokens=FEW)
    bad = e.submit([5, 63, 7], GREEDY, max_new_tokens=64)
    good = [e.submit(expected["prompts"][i], GREEDY, max_new_tokens=64) for i in healthy]
    assert "not finite" in list(bad)[-1].error
    for i, request in zip(healthy, good, strict=True):
        assert [t for s in request for t in s.tokens] == expected["new"][i]
    assert_nothing_leaks(e)


def test_a_failed_text_leaves_the_prefix_that_it_shares(checkpoints):
    """The pages of a prefix are those of a running text, too, which would read zeros."""
    e = engine(with_a_bad_token(checkpoints("v3_base")))
    prefix = [token for token in range(1, 63) for _ in (0, 1)][:64]

    def scores(steps):
        return [score for step in steps for _, score, _ in step.logprobs]

    alone = scores(e.submit([*prefix, 5], GREEDY, max_new_tokens=60, logprobs=0))
    running = iter(e.submit([*prefix, 5], GREEDY, max_new_tokens=60, logprobs=0))
    first = next(running)
    bad = list(e.submit([*prefix, 63], GREEDY, max_new_tokens=4))
    assert "not finite" in bad[-1].error
    np.testing.assert_allclose(scores([first, *running]), alone, atol=1e-5)
    assert_nothing_leaks(e)


@pytest.mark.parametrize("how", ["cancelled", "preempted"])
def test_a_text_that_ends_before_it_fails_leaves_no_bad_page(checkpoints, monkeypatch, how):
    """Its values that aren't finite would be read by the next holder of the page."""
    e = engine(with_a_bad_token(checkpoints("v3_base")), cache_tokens=FEW, prefill_chunk=17)
    prefill_pieces = e._prefill_pieces

    def end_after_the_first(group):
        size = prefill_pieces(group)
        monkeypatch.setattr(e, "_prefill_pieces", prefill_pieces)
        if how == "preempted":
            e._preempt(group[0])
        e.cancel(group[0].request)
        return size

    monkeypatch.setattr(e, "_prefill_pieces", end_after_the_first)
    assert list(e.submit([63] * 40, GREEDY, max_new_tokens=8))[-1].finish_reason == "cancelled"
    assert list(e.submit([5, 7], GREEDY, max_new_tokens=1))[-1].error is None
    assert_nothing_leaks(e)


def test_a_text_that_stops_at_a_bad_token_leaves_no_bad_page(checkpoints):
    """The step after that token, which is on its way then, writes values that aren't finite."""
    expected = EXPECTED["v3_base"]
    prompt, end = expected["prompts"][3], expected["new"][3][0]
    assert end not in prompt
    e = engine(with_a_bad_token(checkpoints("v3_base"), end), cache_tokens=FEW)
    sampling = Sampling(temperature=0, stop_token_ids=(end,))
    for _ in range(2):  # the second gets the page of the first
        (step,) = e.submit(prompt, sampling, max_new_tokens=8)
        assert (step.tokens, step.error) == ([end], None)
    assert_nothing_leaks(e)


def test_drafts_that_arent_finite_leave_the_text_as_without_drafts(checkpoints):
    """Whatever isn't in the texts has an embedding that is not a number, so that a wrong draft spoils its step."""
    model, variables = checkpoints("mtp_1")
    expected = EXPECTED["mtp_1"]
    prompts, new = expected["prompts"][:2], expected["new"][:2]
    used = np.unique(np.concatenate([*prompts, *new]))
    params = dict(variables["params"])
    table = jnp.asarray(params["embed_tokens"])
    params["embed_tokens"] = jnp.full_like(table, jnp.nan).at[used].set(table[used])
    e = engine((model, variables | {"params": params}), drafts=3, drafts_up_to=8, cache_tokens=FEW)
    for _ in range(2):  # the second time with the same pages
        assert list(e.generate(prompts, GREEDY, max_new_tokens=64)) == new
    assert e.stats().preemptions > 0
    bad = min({*range(e.vocab_size)} - {*used.tolist()})
    assert "not finite" in list(e.submit([*prompts[0], bad], GREEDY, max_new_tokens=8))[-1].error
    assert_nothing_leaks(e)


class UpTo:
    """A grammar that fails as one that becomes too complex: of so many tokens it allows all."""

    finished = False

    def __init__(self, masks=99, accepted=99):
        self.masks, self.accepted = masks, accepted

    def mask(self):
        self.masks -= 1
        if self.masks < 0:
            raise ValueError("too complex")
        return np.array([0xFFFFFFFF] * 2, np.uint32)

    def accept(self, token):
        self.accepted -= 1
        if self.accepted < 0:
            raise ValueError("too complex")


def test_a_grammar_that_fails_ends_its_request_alone(checkpoints):
    expected = EXPECTED["v3_base"]
    e = engine(checkpoints("v3_base"), cache_tokens=FEW)
    others = [e.submit(prompt, GREEDY, max_new_tokens=64) for prompt in expected["prompts"]]
    for grammar in (UpTo(masks=0), UpTo(masks=3), UpTo(accepted=0), UpTo(accepted=3)):
        failed = e.submit(expected["prompts"][3], GREEDY, max_new_tokens=64, grammar=grammar)
        assert list(failed)[-1].error == "too complex"
    assert [[t for step in other for t in step.tokens] for other in others] == expected["new"]
    assert_nothing_leaks(e)


def test_a_prompt_that_loses_its_pages_is_scored_once(checkpoints, monkeypatch):
    prompt = EXPECTED["v3_base"]["prompts"][3]
    e = engine(checkpoints("v3_base"), prefill_chunk=17)
    pieces, prefill_pieces = [], e._prefill_pieces

    def preempt_after_the_first(group):
        size = prefill_pieces(group)
        pieces.append(group)
        if len(pieces) == 1:
            e._preempt(group[0])
        return size

    monkeypatch.setattr(e, "_prefill_pieces", preempt_after_the_first)
    first = next(iter(e.submit(prompt, GREEDY, max_new_tokens=8, prompt_logprobs=0)))
    assert len(pieces) > 2
    assert [token for token, _, _ in first.prompt_logprobs] == prompt
    assert_nothing_leaks(e)
