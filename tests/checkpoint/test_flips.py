"""Flipped bits and lost files of converted checkpoints and of runs: whatever changes a value is noticed."""

import collections
import dataclasses
import functools
import itertools
import random
import shutil

import jax
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.store import Store
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.config import ConfigError
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import write_config
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import init_state
from tests.configs import SMALL_CHECKPOINT

TINY = dataclasses.replace(SMALL_CHECKPOINT, max_position_embeddings=256)


def write_store(folder, dtype):
    write_random_checkpoint(folder / "hf", TINY, block=(16, 16))
    (folder / "hf/tokenizer.json").write_text('{"model": {}}')
    convert_command(ConvertArgs(str(folder / "hf"), folder / "store", dtype=dtype))
    return folder / "store"


def read_store(directory):
    store = Store(directory)
    yield store.config, (directory / "tokenizer.json").read_bytes()
    for leaf in store.leaves.values():
        yield store.read(leaf, tuple(slice(0, n) for n in leaf.shape), np.dtype(np.float32))
    for name in itertools.chain.from_iterable(leaf.names for leaf in store.leaves.values() if not leaf.start):
        yield store.file_dtype(name)
        if store.is_fp8(name):
            yield store.scales(name)


def train_config():
    return dataclasses.replace(TrainConfig.preset("tiny", "cpu"), model=TINY)


@functools.cache
def fresh_state():
    config = train_config()
    optimizer = make_optimizer(config.optimizer, Schedule(config.schedule))
    return jax.jit(lambda key: init_state(DeepSeekV3(TINY), optimizer, key))(jax.random.key(5))


def write_run(folder, _):
    run = folder / "run"
    run.mkdir()
    write_config(run, train_config(), None)
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    # Not all zeros: zeros are what a lost part reads as.
    state = jax.tree.map(lambda x: x if x.dtype not in (np.float32,) else x + 0.5, fresh_state())
    checkpoints.save(dataclasses.replace(state, step=state.step + 3), {"taken": 12, "epoch": [1, 2]})
    checkpoints.wait()
    checkpoints.close()
    return run


def read_run(directory):
    """As `--resume` and `generate` read it."""
    yield TrainConfig.from_json(directory / "config.json")
    checkpoints = Checkpoints(directory / "checkpoints", keep=1)
    state, data, _ = checkpoints.restore(fresh_state())
    checkpoints.close()
    yield data
    yield from map(np.asarray, jax.tree.leaves(dataclasses.replace(state, rng=jax.random.key_data(state.rng))))
    model, variables = load_pretrained(directory)
    yield model.config
    yield from map(np.asarray, jax.tree.leaves(variables))


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


def attempt(read, directory, expected):
    """Whether what is wrong was noticed in one line, or changed no value; anything else fails."""
    try:
        found = list(read(directory))
    except (CheckpointError, ConfigError, FileNotFoundError) as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "noticed"
    return "same values" if all(map(same, expected, found)) and len(found) == len(expected) else "SILENT"


def flip(read, directory, count, seed):
    """Flips one bit at a time, half of them in a file drawn by its size, and counts what happened."""
    expected, rng = list(read(directory)), random.Random(seed)
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.stat().st_size)
    counts, wrong = collections.Counter(), []
    for i in range(count):
        file = rng.choices(files, [f.stat().st_size for f in files])[0] if i % 2 else rng.choice(files)
        good = file.read_bytes()
        place, bit = rng.randrange(len(good)), rng.randrange(8)
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        file.write_bytes(bad)
        what = attempt(read, directory, expected)
        counts[what] += 1
        if what == "SILENT":
            wrong.append(f"{file.relative_to(directory)} byte {place} bit {bit}")
        file.write_bytes(good)
    print(f"seed {seed}, {count} flips in {len(files)} files of {directory.name}: {dict(counts)}")
    assert not wrong
    assert attempt(read, directory, expected) == "same values"
    return counts


KINDS = {
    "fp8 store": (write_store, read_store, "keep"),
    "bf16 store": (write_store, read_store, "bf16"),
    "run": (write_run, read_run, None),
}


@pytest.fixture(scope="module", params=KINDS)
def kept(request, tmp_path_factory):
    write, read, dtype = KINDS[request.param]
    return write(tmp_path_factory.mktemp("kept"), dtype), read


def test_flipped_bits(kept):
    directory, read = kept
    assert flip(read, directory, 12, seed=1)["noticed"] > 6


@pytest.mark.slow
def test_many_flipped_bits(kept):
    directory, read = kept
    flip(read, directory, 200, seed=2)


def test_lost_and_swapped_files(kept, tmp_path):
    """Only orbax's marks of a finished write, and the hashes themselves, may be missing: no value comes from them."""
    directory, read = kept
    expected = list(read(directory))
    files = [f.relative_to(directory) for f in sorted(directory.rglob("*")) if f.is_file()]
    whole = 0
    for name in files if len(files) < 40 else files[:: len(files) // 20]:
        aside = (directory / name).rename(tmp_path / "aside")
        what = attempt(read, directory, expected)
        unneeded = name.name in ("hashes.json", "_CHECKPOINT_METADATA", "commit_success.txt")
        assert what == "noticed" or (what == "same values" and unneeded), name
        aside.rename(directory / name)
        whole += what == "noticed"
    assert whole > 4
    arrays = [f for f in files if "c" in f.parts or f.parent.name == "d"]
    sizes = collections.defaultdict(list)
    for name in arrays:
        sizes[(directory / name).stat().st_size].append(name)
    for a, b, *_ in (names for names in sizes.values() if len(names) > 1):
        if (directory / a).read_bytes() == (directory / b).read_bytes():
            continue
        shutil.copyfile(directory / a, tmp_path / "a")
        shutil.copyfile(directory / b, directory / a)
        assert attempt(read, directory, expected) == "noticed", (a, b)
        shutil.copyfile(tmp_path / "a", directory / a)
        break
