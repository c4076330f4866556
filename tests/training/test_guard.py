"""Guards: what they see in metrics, and whole runs that skip, name a layer, and go back."""

import dataclasses
import functools
import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.training import loop, setup, trainer
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.diagnose import first_in_backward, first_in_forward
from dsv3_jax.training.guard import Guard, GuardConfig
from tests.conftest import new_rng
from tests.parallel.small_run import small_config


def judged(config=GuardConfig()):
    said = []
    return Guard(config, 0.25, lambda step, what: said.append((step, what))), said


def feed(guard, losses, start=0, **metrics):
    for step, loss in enumerate(losses, start):
        guard.watch(step, {"loss": np.float32(loss), "skipped": np.int32(0)} | metrics)
    guard.settle()


def noise(count, level=3.0):
    return level + 0.02 * new_rng().normal(size=count)


def test_a_spike_is_seen_after_some_steps_and_noise_isnt():
    guard, said = judged(GuardConfig(rollback=True))
    feed(guard, noise(200))
    assert (said, guard.well, guard.off_course) == ([], True, False)
    feed(guard, [6.0, 6.0], 200)  # a bad batch or two
    assert (guard.well, guard.off_course) == (False, False)
    feed(guard, [3.0], 202)
    assert guard.well
    feed(guard, [6.0, 7.0, 8.0], 203)
    assert guard.off_course
    assert said[0][0] == 205
    assert "spiking" in said[0][1]
    guard.rolled_back()
    assert guard.well
    assert guard.rollbacks == 1
    feed(guard, noise(70, level=5.0), 300)  # a level that stays is no spike
    assert guard.well


def test_skipped_steps_are_counted_in_a_row():
    guard, said = judged(GuardConfig(max_skipped=3))
    for step, skipped in enumerate([1, 1, 0, 1, 1, 1]):
        guard.watch(step, {"loss": np.float32(np.nan if skipped else 3), "skipped": np.int32(skipped)})
    assert not guard.stuck  # the last ones aren't looked at yet
    guard.settle()
    assert (guard.stuck, guard.skipped, len(said)) == (True, 5, 2)


def test_collapse_is_said_once_by_layer():
    said = []
    guard = Guard(GuardConfig(), 2 / 16, lambda step, what: said.append((step, what)), warmup_steps=10)
    feed(guard, noise(80), start=1, **{"load_violation/moe_layers": np.array([0.4, 6.0])})
    assert [(step, "moe_layers/1 gets 88%" in what) for step, what in said] == [(60, True)]


def test_a_restored_guard_judges_as_before():
    losses = [*noise(100), 6.0, 6.0]
    one, _ = judged(GuardConfig(rollback=True))
    feed(one, losses)
    other, _ = judged(GuardConfig(rollback=True))
    other.set_state(json.loads(json.dumps(one.state())))
    for guard in (one, other):
        feed(guard, [6.0], 102)
    assert one.off_course
    assert one.state() == other.state()


def test_bad_guards_are_refused():
    with pytest.raises(ConfigError, match=r"guard\.max_skipped is 0"):
        GuardConfig(max_skipped=0)
    with pytest.raises(ConfigError, match="trace_steps is '5'"):
        dataclasses.replace(small_config("", "single"), trace_steps="5")


def test_names_of_layers():
    found = {"embed_tokens": True, "moe_layers": np.array([True, True, False]), "dense_layers": np.array([True])}
    assert first_in_forward(found) == "layer moe_layers/2"
    assert first_in_forward({"embed_tokens": True, "the head or the loss": True}) is None
    gradients = {"moe_layers/mlp/up": np.array([False, False, True]), "embed_tokens": False, "lm_head": True}
    assert first_in_backward(gradients) == "moe_layers/1/mlp/up"


