"""The table of names, against the released checkpoint's list, the model's own tree, and the slips that others made."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3, ModelConfig
from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command
from dsv3_jax.checkpoint.export import plan_export
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.layout import from_file_axes
from dsv3_jax.checkpoint.plan import ConversionPlan, PlannedStore
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint

V3 = ModelConfig.preset("v3-671b")
TENSORS, ELEMENTS = 91_991, 684_531_386_000  # of the released files, scales counted


def released_tensors():
    """Names and shapes of the released checkpoint, written out here without the table under test."""

    def attention(p):
        yield p + "q_a_proj.weight", (1536, 7168)
        yield p + "q_a_layernorm.weight", (1536,)
        yield p + "q_b_proj.weight", (24576, 1536)
        yield p + "kv_a_proj_with_mqa.weight", (576, 7168)
        yield p + "kv_a_layernorm.weight", (512,)
        yield p + "kv_b_proj.weight", (32768, 512)
        yield p + "o_proj.weight", (7168, 16384)

    def ffn(p, width):
        yield p + "gate_proj.weight", (width, 7168)
        yield p + "up_proj.weight", (width, 7168)
        yield p + "down_proj.weight", (7168, width)

    yield "model.embed_tokens.weight", (129280, 7168)
    for layer in range(62):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (7168,)
        yield p + "post_attention_layernorm.weight", (7168,)
        yield from attention(p + "self_attn.")
        if layer < 3:
            yield from ffn(p + "mlp.", 18432)
            continue
        yield p + "mlp.gate.weight", (256, 7168)
        yield p + "mlp.gate.e_score_correction_bias", (256,)
        for expert in range(256):
            yield from ffn(p + f"mlp.experts.{expert}.", 2048)
        yield from ffn(p + "mlp.shared_experts.", 2048)
    p = "model.layers.61."
    yield from ((p + n, (7168,)) for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"))
    yield p + "eh_proj.weight", (7168, 14336)
    yield p + "embed_tokens.weight", (129280, 7168)
    yield p + "shared_head.head.weight", (129280, 7168)
    yield "model.norm.weight", (7168,)
    yield "lm_head.weight", (129280, 7168)


def test_every_released_tensor_has_its_place():
    expected = dict(released_tensors())
    assert names.tensor_shapes(V3) == expected
    fp8 = [n for n in expected if "_proj" in n and "eh_proj" not in n]
    scales = sum(math.prod(names.scale_shape(expected[n], (128, 128))) for n in fp8)
    assert len(expected) + len(fp8) == TENSORS
    assert sum(map(math.prod, expected.values())) + scales == ELEMENTS
    assert {n for leaf in names.leaves(V3).values() if leaf.kind.fp8 for n in leaf.names} == set(fp8)


@pytest.mark.parametrize("preset", ["v3-671b", "v2-236b", "v2-lite-16b", "v3-mini", "tiny"])
def test_arrays_are_the_models_own_tree(preset):
    config = dataclasses.replace(ModelConfig.preset(preset))
    variables = jax.eval_shape(DeepSeekV3(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    flat = {tuple(k.key for k in path): a.shape for path, a in jax.tree_util.tree_flatten_with_path(variables)[0]}
    assert {leaf.path: leaf.shape for leaf in names.leaves(config).values()} == flat


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """The whole released checkpoint, without its numbers."""
    directory = tmp_path_factory.mktemp("headers") / "v3"
    write_random_checkpoint(directory, V3, headers_only=True, scales_apart=True, file_bytes=4_300_000_000)
    return directory


@pytest.mark.slow
def test_dry_run_accounts_for_every_tensor_once(headers, capsys):
    plan = ConversionPlan(HFCheckpoint(headers, headers_only=True), "keep")
    taken = plan.tensor_names()
    assert len(taken) == len(set(taken)) == TENSORS
    assert plan.elements == ELEMENTS
    # And back: the arrays hold every number but those of the two copies.
    held = sum(math.prod(spec.shape) for spec in plan.arrays)
    assert held == ELEMENTS - 2 * 129280 * 7168
    assert plan.nbytes == 680_571_043_840 + 4 * 41_555_600 + 2 * (3_918_786_560 - 2 * 129280 * 7168)

    back = [e for file in plan_export(PlannedStore(plan)).values() for e in file]
    files = plan.source.files.tensors
    assert len(back) == TENSORS
    assert {e.name: (e.dtype, e.shape) for e in back} == {n: (i.dtype, i.shape) for n, i in files.items()}

    convert_command(ConvertArgs(str(headers), dry_run=True))
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{TENSORS:,} tensors, {ELEMENTS:,} numbers -> " in printed
    assert f"and back -> {TENSORS:,} tensors, {ELEMENTS:,} numbers" in printed


@pytest.mark.slow
def test_dry_run_of_a_cast_and_without_mtp(headers):
    cast = ConversionPlan(HFCheckpoint(headers, headers_only=True), "bf16")
    assert len(cast.tensor_names()) == TENSORS
    # Main model and MTP in two bytes per number, but for the routers' biases.
    assert cast.nbytes == 2 * 682_636_487_424 + 2 * 59 * 256
    plan = ConversionPlan(HFCheckpoint(headers, headers_only=True, mtp=False), "keep")
    assert not any("layers.61." in n for n in plan.tensor_names())
    assert not any(path[1].startswith("mtp") for path in plan.source.leaves)


def test_layers_are_chosen_by_number_and_not_by_prefix(headers):
    source = HFCheckpoint(headers, headers_only=True, layers="0,6")
    assert {names.layer_number(n) for n in ConversionPlan(source, "keep").tensor_names()} == {None, 0, 6}
    assert (source.config.num_hidden_layers, source.config.first_k_dense_replace) == (2, 1)
    assert names.layer_number("model.layers.61.enorm.weight") == 61
    assert names.layer_number("model.layers.6x.enorm.weight") is None


@pytest.mark.parametrize("text", ["", "1-", "a", "99", "61", "5-3"])
def test_layers_that_cannot_be(text, tmp_path):
    write_random_checkpoint(tmp_path / "tiny", ModelConfig.preset("tiny"), headers_only=True)
    with pytest.raises(ValueError, match="layers"):
        HFCheckpoint(tmp_path / "tiny", headers_only=True, layers=text)


def test_kv_b_is_split_within_each_head():
    config = ModelConfig.preset("tiny")
    leaves = names.leaves(config)
    heads, nope, value, rank = 2, 32, 32, config.kv_lora_rank
    k, v = (leaves["params", "dense_layers", "self_attn", n] for n in ("k_b_proj", "v_b_proj"))
    assert k.names == v.names == ("model.layers.0.self_attn.kv_b_proj.weight",)
    assert (k.start, v.start) == (0, nope)
    assert k.shape == (1, rank, heads, nope)
    tensor = np.arange(heads * (nope + value) * rank).reshape(heads * (nope + value), rank)
    seen = from_file_axes(v, tensor.reshape(1, heads, nope + value, rank)[:, :, nope:])
    for head in range(heads):
        first = head * (nope + value) + nope
        np.testing.assert_array_equal(seen[0, :, head], tensor[first : first + value].T)


def test_the_documents_table_is_the_codes():
    text = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    text = text.partition("<!-- The table is checked")[2].partition("\n\nTensors from")[0]
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| `" in line]
    expected = []
    for kind in names._KINDS:
        ins = [" ".join(kind.ins)] if kind.ins else []
        in_file = f"({', '.join([' '.join(kind.out), *ins])})"
        for part in kind.parts:
            if kind.copy_of:
                expected.append([kind.name, in_file, f"= `{kind.copy_of}", "", ""])
                continue
            outs = [*kind.out[:-1], part.size or kind.out[-1]]
            axes = [*outs, *kind.ins] if kind.keep_layout else [*kind.ins, *outs]
            there = f"({', '.join(['E'] * ('*' in kind.name) + axes)})"
            path = part.path.replace("/*", "")
            expected.append([kind.name, in_file, path, there, "yes" if kind.fp8 else ""])
    assert rows == expected
