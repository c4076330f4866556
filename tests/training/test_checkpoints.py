"""Checkpoints of a small state: which stay, which are taken, and what is said of damaged ones."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.runs import VERSION, VersionError, step_hashes
from dsv3_jax.integrity import hash_file, seal
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.step import TrainState
from tests.conftest import new_rng


def state_of(step):
    values = jnp.asarray(np.random.default_rng(step).normal(size=(64, 8)), jnp.float32)
    return TrainState(jnp.int32(step), {"w": values}, {"b": values[0]}, (values + 1,), jax.random.key(step))


def save(checkpoints, step, **options):
    checkpoints.save(state_of(step), {"next_sequence": step}, {"skipped": step}, **options)
    checkpoints.wait()


def same(restored, step):
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(step)), strict=True):
        np.testing.assert_array_equal(*map(_raw, (a, b)))
    assert restored.data == {"next_sequence": step}
    assert restored.run["skipped"] == step


def _raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def test_the_newest_every_mth_and_the_last_good_one_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=30)
    for step in (10, 20, 30):
        save(checkpoints, step)
    for step in (40, 50, 60, 70, 80):  # as in a spike
        save(checkpoints, step, good=step == 40)
    assert checkpoints.steps() == [30, 40, 60, 70, 80]
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)  # another process knows which one was good
    save(checkpoints, 90, good=False)
    assert checkpoints.steps() == [40, 80, 90]
    save(checkpoints, 100)
    assert checkpoints.steps() == [90, 100]
    checkpoints.close()


def test_the_last_good_one_stays_after_a_newer_good_one_was_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    save(checkpoints, 10)
    save(checkpoints, 20, good=False)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    save(checkpoints, 30)
    next((tmp_path / "checkpoints/30/state").rglob("d/*")).write_bytes(b"damaged")
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    _, passed_over = checkpoints.restore_newest(state_of(0))
    for step in passed_over:
        checkpoints.set_aside(step)
    assert checkpoints.good == 10
    for step in (30, 40):  # as in a spike
        save(checkpoints, step, good=False)
    assert checkpoints.steps() == [10, 40]
    same(checkpoints.restore(state_of(0), checkpoints.good), 10)
    checkpoints.close()


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    """One flipped bit in each file in turn: noticed, or without effect; then the one before it is taken."""
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    rng, noticed = random.Random(int(new_rng().integers(2**32))), set()
    files = [f for f in sorted((directory / "2").rglob("*")) if f.is_file() and f.stat().st_size]
    for file in files:
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        restored, passed_over = checkpoints.restore_newest(state_of(0))
        same(restored, 1 if passed_over else 2)
        noticed |= {file.name} if passed_over else set()
        assert all("\n" not in why for why in passed_over.values())
        file.write_bytes(good)
    assert {file.name for file in files} - noticed <= {"_CHECKPOINT_METADATA"}
    same(checkpoints.restore_newest(state_of(0))[0], 2)
    (directory / "2/hashes.json").unlink()
    restored, passed_over = checkpoints.restore_newest(state_of(0))
    same(restored, 1)
    assert "hashes.json is missing" in passed_over[2]
    for file in (directory / "1").rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint that is whole and finite"):
        checkpoints.restore_newest(state_of(0))
    checkpoints.close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"item_handlers": 7}', b'{"commit_timestamp_nsecs": [1]}', b'{"metrics": "x"}']
)
def test_orbax_metadata_that_is_damaged_is_done_without(content, tmp_path):
    """No hash covers it, and orbax reads it before anything is restored."""
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep=2)
    save(checkpoints, 1)
    checkpoints.close()
    (directory / "1/_CHECKPOINT_METADATA").write_bytes(content)
    checkpoints = Checkpoints(directory, keep=2)
    same(checkpoints.restore_newest(state_of(0))[0], 1)
    save(checkpoints, 2)
    checkpoints.close()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "state/../../../secret", "", "a\0b"])
def test_a_checkpoint_names_no_file_outside_of_it(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    step = tmp_path / "1"
    step.mkdir()
    files = {name: hash_file(tmp_path / "secret")}
    (step / "hashes.json").write_text(json.dumps(seal({"version": VERSION, "hash": "xxh3_128", "files": files})))
    with pytest.raises(CheckpointError, match="it must be a file below"):
        step_hashes(step)


def test_formats_of_other_versions(tmp_path):
    directory = tmp_path / "checkpoints"
    checkpoints = Checkpoints(directory, keep=2)
    save(checkpoints, 1)
    save(checkpoints, 2)
    file = directory / "2/hashes.json"
    fields = json.loads(file.read_text())
    assert fields["version"] == VERSION
    file.write_text(json.dumps(fields | {"version": VERSION + 1}))
    with pytest.raises(VersionError, match=f"format {VERSION + 1}, this version of dsv3_jax reads formats up to"):
        checkpoints.restore_newest(state_of(0))
    shutil.rmtree(directory / "2/run")  # as format 1 was
    files = {name: hash for name, hash in fields["files"].items() if not name.startswith("run/")}
    file.write_text(json.dumps(seal({"hash": "xxh3_128", "files": files})))
    restored = checkpoints.restore(state_of(0))
    assert restored.run == {}
    assert int(restored.state.step) == 2
    checkpoints.close()
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.good == 2
    checkpoints.close()
