"""A run stopped on one mesh goes on with another one, to the same values and losses."""

import json

import numpy as np
import pytest
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.training import trainer
from tests.parallel.small_run import small_config


def losses(directory):
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one") / "run"
    trainer.train(small_config("", "single"), directory, console=Console(quiet=True))
    return losses(directory)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp=2,expert=4", "fsdp_ep"), ("", "single")),
        (("", "single"), ("node=2,expert=2,tensor=2", "fsdp_ep")),
        (("data=2,tensor=4", "fsdp"), ("context=2,fsdp=4", "fsdp")),
    ],
)
def test_resume_on_another_mesh(one_device, tmp_path, monkeypatch, before, after):
    directory = tmp_path / "run"
    asked = iter([False, True])  # at steps 2 and 4: stopped as by Ctrl-C
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "any_process", lambda _: next(asked))
        assert trainer.train(small_config(*before), directory, console=Console(quiet=True))["stopped"]
    result = trainer.train(small_config(*after), directory, resume=True, console=Console(quiet=True))
    assert not result["stopped"]
    got = losses(directory)
    assert got.keys() == one_device.keys()
    for step, loss in one_device.items():
        np.testing.assert_allclose(got[step], loss, rtol=1e-5, err_msg=f"step {step}")


def test_another_model_is_still_another_run(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(small_config("", "single", hidden_size=32).to_json())
    with pytest.raises(ConfigError, match=r"model\.hidden_size"):
        trainer.train(small_config("", "single"), directory, resume=True)
