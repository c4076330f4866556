"""A run stopped on one mesh goes on with another one, to the same values and losses."""

import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.dispatch import SLACKS
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.training import loop, trainer
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.directory import write_config
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.step import init_state
from tests.parallel.small_run import small_config


def losses(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "run"
    trainer.train(small_config("", "single"), directory, console=Console(quiet=True))
    return losses(directory)


ONE, EXPERTS, NODES = ("", "single"), ("fsdp=2,expert=4", "fsdp_ep"), ("node=2,expert=2,tensor=2", "fsdp_ep")
CUT, SEQUENCES, STAGES = ("data=2,tensor=4", "fsdp"), ("context=2,fsdp=4", "fsdp"), ("stage=2,expert=4", "pp_ep_dp")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ONE, NODES),
        pytest.param(EXPERTS, ONE, marks=pytest.mark.slow),
        pytest.param(CUT, EXPERTS, marks=pytest.mark.slow),
        pytest.param(NODES, STAGES, marks=pytest.mark.slow),
    ],
)
def test_values_are_the_same_on_another_mesh(tmp_path, before, after):
    def placed(mesh, sharding, seed):
        config = small_config(mesh, sharding)
        model, optimizer = (
            DeepSeekV3(config.model, config.runtime),
            make_optimizer(config.optimizer, Schedule(config.schedule)),
        )
        placement = Placement(config.mesh, config.runtime, parameter_axes(model))
        return placement.jit_init(lambda key: init_state(model, optimizer, key))(jax.random.key(seed))

    saved, other = placed(*before, 0), placed(*after, 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(saved, {})
    checkpoints.wait()
    restored, *_ = checkpoints.restore(other)
    checkpoints.close()
    for a, b, c in zip(*map(jax.tree.leaves, (saved.variables, restored.variables, other.variables)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding == c.sharding


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ONE, NODES),
        pytest.param(EXPERTS, ONE, marks=pytest.mark.slow),
        pytest.param(CUT, SEQUENCES, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_resume_on_another_mesh(one_device, tmp_path, monkeypatch, before, after):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_asked_to_stop", lambda _, stopping, done: done == 4)  # as by Ctrl-C
        assert trainer.train(small_config(*before), directory, console=Console(quiet=True)).metrics["stopped"]
    result = trainer.train(small_config(*after), directory, resume=True, console=Console(quiet=True)).metrics
    assert not result["stopped"]
    got = losses(directory)
    assert got.keys() == one_device.keys()
    for step, loss in one_device.items():
        np.testing.assert_allclose(got[step], loss, rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.slow
def test_slack_is_chosen_by_the_routing_seen(tmp_path, monkeypatch):
    """Few tokens a device need more than 1.2; the run says so, takes it from then on, and when it is resumed."""
    config, directory, used = small_config("expert=8", "fsdp_ep"), tmp_path / "run", []
    use = Setup.use_slack
    monkeypatch.setattr(Setup, "use_slack", lambda setup, slack: (used.append(slack), use(setup, slack)))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_asked_to_stop", lambda _, stopping, done: done == 6)
        trainer.train(config, directory, console=Console(quiet=True))
    assert used[0] is None
    assert used == sorted(set(used), key=lambda slack: slack or 0)
    chosen = used[-1]
    assert chosen in SLACKS[1:]
    trainer.train(config, directory, resume=True, console=Console(quiet=True))
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    said = [r["step"] for r in records if r.get("event", "").startswith(f"dispatch_slack is {chosen:g} ")]
    assert len(said) == 1  # the resumed run has it from the checkpoint
    rounds = {r["step"]: r["dispatch_in_rounds"] for r in records if "loss" in r}
    assert min(rounds[step] for step in rounds if step > said[0]) < rounds[said[0]]


@pytest.mark.parametrize(
    ("user", "before", "share", "step", "after"),
    [
        (None, None, 0.2, 2, 2.0),
        (None, 1.5, 0.2, 2, 2.0),
        (None, 2.0, 0.2, 2, None),  # which is as much
        (None, None, 0.1, 2, None),  # rarely enough
        (None, None, 0.2, 1, None),  # in the warm-up
        (1.0, 1.0, 0.2, 2, None),
    ],
)
def test_when_more_slack_is_taken(user, before, share, step, after):
    config, used = small_config("expert=8", "fsdp_ep"), []
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, dispatch_slack=user))
    setup = SimpleNamespace(dispatch_slack=before, use_slack=used.append, throughput=mock.Mock())
    last = {"dispatch_in_rounds": share, "dispatch_slack_needed": 2.0}
    loop.Loop._choose_slack(SimpleNamespace(config=config, setup=setup, last=last, _event=mock.Mock()), step)
    assert used == ([] if after is None else [after])


def test_another_model_is_still_another_run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    write_config(directory, small_config("", "single", hidden_size=32), None)
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        trainer.train(small_config("", "single"), directory, resume=True)
