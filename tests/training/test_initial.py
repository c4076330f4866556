"""Runs that start from weights which are there already: which are taken, and which are refused."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.config import ConfigError, Yarn
from dsv3_jax.data import load_tokenizer
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.training import trainer
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.directory import write_config
from dsv3_jax.training.initial import check_source, state_from, with_model_of
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import init_state
from tests.parallel.small_run import small_config

ONE = small_config("", "single")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run that stands at step 2, its state of random numbers, and the same weights in the two other layouts."""
    directory, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    model, optimizer = DeepSeekV3(ONE.model, ONE.runtime), make_optimizer(ONE.optimizer, Schedule(ONE.schedule))
    state = jax.jit(lambda: init_state(model, optimizer, jax.random.key(0)))()
    state = jax.tree.map(
        lambda x: x + 2 if x.dtype == np.int32 else x if x.ndim == 0 else rng.random(x.shape, np.float32), state
    )
    write_config(directory_made(directory / "run"), ONE, None)
    checkpoints = Checkpoints(directory / "run/checkpoints", 1)
    checkpoints.save(jax.device_put(state), {})
    checkpoints.close()
    convert_command(ConvertArgs(str(directory / "run"), directory / "hf"), QUIET)
    convert_command(ConvertArgs(str(directory / "hf"), directory / "converted"), QUIET)
    return directory, state


def directory_made(path):
    path.mkdir()
    return path


def longer(config):
    """The model at eight times the length, by YaRN."""
    model = dataclasses.replace(config.model, max_position_embeddings=16384, rope_scaling=Yarn(8.0, 2048))
    return dataclasses.replace(config, model=model)


def start(config, path, **options):
    model, optimizer = (
        DeepSeekV3(config.model, config.runtime),
        make_optimizer(config.optimizer, Schedule(ONE.schedule)),
    )
    devices = jax.devices()[: config.mesh.devices]
    placement = Placement(config.mesh, config.runtime, parameter_axes(model), devices)
    abstract, _ = placement.abstract(lambda key: init_state(model, optimizer, key), {})
    state = state_from(path, config.runtime, abstract, optimizer, jax.random.key(1), **options)
    for leaf, like in zip(*map(jax.tree.leaves, (state, abstract)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
    return state


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("layout", ["run", "hf", "converted"])
@pytest.mark.parametrize("mesh", [("", "single"), ("fsdp=2", "fsdp")], ids=str)
def test_weights_of_every_layout_with_a_fresh_optimizer(source, layout, mesh):
    directory, end = source
    state = start(longer(small_config(*mesh)), directory / layout)
    assert_equal(state.params, end.params)
    assert_equal(state.router, end.router)
    assert any(np.any(np.asarray(bias) != 0) for bias in jax.tree.leaves(end.router))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((state.opt_state, state.step)))


def test_the_optimizers_state_is_taken_over_but_not_its_place_in_the_schedule(source):
    directory, end = source
    state = start(ONE, directory / "run", optimizer_state=True)
    counts = []

    def compare(mine, theirs):
        if isinstance(mine, optax.ScaleByScheduleState):
            counts.append((int(mine.count), int(theirs.count)))
        else:
            assert_equal(mine, theirs)

    jax.tree.map(compare, state.opt_state, end.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
    assert counts == [(0, 2)]
    assert int(state.step) == 0


def test_mtp_modules_may_be_left_out(source):
    directory, end = source
    state = start(
        small_config("", "single", num_nextn_predict_layers=0), f"file://{directory}/run", optimizer_state=True
    )
    assert_equal(state.params, {k: v for k, v in end.params.items() if k != "mtp_0"})
    assert set(state.router) == {"moe_layers"}


@pytest.mark.slow
def test_a_run_that_starts_from_another_has_its_model(source, tmp_path):
    """One step at a learning rate of 0, at another length: the parameters are what they were."""
    directory, end = source
    config = with_model_of(directory / "run", dataclasses.replace(small_config("", "single", hidden_size=32)))
    assert config.model.hidden_size == ONE.model.hidden_size
    schedule = dataclasses.replace(
        ONE.schedule, steps=1, peak_learning_rate=1e-30, end_learning_rate=1e-30, tail_learning_rate=1e-30
    )
    config = longer(dataclasses.replace(config, schedule=schedule, init_from=str(directory / "run")))
    result = trainer.train(config, tmp_path / "run", console=QUIET)
    assert_equal(result.state.params, end.params)


def test_what_the_weights_do_not_suit_is_named(source):
    directory, _ = source
    path, tokens = directory / "run", load_tokenizer(None)
    check = lambda path, optimizer_state=False, **model: check_source(
        path, dataclasses.replace(ONE.model, **model), tokens, optimizer_state=optimizer_state
    )
    check(path, optimizer_state=True, max_position_embeddings=64, rope_theta=5e4)
    for name, value in (("vocab_size", 300), ("hidden_size", 32), ("num_nextn_predict_layers", 2)):
        with pytest.raises(ConfigError, match=f"model.{name} is {value}, but the weights of .*run are for"):
            check(path, **{name: value})
    with pytest.raises(ConfigError, match="init_optimizer is for the directory of a run"):
        check(directory / "converted", optimizer_state=True)
    with pytest.raises(FileNotFoundError):
        check(directory / "nothing")


def test_another_vocabulary_is_named(source):
    class Swapped(type(load_tokenizer(None))):
        def token_bytes(self):
            tokens = super().token_bytes()
            return [*tokens[:97], tokens[98], tokens[97], *tokens[99:]]

        def save(self, directory):
            (directory / "tokenizer.json").write_text("another")

    with pytest.raises(ConfigError, match="token 97 is b'b', there b'a'"):
        check_source(source[0] / "run", ONE.model, Swapped(), optimizer_state=False)