def test_a_hanging_step_ends_the_process_with_its_stacks():
    lines = ("import time", "from dsv3_jax.training.guard import watchdog", "with watchdog(0.5) as alive:")
    code = "\n".join((*lines, " alive()", " time.sleep(60)"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "line 5" in done.stderr


def spoil(monkeypatch, at, change):
    """After `at` calls of the compiled step, whatever their step, changes the parameters."""
    original, calls = setup.Setup.__init__, iter(range(10**6))

    def __init__(self, *arguments, **options):
        original(self, *arguments, **options)
        step = self.train_step

        def spoiled(state, *batch):
            state, metrics = step(state, *batch)
            return (state.replace(params=change(state.params)) if next(calls) == at else state), metrics

        self.train_step = _Spoiled(step, spoiled)

    monkeypatch.setattr(setup.Setup, "__init__", __init__)


class _Spoiled:
    def __init__(self, step, call):
        self.check, self._call = step.check, call

    def __call__(self, *arguments):
        return self._call(*arguments)


@pytest.mark.parametrize("precision", ["dtype", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_layer_that_breaks_is_named_and_no_good_checkpoint_is_lost(precision, tmp_path, monkeypatch):
    config = small_config("", "single", first_k_dense_replace=0, num_hidden_layers=3, num_nextn_predict_layers=0)
    config = dataclasses.replace(
        config,
        runtime=dataclasses.replace(config.runtime, precision=precision),
        schedule=dataclasses.replace(config.schedule, steps=20),
        guard=GuardConfig(max_skipped=3),
        checkpoint_every=6,
    )

    def break_layer(params):
        stack = params["moe_layers"]["self_attn"]
        spoiled = stack | {"o_proj": stack["o_proj"].at[1].set(jnp.nan)}
        return params | {"moe_layers": params["moe_layers"] | {"self_attn": spoiled}}

    spoil(monkeypatch, 6, break_layer)
    said = io.StringIO()
    with pytest.raises(trainer.TrainingError, match=r"3 steps in a row .* layer moe_layers/1 are the first"):
        trainer.train(config, tmp_path / "run", console=Console(file=said, width=1000))
    assert "step 8: its loss or gradient isn't finite: skipped" in said.getvalue()
    assert sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()) == [0, 6]


def test_a_run_whose_last_steps_are_skipped_does_not_end_as_if_well(tmp_path, monkeypatch):
    """The parameters stay finite, the loss overflows; the run's last step is evaluated for its checkpoint alone."""
    config = small_config("", "single", num_hidden_layers=1, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, guard=GuardConfig(max_skipped=3))

    spoil(monkeypatch, 4, lambda params: params | {"lm_head": jnp.full_like(params["lm_head"], 1e38)})
    with pytest.raises(trainer.TrainingError, match=r"3 steps in a row .* of the head .* stopped at step 8"):
        trainer.train(config, tmp_path / "run", console=Console(quiet=True))
    assert "8" not in [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert not (tmp_path / "run/report.md").exists()


def test_a_skipped_last_step_is_counted_in_the_metrics(tmp_path, monkeypatch):
    config = small_config("", "single", num_hidden_layers=1, num_nextn_predict_layers=0)
    spoil(monkeypatch, 6, lambda params: params | {"lm_head": jnp.full_like(params["lm_head"], 1e38)})
    metrics = trainer.train(config, tmp_path / "run", console=Console(quiet=True)).metrics
    assert metrics["skipped"] == 1


def test_a_run_that_goes_back_before_the_step_it_went_on_from(tmp_path, monkeypatch):
    """It went on from step 4, which wasn't good, and is sent back to step 2 after step 5."""
    config = dataclasses.replace(small_config("", "single"), keep_checkpoints=9, log_every=1, validate_every=8)
    directory = tmp_path / "run"
    train = functools.partial(trainer.train, config, directory)
    train(console=Console(quiet=True))
    for step in (6, 8):
        shutil.rmtree(directory / f"checkpoints/{step}")
    opened, original = [], loop.MetricsLog
    monkeypatch.setattr(loop, "MetricsLog", lambda *a, **k: opened.append(original(*a, **k)) or opened[-1])
    monkeypatch.setattr(Checkpoints, "_newest_good", lambda _: 2)
    monkeypatch.setattr(Guard, "off_course", property(lambda self: self.rollbacks == 0))
    said = io.StringIO()
    assert train(resume=True, console=Console(file=said, width=1000)).metrics["step"] == 8
    said = said.getvalue()
    assert [int(line[5]) for line in said.splitlines() if "/8" in line] == [5, 3, 4, 5, 6, 7, 8]
    assert "step 2: rolled back from step 5" in said
    assert "\n7 steps in " in said
    assert (len(opened), said.count("first step after")) == (1, 1)


def test_no_more_rollbacks_than_the_limit():
    """Which may be lower when a run goes on than it was before."""
    run = object.__new__(loop.Loop)
    run.config = dataclasses.replace(small_config("", "single"), guard=GuardConfig(max_rollbacks=1))
    run.guard, _ = judged()
    run.guard.rollbacks, run.checkpoints = 2, SimpleNamespace(good=2, latest=lambda: 4)
    with pytest.raises(trainer.TrainingError, match=r"spikes after 2 rollbacks .guard.max_rollbacks is 1"):
        run._roll_back(5)


@pytest.mark.slow
def test_a_spike_is_rolled_back_and_the_run_comes_to_the_same_loss(tmp_path, monkeypatch):
    config = small_config("", "single")
    config = dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, steps=160, batch_size=16, end_learning_rate=1e-4),
        guard=GuardConfig(rollback=True, spike_deviations=5),
        checkpoint_every=20,
        log_every=20,
        validate_every=160,
        validation_batches=8,
    )
    plain = trainer.train(config, tmp_path / "plain", console=Console(quiet=True)).metrics
    spoil(monkeypatch, 110, lambda params: jax.tree.map(lambda x: x * jnp.asarray(8, x.dtype), params))
    said = io.StringIO()
    rolled = trainer.train(config, tmp_path / "rolled", console=Console(file=said, width=1000)).metrics
    print(plain["validation_loss"], rolled["validation_loss"], said.getvalue())
    assert "step 100: rolled back from step 11" in said.getvalue()
    np.testing.assert_allclose(rolled["validation_loss"], plain["validation_loss"], rtol=0.02)
    records = [json.loads(line) for line in (tmp_path / "rolled/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(20, 161, 20))
    assert [r["step"] for r in records if "rolled back" in r.get("event", "")] == [100]
    sequences = [
        json.loads((tmp_path / name / "checkpoints/160/data/metadata").read_text()) for name in ("plain", "rolled")
    ]
    taken_twice = (sum(sequences[1]["taken"]) - sum(sequences[0]["taken"])) / 16
    assert taken_twice == int(said.getvalue().split("rolled back from step ")[1].split(",")[0]) - 100  # on new data
