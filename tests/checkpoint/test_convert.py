"""Conversion there and back: bytes, dtypes, logits, resumption, sharded loading."""

import dataclasses
import filecmp
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from dsv3_jax import DeepSeekV3, ModelConfig
from dsv3_jax.checkpoint import hf_config, load_pretrained, names, synthetic
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.files import CheckpointError, TensorFiles
from dsv3_jax.checkpoint.hf import HFCheckpoint, converted_fields
from dsv3_jax.checkpoint.jobs import JOURNAL
from dsv3_jax.checkpoint.store import Store
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.quantization import dequantise_blocks
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.step import TrainState

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(p.parent.name for p in GOLDEN.glob("*/expected.npz"))
TINY = dataclasses.replace(
    ModelConfig.preset("tiny"),
    vocab_size=72,
    hidden_size=40,
    intermediate_size=56,
    moe_intermediate_size=24,
    num_hidden_layers=4,
    first_k_dense_replace=2,
    q_lora_rank=36,
    kv_lora_rank=20,
    n_routed_experts=8,
    max_position_embeddings=64,
)


def convert(source, target, **options):
    convert_command(ConvertArgs(str(source), target, **options))
    return target


def assert_same_tensors(a, b):
    """A language model inside another one (kimi_k25): without what that adds."""
    a, b = TensorFiles(a), TensorFiles(b)
    if any(name.startswith("language_model.") for name in a.tensors):
        a = HFCheckpoint(a.directory).files
    assert set(a.tensors) == set(b.tensors)
    for name, info in a.tensors.items():
        assert (info.dtype, info.shape) == (b.tensors[name].dtype, b.tensors[name].shape), name
        assert a.array(name).tobytes() == b.array(name).tobytes(), name


def assert_same_trees(a, b):
    """Every file of two directories, byte by byte."""
    listed = [sorted(str(f.relative_to(d)) for f in d.rglob("*") if f.is_file()) for d in (a, b)]
    assert listed[0] == listed[1]
    assert not [f for f in listed[0] if not filecmp.cmp(a / f, b / f, shallow=False)]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A small checkpoint in ragged FP8 blocks, its scales in other files than its weights."""
    directory = tmp_path_factory.mktemp("source") / "fp8"
    write_random_checkpoint(directory, TINY, block=(16, 16), scales_apart=True, file_bytes=20_000)
    (directory / "tokenizer.json").write_text("{}")
    return directory


# There and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_round_trip_of_what_transformers_wrote(case, tmp_path):
    store = convert(GOLDEN / case, tmp_path / "store", verify=True)
    back = convert(store, tmp_path / "back", verify=True)
    assert_same_tensors(GOLDEN / case, back)
    fields, given = (json.loads((d / "config.json").read_text()) for d in (back, GOLDEN / case))
    kept, source = ModelConfig.from_hf(fields), ModelConfig.from_hf(given)
    announced_only = case == "v3_class_defaults"  # MTP that config.json has and the files haven't
    assert kept == (dataclasses.replace(source, num_nextn_predict_layers=0) if announced_only else source)
    assert fields == hf_config.text_fields(given) | ({"num_nextn_predict_layers": 0} if announced_only else {})


@pytest.mark.parametrize("scale_dtype", ["F32", "F8_E8M0", "U8"])
def test_round_trip_of_fp8(scale_dtype, tmp_path):
    write_random_checkpoint(
        tmp_path / "source", TINY, block=(16, 16), scale_dtype=scale_dtype, scales_apart=True, file_bytes=20_000
    )
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 5
    back = convert(convert(tmp_path / "source", tmp_path / "store", verify=True), tmp_path / "back", verify=True)
    assert_same_tensors(tmp_path / "source", back)
    assert json.loads((back / "config.json").read_text()) == json.loads((tmp_path / "source/config.json").read_text())


def test_dry_run_of_the_way_back(fp8, tmp_path, capsys):
    store = convert(fp8, tmp_path / "store")
    convert_command(ConvertArgs(str(store), dry_run=True))
    files = TensorFiles(fp8)
    numbers = sum(math.prod(t.shape) for t in files.tensors.values())
    assert f"{len(files.tensors):,} tensors, {numbers:,} numbers" in capsys.readouterr().out


def test_small_files_travel_along(fp8, tmp_path):
    back = convert(convert(fp8, tmp_path / "store"), tmp_path / "back")
    assert (back / "tokenizer.json").read_text() == "{}"


TRUE_SHAPES = dataclasses.replace(
    ModelConfig.preset("v3-671b"), num_hidden_layers=2, first_k_dense_replace=1, moe_intermediate_size=4, vocab_size=512
)


@pytest.mark.slow
def test_round_trip_of_true_shapes(tmp_path):
    """One dense layer, one sparse layer and MTP as released, 256 experts; only experts' width and words are fewer."""
    write_random_checkpoint(tmp_path / "source", TRUE_SHAPES, scales_apart=True, file_bytes=200_000_000)
    back = convert(convert(tmp_path / "source", tmp_path / "store"), tmp_path / "back")
    assert_same_tensors(tmp_path / "source", back)


