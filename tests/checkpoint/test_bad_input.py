"""Errors of a checkpoint: one clear line, and nothing is written."""

import errno
import json
import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import load_pretrained
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.files import DTYPES, read_header
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from tests.configs import SMALL_CHECKPOINT as TINY

INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
SCALE = O_PROJ + "_scale_inv"


@pytest.fixture
def source(tmp_path):
    write_random_checkpoint(tmp_path / "source", TINY, block=(16, 16), file_bytes=15_000)
    return tmp_path / "source"


def file_of(source, name):
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.int8): "I8"}


def load_file(file):
    """As safetensors' own function, which knows no FP8 in NumPy."""
    data, infos = file.read_bytes(), read_header(file).values()
    return {i.name: np.frombuffer(data[i.start : i.stop], DTYPES[i.dtype]).reshape(i.shape) for i in infos}


def save_file(tensors, file):
    header, offset = {}, 0
    for name, array in tensors.items():
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": offsets}
        offset += array.nbytes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


def edit_tensors(source, name, change):
    """Rewrites the file of a tensor with `change(tensors)` applied, and lists what it holds in the index."""
    file = file_of(source, name)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    edit_json(source / INDEX, lambda index: relist(index["weight_map"], file.name, tensors))


def relist(listed, file, tensors):
    for name in [n for n, f in listed.items() if f == file and n not in tensors]:
        del listed[name]
    listed.update(dict.fromkeys(tensors, file))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop(name):
    return lambda source: edit_tensors(source, name, lambda t: t.pop(name))


def put(name, value, beside=None):
    return lambda source: edit_tensors(source, beside or name, lambda t: t.update({name: value(t.get(name))}))


def truncate(source):
    file = file_of(source, O_PROJ)
    os.truncate(file, file.stat().st_size - 7)


def nan(scales):
    scales = scales.copy()
    scales[0, 1] = np.nan
    return scales


def name_twice(source):
    text = (source / INDEX).read_text()
    first = text.index('{"model.') + 1
    entry = text[first : text.index(",", first)]
    (source / INDEX).write_text(text[:first] + entry + ", " + text[first:])


def in_two_files(source):
    tensors = load_file(file_of(source, O_PROJ))
    other = next(f for f in sorted(source.glob("*.safetensors")) if f != file_of(source, O_PROJ))
    save_file(load_file(other) | {O_PROJ: tensors[O_PROJ]}, other)


def set_config(**fields):
    return lambda source: edit_json(source / "config.json", lambda c: c.update(fields))


def unset_config(name):
    return lambda source: edit_json(source / "config.json", lambda c: c.pop(name))


def misplace(source):
    other = file_of(source, "lm_head.weight").name
    edit_json(source / INDEX, lambda i: i["weight_map"].update({O_PROJ: other}))


MTP_HEAD = "model.layers.2.shared_head.head.weight"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"

