"""Tokens of steps that verify drafts have the distribution of the definition: chi-square over 200,000 draws."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import chi2

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.inference import steps
from dsv3_jax.inference.paged_cache import init_pool
from dsv3_jax.inference.sampling import Sampling, kind, rows
from tests.inference.test_generate import expected_distribution

MTP_1 = Path(__file__).parents[1] / "golden/mtp_1"
DRAWS, BATCH = 200_000, 2000
PROMPT = [8, 8, 1, 5, 9, 1, 8, 2]  # after which the MTP module drafts the likeliest token
HOW = [Sampling(t, k, p) for t, k, p in itertools.product((0.4, 1.0), (None, 5), (1.0, 0.8))]


def p_value(counts, expected):
    """The p-value of a chi-square test; tokens expected fewer than ten times count as one."""
    assert counts[expected == 0].sum() == 0
    wanted, rare = expected * counts.sum(), expected * counts.sum() < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return float(chi2.sf(np.sum((observed - wanted) ** 2 / wanted), max(len(wanted) - 1, 1)))


@pytest.mark.slow
def test_verified_tokens_have_the_distribution_of_the_definition():
    model, variables = load_pretrained(MTP_1)
    logits = np.asarray(jax.jit(model.apply)(variables, jnp.array([PROMPT]))[0, -1], np.float64)
    draft = int(logits.argmax())
    after = np.asarray(jax.jit(model.apply)(variables, jnp.array([[*PROMPT, draft]]))[0, -1], np.float64)

    absorbed = model.clone(runtime=dataclasses.replace(model.runtime, attention_form="absorbed"))
    pool, slots = init_pool(model.config, model.runtime, 2, mtp=True), steps.init_slots(model, BATCH, 1)
    expanded = model.clone(runtime=dataclasses.replace(model.runtime, attention_form="expanded"))

    def batch(slot, cached, new, how, seeds):
        full = lambda value: np.full(len(slot), value, np.int32)
        tables = np.ones((len(slot), 1), np.int32)
        return steps.Batch(slot, full(cached), full(new), full(0), rows([how] * len(slot), seeds), tables).pack()

    one = batch(np.array([BATCH], np.int32), 0, len(PROMPT) - 1, Sampling(), [0])
    tokens, following = np.array([PROMPT[:-1]], np.int32), np.array([PROMPT[1:-1] + [-1]], np.int32)
    pool, slots, _, _ = steps.prefill(expanded, variables, pool, slots, tokens, following, one)
    hidden = jnp.broadcast_to(slots.hidden[BATCH], slots.hidden.shape)
    # All rows are the same text, over the same page: what they write there is the same too.
    full, every = lambda value: jnp.full(BATCH + 1, value, jnp.int32), np.arange(BATCH, dtype=np.int32)
    for number, how in enumerate(HOW):
        first, second = np.zeros((2, model.config.vocab_size), int)
        for start in range(0, DRAWS, BATCH):
            packed = batch(every, 0, 1, how, (number * DRAWS + start + every).tolist())
            following = jnp.broadcast_to(PROMPT[-1], (BATCH + 1, 2)).astype(jnp.int32)
            text = full(PROMPT[-1]), full(len(PROMPT) - 1), full(0)[:, None], jnp.copy(hidden), following, full(1)
            pool, slots, logits_now = steps.decode(absorbed, variables, pool, steps.Slots(*text), packed, drafts=1)
            assert (np.asarray(slots.drafts[:BATCH]) == draft).all()
            _, drawn = steps.draw(slots, logits_now, packed[:1], None, kind=kind([how]), scored=False)
            first += np.bincount(drawn.tokens[:, 0], minlength=len(first))
            accepted = np.asarray(drawn.count) == 2
            np.testing.assert_array_equal(accepted, np.asarray(drawn.tokens[:, 0]) == draft)
            second += np.bincount(drawn.tokens[accepted, 1], minlength=len(second))
        for counts, of in ((first, logits), (second, after)):
            assert p_value(counts, expected_distribution(of, how)) > 0.001, how
