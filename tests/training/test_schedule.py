"""The schedule against the report's section 4.2, milestone by milestone."""

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.training.schedule import Schedule, ScheduleConfig

PAPER = Schedule(ScheduleConfig(steps=242_800, initial_batch_size=3072, ramp_stages=64))
TOKENS = PAPER.total_sequences * 4096


def step_at(tokens):
    steps = np.arange(0, 242_801, 50)
    return int(steps[np.searchsorted(np.asarray(PAPER.progress(steps)) * TOKENS, tokens)])


def test_the_papers_run_has_the_papers_tokens():
    assert pytest.approx(14.8e12, rel=2e-3) == TOKENS
    # Linear in tokens: about 15,000 steps to full size, against 7,454 at the full batch size.
    assert PAPER.ramp[-1].start_step == pytest.approx(14_997, rel=0.02)
    assert PAPER.batch_size(0) == 3072
    assert PAPER.batch_size(100_000) == 15360


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (1e12, 2.2e-4),
        (9.9e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (14.4e12, 2.2e-5),
        (14.6e12, 2.2e-5),
        (14.7e12, 7.3e-6),
    ],
)
def test_learning_rate(tokens, rate):
    assert float(PAPER.learning_rate(step_at(tokens))) == pytest.approx(rate, rel=1e-2)


def test_warmup_is_linear_over_2000_steps():
    assert float(PAPER.learning_rate(999)) == pytest.approx(1.1e-4, rel=1e-3)
    assert float(PAPER.learning_rate(1999)) == pytest.approx(2.2e-4, rel=1e-3)


def test_mtp_weight_and_bias_speed_switch_where_they_should():
    assert float(PAPER.mtp_weight(step_at(9.9e12))) == pytest.approx(0.3)
    assert float(PAPER.mtp_weight(step_at(10.1e12))) == pytest.approx(0.1)
    assert float(PAPER.bias_update_speed(step_at(14.2e12))) == pytest.approx(1e-3)
    assert float(PAPER.bias_update_speed(step_at(14.4e12))) == 0


def test_progress_counts_the_sequences_that_batches_take():
    schedule = Schedule(ScheduleConfig(steps=50, batch_size=8, initial_batch_size=2, ramp_until=0.5, ramp_stages=3))
    taken = np.cumsum([0] + [schedule.batch_size(s) for s in range(50)])
    assert taken[-1] == schedule.total_sequences
    np.testing.assert_allclose(schedule.progress(np.arange(51)), taken / taken[-1], atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"initial_batch_size": 9, "batch_size": 8}, "initial_batch_size is 9"),
        ({"constant_until": 0.99}, "constant_until"),
    ],
)
def test_impossible_schedules_are_named(bad, named):
    with pytest.raises(ConfigError, match=named):
        ScheduleConfig(**bad)