CASES = {
    "missing scale": (drop(SCALE), ValueError, f"{SCALE} is missing: .* needs its scales"),
    "missing tensor": (drop(O_PROJ), ValueError, f"{O_PROJ} is missing"),
    "missing shard": (lambda s: file_of(s, O_PROJ).unlink(), FileNotFoundError, r"model-\d+-of-\d+.safetensors"),
    "missing MTP norm": (
        drop("model.layers.2.shared_head.norm.weight"),
        ValueError,
        r"model.layers.2.shared_head.norm.weight is missing",
    ),
    "truncated file": (truncate, ValueError, r"model-\d+-of-\d+.safetensors is truncated"),
    "empty file": (lambda s: file_of(s, O_PROJ).write_bytes(b""), ValueError, "is truncated or no safetensors file"),
    "no safetensors": (
        lambda s: file_of(s, O_PROJ).write_bytes(b"\xff" * 5000),
        ValueError,
        "is truncated or no safetensors file",
    ),
    "wrong shape": (put(O_PROJ, lambda w: w[:-1]), ValueError, rf"{O_PROJ} .*has shape \(23, 64\): .*\(24, 64\)"),
    "wrong scale shape": (put(SCALE, lambda s: s[:1]), ValueError, rf"{SCALE} .*\(1, 4\): .*\(2, 4\)"),
    "scale of a wrong dtype": (put(SCALE, lambda s: s.astype(np.float16)), ValueError, f"{SCALE} .* dtype F16"),
    "NaN scale": (put(SCALE, nan), ValueError, rf"{SCALE} in .* is nan at \(0, 1\)"),
    "infinite scale": (put(SCALE, lambda s: s * np.float32(np.inf)), ValueError, f"{SCALE} in .* is inf"),
    "unknown tensor": (
        put("model.layers.1.mlp.extra.weight", lambda _: np.ones(3, np.float32), beside=O_PROJ),
        ValueError,
        "model.layers.1.mlp.extra.weight in .* is unknown",
    ),
    "one layer more": (
        put("model.layers.7.input_layernorm.weight", lambda _: np.ones(24, np.float32), beside=O_PROJ),
        ValueError,
        "model.layers.7.input_layernorm.weight in .* is unknown",
    ),
    "wrong dtype": (put(O_PROJ, lambda w: w.view(np.int8)), ValueError, f"{O_PROJ} .* has dtype I8"),
    "FP8 norm": (
        put("model.norm.weight", lambda w: w.astype(ml_dtypes.float8_e4m3fn)),
        ValueError,
        "model.norm.weight .* has dtype F8_E4M3",
    ),
    "index names a tensor twice": (name_twice, ValueError, f"{INDEX} names 'model.* twice"),
    "a tensor in two files": (in_two_files, ValueError, f"{O_PROJ} is (both )?in"),
    "index names a wrong file": (misplace, ValueError, O_PROJ),
    "index names an absent file": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({O_PROJ: "gone.safetensors"})),
        FileNotFoundError,
        "gone.safetensors",
    ),
    "index names a path": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({O_PROJ: "../x.safetensors"})),
        ValueError,
        "must be the name of a file beside it",
    ),
    "index names a folder": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({O_PROJ: ".."})),
        ValueError,
        "must be the name of a file beside it",
    ),
    "index is a folder": (lambda s: ((s / INDEX).unlink(), (s / INDEX).mkdir()), ValueError, "is a directory"),
    "index names numbers": (
        lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({O_PROJ: 3})),
        ValueError,
        "index.json: weight_map is .*: it must be an object, each value a string",
    ),
    "index isn't JSON": (lambda s: (s / INDEX).write_text("{"), ValueError, "isn't valid JSON"),
    "no index": (lambda s: (s / INDEX).unlink(), FileNotFoundError, "holds no safetensors checkpoint"),
    "no config": (lambda s: (s / "config.json").unlink(), FileNotFoundError, "config.json"),
    "config contradicts shapes": (
        set_config(intermediate_size=24),
        ValueError,
        r"mlp.*has shape .* the config makes it",
    ),
    "config has more experts": (
        set_config(n_routed_experts=16),
        ValueError,
        r"experts.8.* is missing|gate.* has shape",
    ),
    "config has an unknown field": (set_config(sliding_window=3), ValueError, "sliding_window"),
    "FP8 without block size": (unset_config("quantization_config"), ValueError, "no quantization_config"),
    "other quantisation": (set_config(quantization_config={"quant_method": "awq"}), ValueError, "'awq'"),
    "bad block size": (
        set_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128]}),
        ValueError,
        r"weight_block_size is \[128\]",
    ),
    "block size that scales contradict": (
        set_config(quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]}),
        ValueError,
        r"has shape .* matrix in \(8, 8\) blocks has",
    ),
    "MTP head isn't the model's": (
        put(MTP_HEAD, lambda w: w + w),
        ValueError,
        f"{MTP_HEAD} differs from lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_source(case, source, tmp_path):
    spoil, error, message = CASES[case]
    spoil(source)
    for attempt in (
        lambda: convert_command(ConvertArgs(str(source), tmp_path / "target")),
        lambda: load_pretrained(source),
    ):
        with pytest.raises(error, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_no_such_source(tmp_path):
    for attempt in (
        lambda: convert_command(ConvertArgs(str(tmp_path / "gone"), tmp_path / "target")),
        lambda: load_pretrained(tmp_path / "gone"),
    ):
        with pytest.raises(FileNotFoundError, match="gone"):
            attempt()


def test_destination_exists(source, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="target exists already"):
        convert_command(ConvertArgs(str(source), target))
    assert [p.name for p in target.iterdir()] == ["precious"]


def test_no_room_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"needs about .* GB more") as caught:
        convert_command(ConvertArgs(str(source), tmp_path / "target"))
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB, where the machine lets us have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("way", ["import", "export"])
def test_disk_that_fills_up_on_the_way(way, source, small_disk, tmp_path, monkeypatch):
    """The room was there when it began; what is done stays, and DST doesn't appear."""
    if way == "export":
        convert_command(ConvertArgs(str(source), tmp_path / "store"))
        source = tmp_path / "store"
    (small_disk / "filler").write_bytes(b"x" * 200_000)
    monkeypatch.setattr("dsv3_jax.checkpoint.jobs._check_room", lambda *_: None)
    with pytest.raises(OSError, match=r"is full: what is done stays in .* run the same command to continue") as caught:
        convert_command(ConvertArgs(str(source), small_disk / "target"))
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "target.incomplete"]


def test_damaged_store(source, tmp_path):
    convert_command(ConvertArgs(str(source), tmp_path / "store"))
    shard = next((tmp_path / "store" / "params.lm_head").rglob("c/*/*"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"params.lm_head/c/0/0 isn't what manifest.json says"):
        convert_command(ConvertArgs(str(tmp_path / "store"), tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_store_with_a_part_missing(source, tmp_path):
    convert_command(ConvertArgs(str(source), tmp_path / "store"))
    (tmp_path / "store" / "params.norm" / "zarr.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"params.norm/zarr.json is missing"):
        load_pretrained(tmp_path / "store")
    with pytest.raises(ValueError, match=r"params.norm can't be read"):
        load_pretrained(tmp_path / "store", check_hashes=False)


def test_verify_finds_a_wrong_copy(source, tmp_path, monkeypatch):
    original = HFCheckpoint.read

    def damaged(self, leaf, region, dtype=None):
        data = original(self, leaf, region, dtype)
        return -data if leaf.path[1:] == ("dense_layers", "self_attn", "o_proj") else data

    monkeypatch.setattr(HFCheckpoint, "read", damaged)
    with pytest.raises(ValueError, match=r"o_proj.weight differs after the conversion"):
        convert_command(ConvertArgs(str(source), tmp_path / "target", verify=True))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"layers": "9"}, "layers '9' names '9': the checkpoint has layers 0 to 2"),
        ({"layers": "0-99999999999"}, "names '0-99999999999'"),
        ({"layers": "0," + "9" * 5000}, "the checkpoint has layers 0 to 2"),
        ({"layers": "2-1"}, "names '2-1'"),
        ({"layers": "\N{SUPERSCRIPT TWO}"}, "it must be numbers and ranges"),
        ({"dst": None}, "no destination"),
    ],
)
def test_bad_options(options, message, source, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_command(ConvertArgs(str(source), **({"dst": tmp_path / "target"} | options)))
    assert Path.exists(source)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