@pytest.mark.slow
def test_round_trip_of_true_widths(tmp_path):
    """The same with nothing scaled down: about 30 GB, held twice."""
    if shutil.disk_usage(tmp_path).free < 65e9:
        pytest.skip("needs 65 GB of disk")
    config = dataclasses.replace(ModelConfig.preset("v3-671b"), num_hidden_layers=2, first_k_dense_replace=1)
    write_random_checkpoint(tmp_path / "source", config, scales_apart=True, file_bytes=4_300_000_000)
    store = convert(tmp_path / "source", tmp_path / "store")
    digests = _digests(tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    back = convert(store, tmp_path / "back")
    shutil.rmtree(store)
    assert _digests(back) == digests
    shutil.rmtree(back)  # pytest would keep it


def _digests(directory):
    files = TensorFiles(directory)
    digests = {}
    for name, info in files.tensors.items():
        digests[name] = (info.dtype, info.shape, hashlib.sha1(files.array(name).reshape(-1).view(np.uint8)).hexdigest())
        files.release(name)
    return digests


# Other dtypes --------------------------------------------------------------------------------------------


def exact_weights(directory, block):
    """Numbers that the FP8 tensors of a directory stand for, by the definition, one element at a time."""
    files = TensorFiles(directory)
    weights = {}
    for name in files.tensors:
        if name.endswith(names.SCALE):
            continue
        weights[name] = files.array(name).astype(np.float32)
        if name + names.SCALE in files.tensors:
            scales = files.array(name + names.SCALE)
            rows, columns = np.indices(weights[name].shape)
            weights[name] = weights[name] * scales[rows // block[0], columns // block[1]]
    return weights


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_casts(fp8, dtype, tmp_path):
    expected = exact_weights(fp8, (16, 16))
    store = convert(fp8, tmp_path / "store", dtype=dtype, verify=True)
    back = TensorFiles(convert(store, tmp_path / "back", verify=True))
    assert set(back.tensors) == set(expected)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    for name, weight in expected.items():
        target = np.float32 if dtype == "float32" or "e_score" in name else ml_dtypes.bfloat16
        np.testing.assert_array_equal(back.array(name), weight.astype(target), err_msg=name)
    # The same cast on the way out of an untouched store.
    late = TensorFiles(convert(convert(fp8, tmp_path / "kept"), tmp_path / "late", dtype=dtype, verify=True))
    for name in expected:
        assert late.array(name).tobytes() == back.array(name).tobytes()


@pytest.mark.parametrize("given", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
def test_config_json_of_a_cast_says_its_dtype_under_each_name(given):
    fields = TINY.to_hf() | dict.fromkeys(given, "bfloat16")
    written = converted_fields(fields, TINY, "float32", None)
    assert {k: v for k, v in written.items() if "dtype" in k} == dict.fromkeys(given or ["torch_dtype"], "float32")


def test_a_kind_in_several_dtypes_is_cast(tmp_path, monkeypatch):
    """One expert isn't in FP8: a stack of them has one dtype only if all are cast to it."""
    odd, entries = "model.layers.2.mlp.experts.1.up_proj.weight", synthetic._entries

    def mixed(*arguments):
        kept = [entry for entry in entries(*arguments) if entry[0] != odd + names.SCALE]
        return [(name, "BF16" if name == odd else dtype, shape) for name, dtype, shape in kept]

    monkeypatch.setattr(synthetic, "_entries", mixed)
    write_random_checkpoint(tmp_path / "mixed", TINY, block=(16, 16))
    with pytest.raises(CheckpointError, match=rf"several dtypes .{odd} is BF16, .* is F8_E4M3.: cast them"):
        convert(tmp_path / "mixed", tmp_path / "kept")
    expected = exact_weights(tmp_path / "mixed", (16, 16))
    store = convert(tmp_path / "mixed", tmp_path / "store", dtype="float32", verify=True)
    back = TensorFiles(convert(store, tmp_path / "back"))
    assert set(back.tensors) == set(expected)
    for name, weight in expected.items():
        np.testing.assert_array_equal(back.array(name), weight, err_msg=name)


@pytest.mark.parametrize("other", ["BF16", "U8"])
def test_scales_of_a_kind_in_several_dtypes_are_cast(other, tmp_path, monkeypatch):
    """A stack of grids would be cast to one dtype: bytes that are exponents would become scales themselves."""
    odd, entries = "model.layers.2.mlp.experts.1.up_proj.weight" + names.SCALE, synthetic._entries

    def mixed(*arguments):
        return [(name, other if name == odd else dtype, shape) for name, dtype, shape in entries(*arguments)]

    monkeypatch.setattr(synthetic, "_entries", mixed)
    write_random_checkpoint(tmp_path / "mixed", TINY, block=(16, 16))
    for dtype in ("keep", "fp8"):
        with pytest.raises(CheckpointError, match=rf"several dtypes .*{odd} is {other}.*: cast them"):
            convert(tmp_path / "mixed", tmp_path / dtype, dtype=dtype)
    convert(tmp_path / "mixed", tmp_path / "cast", dtype="bf16", verify=True)


def test_nothing_passes_through_half_precision(tmp_path):
    """Numbers below float16's range survive (peers' converters flush them), and a large bias keeps its last bits."""
    write_random_checkpoint(tmp_path / "source", TINY, block=None)
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    bias, weight = "model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[bias] = (7.0 + np.arange(8) * 1e-6).astype(np.float32)
    tensors[weight] = np.full_like(tensors[weight], 2.0**-40)
    save_file(tensors, file)
    back = TensorFiles(convert(convert(tmp_path / "source", tmp_path / "s", dtype="bf16"), tmp_path / "back"))
    assert back.array(bias).tobytes() == tensors[bias].tobytes()
    assert (back.array(weight) == ml_dtypes.bfloat16(2.0**-40)).all()
    _, variables = load_pretrained(tmp_path / "s", dtype="bfloat16")
    loaded = variables["router"]["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"]
    assert loaded.dtype == jnp.float32
    np.testing.assert_array_equal(loaded[0], tensors[bias])


@pytest.mark.parametrize("late", [False, True])
def test_requantised_to_fp8(late, tmp_path):
    """From bfloat16 to FP8 blocks, on the way in or out: the released set of tensors, within e4m3's rounding."""
    write_random_checkpoint(tmp_path / "source", TINY, block=None)
    options = [{}, {"dtype": "fp8"}] if late else [{"dtype": "fp8"}, {}]
    store = convert(tmp_path / "source", tmp_path / "store", verify=True, **options[0])
    back = convert(store, tmp_path / "back", verify=True, **options[1])
    assert HFCheckpoint(back).block == (128, 128)
    old, new = TensorFiles(tmp_path / "source"), TensorFiles(back)
    for name in old.tensors:
        before = old.array(name).astype(np.float32)
        if "_proj" not in name or "eh_proj" in name:
            assert new.array(name).tobytes() == old.array(name).tobytes()
            continue
        after = dequantise_blocks(new.array(name), new.array(name + names.SCALE))
        scale = np.abs(before).max() / 448
        assert (np.abs(after - before) <= np.maximum(np.abs(before) * 2**-4, scale * 2**-10) * 1.001).all()


def test_fp8_blocks_are_described_where_config_json_said_null(tmp_path):
    write_random_checkpoint(tmp_path / "source", TINY, block=None)
    file = tmp_path / "source/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    store = convert(tmp_path / "source", tmp_path / "store", dtype="fp8")
    assert HFCheckpoint(convert(store, tmp_path / "back")).block == (128, 128)


def test_ragged_blocks_of_576_rows():
    """kv_a_proj_with_mqa: 576 rows in blocks of 128, never of 576 / 5."""
    values = np.full((576, 8), 1.0, np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = np.arange(5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(dequantise_blocks(values, scales)[:, 0], np.arange(576) // 128)


def test_without_mtp_and_with_some_layers(fp8, tmp_path):
    store = Store(convert(fp8, tmp_path / "store", mtp=False, layers="1-2", verify=True))
    config = store.config
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.num_nextn_predict_layers) == (2, 1, 0)
    back = TensorFiles(convert(tmp_path / "store", tmp_path / "back", verify=True))
    source = TensorFiles(fp8)
    for new, old in ((0, 1), (1, 2)):
        name = "model.layers.{}.self_attn.o_proj.weight"
        assert back.array(name.format(new)).tobytes() == source.array(name.format(old)).tobytes()
    assert names.layer_number(max(back.tensors, key=lambda n: names.layer_number(n) or 0)) == 1


# Logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["keep", "float32"])
@pytest.mark.parametrize("case", ["fp8_ragged", "fp8_small_blocks", "mtp_2", "v2_groups", "v3_full_q"])
def test_logits_after_conversion(case, dtype, tmp_path):
    model, variables = load_pretrained(convert(GOLDEN / case, tmp_path / "store", dtype=dtype))
    expected = np.load(GOLDEN / case / "expected.npz")
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    depth = model.config.num_nextn_predict_layers
    ahead = tuple(jnp.roll(tokens, -k - 1, axis=1) for k in range(depth))
    out = jax.jit(lambda v: model.apply(v, tokens, ahead, method=DeepSeekV3.forward))(variables)
    pairs = [(out.logits.array(), expected["logits"])]
    pairs += [(out.mtp_logits[k].array()[:, : -k - 1], expected[f"mtp_logits_{k}"]) for k in range(depth)]
    for actual, wanted in pairs:
        assert np.abs(np.asarray(actual) - wanted).max() <= 2e-5 * np.abs(wanted).max()


# Reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_orbax_restores_the_models_tree(fp8, dtype, tmp_path):
    store = convert(fp8, tmp_path / "store", dtype=dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(store)
    model, variables = load_pretrained(store)
    shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
    assert shapes({k: restored[k] for k in ("params", "router")}) == shapes(variables)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert shapes(variables) == shapes(abstract)
    if dtype == "float32":
        assert set(restored) == {"params", "router"}
        jax.tree.map(np.testing.assert_array_equal, restored, variables)
        return
    experts = restored["params"]["moe_layers"]["mlp"]["experts"]["up_proj"]  # (L, E, D, F)
    grids = restored["scales"]["moe_layers"]["mlp"]["experts"]["up_proj"]  # (L, E, blocks of F, blocks of D)
    assert experts.dtype == ml_dtypes.float8_e4m3fn
    exact = dequantise_blocks(np.asarray(experts[1, 5]).T, np.asarray(grids[1, 5]), (16, 16))
    np.testing.assert_array_equal(variables["params"]["moe_layers"]["mlp"]["experts"]["up_proj"][1, 5], exact.T)


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_each_device_reads_its_slice_only(fp8, layout, tmp_path, monkeypatch):
    path = fp8 if layout == "hf" else convert(fp8, tmp_path / "store")
    _, whole = load_pretrained(path)
    read = []
    kind = HFCheckpoint if layout == "hf" else Store
    original = kind.read

    def spy(self, leaf, region, dtype=None):
        out = original(self, leaf, region, dtype)
        read.append((leaf, out.size))
        return out

    monkeypatch.setattr(kind, "read", spy)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("expert", "fsdp", "tensor"))
    _, variables = load_pretrained(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, variables, whole)
    experts = variables["params"]["moe_layers"]["mlp"]["experts"]["up_proj"]
    assert experts.sharding.spec == jax.P(None, "expert", "fsdp", "tensor")
    sizes = {leaf.path: size for leaf, size in read}
    up = ("params", "moe_layers", "mlp", "experts", "up_proj")
    assert sizes[up] == experts.size // 8
    # Together the readings cover each array once, whatever is replicated.
    total = {}
    for leaf, size in read:
        total[leaf.path] = total.get(leaf.path, 0) + size
    assert total == {path: np.prod(leaf.shape) for path, leaf in names.leaves(TINY).items()}


def test_a_training_run_becomes_a_checkpoint(tmp_path):
    """An export of its newest step: loaded again the same, and within FP8's rounding if quantised."""
    model = DeepSeekV3(TINY)
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    state = TrainState(jnp.int32(7), variables["params"], variables["router"], {}, jax.random.key(0))
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    checkpoints.save(state, {"position": 0})
    checkpoints.wait()
    checkpoints.close()
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(TINY)}))
    (run / "metrics.jsonl").write_text("{}")

    _, loaded = load_pretrained(convert(run, tmp_path / "hf", verify=True))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]  # of bytes: the run's config names none
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors", *tokenizer]
    _, rounded = load_pretrained(convert(run, tmp_path / "fp8", dtype="fp8", verify=True))
    assert HFCheckpoint(tmp_path / "fp8").block == (128, 128)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2**-4 * np.abs(b).max())
    jax.tree.map(close, rounded, variables)
    np.testing.assert_array_equal(rounded["params"]["embed_tokens"], variables["params"]["embed_tokens"])


