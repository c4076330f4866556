"""Errors that a run would meet later stop it before its first step; and a state that isn't finite is never saved."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.config import ConfigError
from dsv3_jax.data import DataConfig, load_tokenizer
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.parallel.processes import Processes
from dsv3_jax.training import setup, trainer
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from tests.parallel.small_run import small_config

ONE = small_config("", "single")
TWO = small_config("fsdp=2", "fsdp")


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """A mesh of two takes two of the eight."""
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:2])


@pytest.fixture
def texts(tmp_path):
    """40 short documents, of which a few are for validation."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i}.txt").write_text(f"document {i} of a few words")
    return str(tmp_path / "texts")


def refused(config, directory):
    with pytest.raises(ConfigError) as caught:
        trainer.train(config, directory, console=Console(quiet=True))
    assert not directory.exists()
    return str(caught.value)


def test_a_project_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    found = refused(dataclasses.replace(ONE, wandb_project="small"), tmp_path / "run")
    assert "wandb_project is 'small', but it isn't installed: pip install wandb" in found


def test_one_device_for_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "one device, but the job has 2 processes" in refused(ONE, tmp_path / "run")


def ramp(config, first, full, **changes):
    schedule = dataclasses.replace(config.schedule, steps=60, initial_batch_size=first, batch_size=full, ramp_until=0.9)
    return dataclasses.replace(config, schedule=schedule, **changes)


def test_each_batch_of_a_ramp(tmp_path):
    stages = small_config("stage=2", "pp_ep_dp", num_hidden_layers=3)
    found = refused(ramp(stages, 8, 16, microbatches=4), tmp_path / "run")
    assert "from step 10 on" in found
    assert "a batch of 9 sequences can't be cut into 4 microbatches" in found


@pytest.mark.parametrize(
    ("sizes", "microbatches", "unit", "cut"),
    [
        ([3072, 4608, 15360], 1, 1, (5, 15360)),  # the report's
        ([16, 22, 64], 1, 4, (4, 64)),
        ([16, 22, 64], 8, 1, (8, 64)),
        ([8, 9, 16], 1, 2, (2, 16)),
        ([15, 61], 1, 1, (5, 65)),
        ([2, 64], 1, 16, (4, 64)),
    ],
)
def test_microbatches_of_a_ramp(sizes, microbatches, unit, cut):
    assert setup.cut_largest(sizes, microbatches, unit) == cut


@pytest.mark.parametrize(
    ("sequences", "least", "unit", "pieces"), [(16, 4, 1, 4), (15, 4, 1, 5), (12, 4, 2, 6), (8, 3, 8, 1), (7, 2, 1, 7)]
)
def test_microbatches_of_a_validation(sequences, least, unit, pieces):
    assert setup.cut_evenly(sequences, least, unit) == pieces


@pytest.mark.slow
def test_a_ramp_compiles_one_step():
    """Batch sizes that neither two devices nor microbatches divide."""
    config = ramp(TWO, 3, 8)
    made = setup.Setup(config, load_tokenizer(config.data.tokenizer))
    state = made.init(jax.random.key(0))
    sizes = [stage.batch_size for stage in made.schedule.ramp]
    assert sizes[:3] == [3, 4, 4]
    assert sizes[-1] == 8
    for step in (stage.start_step for stage in made.schedule.ramp):
        state, metrics = made.train_step(state, *made.batch(step))
        assert np.isfinite(float(metrics["loss"]))
    assert made.train_step.jitted._cache_size() == 1


def test_validation_over_more_devices_than_it_has_sequences(tmp_path, texts):
    # A single document, of one sequence.
    data = DataConfig(source=texts, sequence_length=24, validation_fraction=1e-9)
    found = refused(dataclasses.replace(TWO, data=data), tmp_path / "run")
    assert "has 1 sequences, too few for the 2 parts" in found


def test_a_prompt_without_room(tmp_path):
    model = dataclasses.replace(ONE.model, max_position_embeddings=16)
    config = dataclasses.replace(ONE, model=model, sample_prompt="x" * 15, sample_tokens=3)
    assert "sample_prompt has 16 tokens, which leaves no room of the 16" in refused(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("mesh", "sharding", "axis"),
    [("expert=2", "fsdp", "expert"), ("stage=2", "fsdp_ep", "stage"), ("fsdp=2", "ep_tp", "fsdp")],
)
def test_mesh_axes_that_cut_nothing(tmp_path, mesh, sharding, axis):
    config = small_config(mesh, sharding)
    assert f"mesh.{axis} is 2, but runtime.sharding {sharding!r} cuts nothing" in refused(config, tmp_path / "run")
    with pytest.raises(ConfigError):
        Placement(MeshShape.parse(mesh), config.runtime, {})


