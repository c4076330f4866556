"""The choice between steps with and without drafts, from made-up times and acceptances."""

import itertools
import random

import pytest

from dsv3_jax.inference.speculation import PERIOD, TRY, Speculation


def run(speculation, seconds, accepted, *, batch=1, drafting=None, steps=1000, text=None, rng=None):
    """Takes steps of a text whose times are seconds[drafts]. Returns how many drafts each had."""
    text = text or speculation.of_text()
    chosen: list[int] = []
    late = 0.0
    for _ in range(steps):
        drafts = speculation.choose(batch, batch, text.mean * (batch if drafting is None else drafting))
        chosen.append(drafts)
        late, was_late = rng.uniform(0, 1) if rng else 0, late
        busy = 3 if rng and len(chosen) // 300 % 5 == 1 else 1
        speculation.took((batch, 2, drafts), busy * seconds[drafts] + late - was_late)
        if drafts:
            count = next(accepted)
            text.add(count)
            speculation.acceptance.add(count)
    return chosen


def settled(chosen):
    """Drafts that most of the last steps have."""
    return max(set(chosen[-500:]), key=chosen[-500:].count)


always, never = itertools.repeat(1), itertools.repeat(0)


@pytest.mark.parametrize(
    ("drafts", "ratio", "accepted", "pays"),
    [
        (1, 1.3, (0, 1), True),
        (1, 1.7, (0, 1), False),
        (1, 1.3, (0,), False),
        (2, 1.9, (1,), True),
        (2, 2.6, (1,), False),
    ],
)
def test_drafts_are_used_where_the_time_per_token_is_less(drafts, ratio, accepted, pays):
    """Where the host notices late that a step has ended, and now and then all takes 3 times as long."""
    speculation = Speculation(drafts)
    times = {0: 1.0, drafts: ratio}
    chosen = run(speculation, times, itertools.cycle(accepted), steps=16 * PERIOD, rng=random.Random(0))
    assert settled(chosen) == (drafts if pays else 0)
    assert speculation.pays_up_to == (1 if pays else 0)
    # The other kind is tried, and rarely, which bounds what this costs.
    other = sum((d > 0) != pays for d in chosen[-8 * PERIOD :])
    assert 0 < other <= 9 * TRY


def test_the_choice_follows_a_text_and_the_next_begins_as_most_did():
    speculation = Speculation(1)
    good, times = speculation.of_text(), {0: 1.0, 1: 1.4}
    assert settled(run(speculation, times, always, text=good)) == 1
    bad = speculation.of_text()
    assert settled(run(speculation, times, never, text=bad)) == 0
    assert bad.mean < 0.4 < 0.9 < speculation.acceptance.mean
    assert settled(run(speculation, times, always)) == 1
    assert settled(run(speculation, {0: 1.0, 1: 2.4}, always, steps=5 * PERIOD)) == 0
    assert settled(run(speculation, times, always, steps=8 * PERIOD)) == 1  # by tries alone


def test_each_number_of_texts_is_decided_by_itself():
    speculation = Speculation(1)
    assert speculation.pays_up_to is None
    assert str(speculation) == "drafts: by measurement"
    for batch, ratio in ((8, 1.9), (1, 1.3), (4, 1.5), (16, 1.2)):
        run(speculation, {0: 1.0, 1: ratio}, itertools.cycle((1, 1, 0, 1)), batch=batch)
    assert speculation.pays_up_to == 4
    assert str(speculation) == "drafts: up to 4 texts, measured"


def test_texts_that_accept_no_drafts_count_as_such():
    seconds = {0: 1.0, 1: 1.4}
    assert settled(run(Speculation(1), seconds, always, batch=4)) == 1
    assert settled(run(Speculation(1), seconds, always, batch=4, drafting=1)) == 0


def test_without_times_there_are_no_drafts():
    speculation = Speculation(1)
    chosen = [speculation.choose(1, 1, 1.0) for _ in range(100)]
    assert chosen == ([1] * TRY + [0] * TRY) * 2 + [0] * (100 - 4 * TRY)


def test_only_runs_that_nothing_interrupts_are_compared():
    speculation = Speculation(1)
    for step in range(20 * TRY):
        drafts = step // TRY % 2
        speculation.took(None if step % 4 == 0 else (1, 2, drafts), 1.0)
    assert speculation.pays_up_to is None
    for pages, drafts in ((2, 0), (4, 1), (8, 0)):  # nor those of other sizes
        for _ in range(TRY):
            speculation.took((1, pages, drafts), 1.0)
    assert speculation.pays_up_to is None
    for _ in range(TRY):
        speculation.took((1, 8, 1), 1.0)
    assert speculation.pays_up_to == 1


@pytest.mark.parametrize(("drafts", "up_to", "said"), [(1, 2, "drafts: up to 2 texts"), (0, None, "no drafts")])
def test_a_given_number_of_texts_decides_alone(drafts, up_to, said):
    speculation = Speculation(drafts, up_to)
    for batch in (1, 2, 3):
        assert set(run(speculation, {0: 1.0, 1: 1.1}, never, batch=batch)) == {drafts if batch <= (up_to or 0) else 0}
    assert speculation.pays_up_to == (up_to or 0)
    assert str(speculation) == said