# Interruption --------------------------------------------------------------------------------------------

_SCRIPT = """
import sys, time
import dsv3_jax.checkpoint.{module} as m
original = m.{work}
def slowly(*args, **kwargs):
    time.sleep(0.02)
    return original(*args, **kwargs)
m.{work} = slowly
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from pathlib import Path
convert_command(ConvertArgs(sys.argv[1], Path(sys.argv[2]), workers=2))
"""


@pytest.mark.parametrize("way", ["import", "export"])
def test_killed_and_resumed(fp8, way, tmp_path, monkeypatch):
    if way == "import":
        source, script = fp8, _SCRIPT.format(module="ingest", work="_write_piece")
    else:
        source, script = convert(fp8, tmp_path / "store"), _SCRIPT.format(module="export", work="_write_tensor")
        script = script.replace("original = m", "m._UNIT_BYTES = 2000\noriginal = m", 1)
        monkeypatch.setattr("dsv3_jax.checkpoint.export._UNIT_BYTES", 2000)
    reference = convert(source, tmp_path / "straight")
    target = tmp_path / "killed"
    journal = tmp_path / "killed.incomplete" / JOURNAL
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(target)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and not (journal.exists() and journal.read_text().count("\n") > 8):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    done = journal.read_text().count("\n")
    assert done > 8
    with journal.open("a") as cut:
        cut.write('["params.lm_head/", {"ten')  # as if the kill had hit the writing of a line

    resumed = []
    module = "ingest._write_piece" if way == "import" else "export._write_tensor"
    owner, name = module.split(".")
    original = getattr(sys.modules[f"dsv3_jax.checkpoint.{owner}"], name)
    monkeypatch.setattr(f"dsv3_jax.checkpoint.{module}", lambda *a, **k: (resumed.append(a), original(*a, **k))[1])
    convert(source, target)
    assert_same_trees(reference, target)
    assert not (tmp_path / "killed.incomplete").exists()
    counted = []
    monkeypatch.setattr(f"dsv3_jax.checkpoint.{module}", lambda *a, **k: (counted.append(a), original(*a, **k))[1])
    convert(source, tmp_path / "again")
    assert 0 < len(resumed) < len(counted)