def test_experts_over_devices_of_a_model_that_has_none(tmp_path):
    config = small_config("expert=2", "ep_tp", first_k_dense_replace=2, num_nextn_predict_layers=0)
    assert "mesh.expert is 2, but nothing of this model is cut over it" in refused(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            ScheduleConfig,
            {"peak_learning_rate": [-1e-3, 0, np.nan, np.inf], "steps": [0, 2**31], "ramp_until": [-1, 2]},
        ),
        (ScheduleConfig, dict.fromkeys(("end_learning_rate", "tail_learning_rate", "warmup_steps"), (-1, np.nan))),
        (ScheduleConfig, dict.fromkeys(("mtp_weight", "final_mtp_weight", "bias_update_speed"), (-1, np.nan))),
        (OptimizerConfig, {"b1": [-0.1, 1, np.nan], "b2": [1.5], "eps": [0, -1, np.nan]}),
        (OptimizerConfig, {"weight_decay": [-1, np.nan, np.inf], "clip_norm": [-1, np.nan, np.inf]}),
        (lambda **o: dataclasses.replace(ONE, **o), {"seed": [-1, 2**32], "microbatches": [0], "sample_tokens": [-1]}),
        (Processes, {"coordinator": ["nonsense", ":80", "host:", "host:99999", "host:x"]}),
    ],
)
def test_nonsense_options_are_named(kind, options):
    for name, values in options.items():
        for value in values:
            more = {"count": 2, "index": 0} if kind is Processes else {}
            with pytest.raises(ConfigError, match=f"{name} is "):
                kind(**{name: value}, **more)


def test_sequences_shorter_than_mtp_looks_ahead():
    model = dataclasses.replace(ONE.model, num_nextn_predict_layers=3)
    with pytest.raises(ConfigError, match=r"sequence_length is 3: it must be above model.num_nextn_predict_layers"):
        dataclasses.replace(ONE, model=model, data=DataConfig(sequence_length=3))


def test_clip_norm_0_is_off():
    schedule, params = Schedule(ONE.schedule), {"w": jnp.ones(3)}
    grads, updates = {"w": jnp.array([1e3, -2e3, 5.0])}, []
    for clip_norm in (0.0, 1e9, 1.0):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm, eps=1.0), schedule)
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0]["w"])
    np.testing.assert_array_equal(updates[0], updates[1])
    assert np.any(updates[0] != updates[2])


def test_a_diverged_state_is_not_saved_and_resume_finds_the_last_finite_one(tmp_path, monkeypatch):
    """From step 5 on the parameters are NaN; metrics are looked at too rarely to see it."""
    config = small_config("", "single", first_k_dense_replace=0, num_hidden_layers=1, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, log_every=1000, validate_every=1000, keep_checkpoints=1)
    directory, original = tmp_path / "run", setup.make_train_step

    def poisoned(*arguments, **options):
        step = original(*arguments, **options)

        def poison(state, batch):
            new, metrics = step(state, batch)
            factor = jnp.where(new.step == 5, jnp.nan, 1.0)
            return new.replace(params=jax.tree.map(lambda x: x * factor, new.params)), metrics

        return poison

    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_train_step", poisoned)
        with pytest.raises(trainer.TrainingError, match=r"at step 6, which is not saved; .* of step 4"):
            trainer.train(config, directory, console=Console(quiet=True))
    saved = lambda: sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
    assert saved() == [4]

    # A checkpoint that isn't finite, as an earlier version would have left it.
    run = setup.Setup(config, trainer.load_tokenizer(None))
    state = run.init(jax.random.key(0))
    checkpoints = Checkpoints(directory / "checkpoints", 5)
    state, position, _ = checkpoints.restore(state)
    spoiled = state.replace(step=state.step + 2, opt_state=jax.tree.map(lambda x: x * jnp.nan, state.opt_state))
    checkpoints.save(spoiled, position)
    checkpoints.close()
    assert saved() == [4, 6]

    said = io.StringIO()
    trainer.train(config, directory, resume=True, console=Console(file=said, width=1000))
    assert ": opt_state/" in said.getvalue()
    assert "going on from the checkpoint of step 4" in said.getvalue()
    assert saved() == [8]
    assert [p.name.split("-")[0] for p in (directory / "checkpoints_set_aside").iterdir()] == ["6"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_pretrained(directory)[1]))


def test_metrics_survive_lines_that_are_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n5\n{"loss": 3}\n' + "[" * 100_000 + '\n{"step": 2}\n{"step": ')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("state", [{}, [], None, {"taken": "4", "fingerprint": "x"}, {"taken": [-1]}])
def test_a_damaged_position_in_the_data_is_named(state):
    data = setup.train_iterator(ONE.data, trainer.load_tokenizer(None), 2)
    if isinstance(state, dict) and state.get("taken") == [-1]:
        state = data.get_state() | state
    with pytest.raises(ConfigError, match="the data's position"):
        data.set_state(json.loads(json.dumps(state)))
