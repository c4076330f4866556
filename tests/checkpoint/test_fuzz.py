"""Descriptions that others wrote, with anything in them: they are read or refused in one line, in little memory.

Headers of safetensors files are in test_headers.py. Here: the index, a converted checkpoint's manifest, config.json and
arrays' metadata, and what describes a run's checkpoint. `python -m tests.fuzz` runs these checks at length.
"""

import contextlib
import dataclasses
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dsv3_jax import ModelConfig
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.files import INDEX, CheckpointError, TensorFiles
from dsv3_jax.checkpoint.hashes import FileHashes, file_hashes
from dsv3_jax.checkpoint.jobs import JOURNAL, open_workspace
from dsv3_jax.checkpoint.store import MANIFEST, Store
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.config import ConfigError
from dsv3_jax.integrity import seal, unseal
from dsv3_jax.json_input import read_json

TINY = dataclasses.replace(
    ModelConfig.preset("tiny"),
    vocab_size=16,
    hidden_size=8,
    intermediate_size=8,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    num_nextn_predict_layers=0,
)

odd = st.one_of(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(
        [2**31, 2**63, 10**30, -1, 0, "0", "false", "../x", "a/b", "", "..", ".", "\0", "x" * 300, "F8_E4M3", "BF16"]
    ),
)


def places(value, found=()):
    """The path of every value in a JSON value."""
    yield found
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*found, key))


@st.composite
def changes(draw):
    """Up to three changes to a JSON value: of values, of names, of bytes of its text."""
    picks = draw(
        st.lists(
            st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "drop", "rename"]), odd), max_size=3
        )
    )
    raw = draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=2))

    def apply(value):
        for where, how, new in picks:
            paths = list(places(value))[1:]
            if not paths:
                break
            *parents, last = paths[int(where * len(paths))]
            inside = value
            for key in parents:
                inside = inside[key]
            if how == "set":
                inside[last] = json.loads(json.dumps(new))
            elif isinstance(inside, dict):
                kept = inside.pop(last)
                if how == "rename":
                    inside[new if isinstance(new, str) else str(new)] = kept
        return value

    def spoil(text):
        spoilt = bytearray(text)
        for where, byte in raw:
            spoilt[int(where * len(spoilt))] = byte
        return bytes(spoilt)

    return apply, spoil


def one_line_or_none(read, more=0):
    """Runs `read`, which may refuse what it reads in one line of moderate length; anything else fails.

    more: bytes of memory that it may take besides 500 MB.
    """
    before = resident_memory(reset_peak=True)
    try:
        read()
    except (CheckpointError, ConfigError, FileNotFoundError) as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 1500  # noqa: PT017
    assert resident_memory() < before + 5e8 + more


def resident_memory(reset_peak=False) -> int:
    """The peak of this process's resident memory since it was last reset, in bytes.

    The peak that `getrusage` gives can't be reset: it would be that of the tests before.
    """
    if reset_peak:
        with contextlib.suppress(OSError):  # kernels without it: the peak is that since the start
            pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_converted(tmp_path_factory.mktemp("fuzz"))


def make_converted(folder):
    write_random_checkpoint(folder / "hf", TINY, block=(4, 4), file_bytes=1500)
    convert_command(ConvertArgs(str(folder / "hf"), folder / "store"))
    return folder


def check_index(folder, change):
    file = folder / "hf" / INDEX
    good = file.read_bytes()
    apply, spoil = change
    try:
        file.write_bytes(spoil(json.dumps(apply(json.loads(good))).encode()))
        one_line_or_none(lambda: TensorFiles(folder / "hf"))
    finally:
        file.write_bytes(good)


def read_all(store):
    for leaf in store.leaves.values():
        store.read(leaf, tuple(slice(0, n) for n in leaf.shape), np.dtype(np.float32))
    for name in store.manifest["tensors"]:
        if not name.endswith("_scale_inv") and name in store._by_name:
            store.file_dtype(name)


def check_manifest(folder, change, sealed):
    """With its seal made anew, as somebody may who writes such files; or of the format that had none."""
    file = folder / "store" / MANIFEST
    good = file.read_bytes()
    apply, spoil = change
    try:
        fields = unseal(json.loads(good), file, CheckpointError)
        if not sealed:
            fields["format"] = "dsv3_jax checkpoint 1"
        fields = apply(fields)
        file.write_bytes(spoil(json.dumps(seal(fields) if sealed else fields).encode()))
        one_line_or_none(lambda: read_all(Store(folder / "store")))
    finally:
        file.write_bytes(good)


def check_array(folder, change, name):
    file = folder / "store" / name / "zarr.json"
    good = file.read_bytes()
    apply, spoil = change
    try:
        file.write_bytes(spoil(json.dumps(apply(json.loads(good))).encode()))
        one_line_or_none(lambda: read_all(Store(folder / "store", check_hashes=False)))
    finally:
        file.write_bytes(good)


def check_hashes(folder, change):
    file = folder / "hashes.json"
    apply, spoil = change
    fields = apply(seal({"hash": "xxh3_128", "files": {"a": [1, "00"], "d/b": [2, "11"]}}))
    file.write_bytes(spoil(json.dumps(fields).encode()))

    def read():
        hashes = file_hashes(folder, unseal(read_json(file, CheckpointError), file, CheckpointError), "hashes.json")
        assert isinstance(hashes, FileHashes)
        hashes.check(hashes.expected)

    one_line_or_none(read)


def check_journal(folder, change):
    work = folder / "work.incomplete"
    work.mkdir(exist_ok=True)
    apply, spoil = change
    with open_workspace(folder / "work", "identity", 0) as workspace:
        workspace.note("a", {"files": {"b": [3, "00"]}})
    first, *lines = (work / JOURNAL).read_text().splitlines()
    lines = [spoil(json.dumps(apply(json.loads(line))).encode()) for line in lines if line]
    (work / JOURNAL).write_bytes(b"\n".join([first.encode(), *lines]))

    def read():
        with open_workspace(folder / "work", "identity", 0) as workspace:
            assert all(isinstance(key, str) for key in workspace.done)

    one_line_or_none(read)
    (work / JOURNAL).unlink()


CHECKS = {
    "index": check_index,
    "manifest": lambda folder, change: check_manifest(folder, change, True),
    "manifest without a seal": lambda folder, change: check_manifest(folder, change, False),
    "array": lambda folder, change: check_array(folder, change, "params.moe_layers.mlp.experts.up_proj"),
    "scales": lambda folder, change: check_array(folder, change, "scales.moe_layers.mlp.experts.up_proj"),
    "hashes": check_hashes,
    "journal": check_journal,
}


@pytest.mark.parametrize("what", CHECKS)
@hypothesis.settings(max_examples=60)
@hypothesis.given(change=changes())
def test_anything(what, folder, change):
    CHECKS[what](folder, change)