@pytest.mark.parametrize("way", ["import", "export"])
def test_what_was_damaged_meanwhile_is_done_again(fp8, way, tmp_path, monkeypatch, capfd):
    """A resumed conversion checks the parts that were done: a flipped bit, a lost file, a journal that lies."""

    def broken(*_):
        raise RuntimeError("stop")

    source = fp8 if way == "import" else convert(fp8, tmp_path / "store")
    monkeypatch.setattr("dsv3_jax.checkpoint.export._UNIT_BYTES", 2000)
    reference, unfinished = convert(source, tmp_path / "straight"), tmp_path / "target.incomplete"
    with monkeypatch.context() as patched:
        last = "ingest._write_description" if way == "import" else "export._describe"
        patched.setattr(f"dsv3_jax.checkpoint.{last}", broken)
        with pytest.raises(RuntimeError, match="stop"):
            convert(source, tmp_path / "target")
    damaged = 2
    if way == "import":
        first, second, *_ = sorted(f for f in unfinished.rglob("c/**/*") if f.is_file())
        flip(first, 7)
        second.unlink()
        description = unfinished / "params.norm/zarr.json"
        description.write_text(description.read_text().replace("bfloat16", "float32"))
        damaged += change_journal(unfinished / JOURNAL)
    else:
        file = next(unfinished.glob("*.safetensors"))
        flip(file, file.stat().st_size - 3)
        flip(file, file.stat().st_size // 2)
    capfd.readouterr()
    convert(source, tmp_path / "target")
    said = capfd.readouterr().err
    assert f"{damaged} of them are damaged or lost" in said, said
    assert_same_trees(reference, tmp_path / "target")


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def change_journal(journal):
    """Spoils the last three results in it; returns how many."""
    lines = journal.read_text().splitlines()
    for i, spoil in enumerate([lambda r: [], lambda r: r | {"files": 3}, lambda r: r | {"tensors": {"a": None}}]):
        key, result = json.loads(lines[-1 - i])
        lines[-1 - i] = json.dumps([key, spoil(result)])
    journal.write_text("\n".join([*lines, "3", "[" * 100_000, '["x"]']) + "\n")
    return 3


def test_an_interruption_of_other_work_is_not_continued(fp8, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("stop")

    with monkeypatch.context() as patched:
        patched.setattr("dsv3_jax.checkpoint.ingest._write_description", broken)
        with pytest.raises(RuntimeError, match="stop"):
            convert(fp8, tmp_path / "store")
    with pytest.raises(ValueError, match="another source or with other options"):
        convert(fp8, tmp_path / "store", dtype="bf16")
    convert(fp8, tmp_path / "store")
