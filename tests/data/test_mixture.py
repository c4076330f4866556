"""Shares of sources, against their definition: never a sequence away, at any point."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.data import DataConfig, Mixture


@st.composite
def stages(draw):
    sources = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 100), min_size=sources, max_size=sources).filter(any)
    starts = sorted({0, *draw(st.lists(st.integers(1, 200), max_size=3))})
    return [(start, [Fraction(w) for w in draw(weights)]) for start in starts]


@given(stages())
def test_no_source_is_a_sequence_away_from_its_share(stages):
    mixture, sources = Mixture(stages), len(stages[0][1])
    taken, due = [0] * sources, [Fraction(0)] * sources
    bound = 1 - Fraction(1, max(2 * sources - 2, 1))  # Tijdeman's: less than one sequence
    for n in range(300):
        weights = [w for start, w in stages if start <= n][-1]
        due = [d + w / sum(weights) for d, w in zip(due, weights, strict=True)]
        chosen = mixture.next(n, taken)
        taken[chosen] += 1
        assert [mixture.due(i, n + 1) for i in range(sources)] == due
        assert all(abs(t - d) <= bound for t, d in zip(taken, due, strict=True)), (n, taken, due)


def test_far_positions_need_no_history():
    mixture = Mixture([(0, [Fraction("0.7"), Fraction("0.3")]), (10**9, [Fraction(1), Fraction(3)])])
    n = 10**12
    taken = [int(mixture.due(i, n)) for i in range(2)]
    taken[1] += n - sum(taken)
    assert mixture.next(n, taken) in (0, 1)
    assert mixture.due(0, n) == Fraction(7, 10) * 10**9 + Fraction(n - 10**9, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ("web",)}, r"data\.sources: 'web' is not NAME=SOURCE:WEIGHT"),
        ({"sources": ("web=a:x",)}, "'x' is not a number of 0 or more"),
        ({"sources": ("web=a:-1",)}, "'-1' is not a number of 0 or more"),
        ({"sources": ("web=a:0",)}, "all weights are 0"),
        ({"sources": ("web=a:1", "web=b:1")}, "two have one name"),
        ({"sources": ("w=a:1", "c=b:1"), "reweight": ("100:w=1",)}, r"is not TOKENS:NAME=WEIGHT.*\(w, c\)"),
        ({"sources": ("w=a:1",), "reweight": ("1:w=1",)}, "must begin after"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(sequence_length=8, **fields)
