"""The table that maps Hugging Face's tensors to the model's arrays and back.

A tensor in a file is a matrix (out, in), as in PyTorch; an array of the model is (*stack, *in, *out): transposed, with
a separate axis for heads, and with layers and experts stacked in front. `_KINDS` gives the axes and the array of every
kind of tensor; everything else here follows from it and a `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from dsv3_jax.config import ModelConfig

SCALE = "_scale_inv"
"""A tensor `X.weight` in FP8 has its scales in `X.weight_scale_inv`, which multiply it despite the name."""

TreePath = tuple[str, ...]
"""Path of an array in the variables, such as ("params", "moe_layers", "self_attn", "o_proj")."""

Where = Literal["model", "layer", "dense", "moe", "mtp"]


@dataclasses.dataclass(frozen=True)
class Part:
    """An array that a kind of tensor maps to: `size` entries of the last output axis, after those of earlier parts."""

    path: str
    size: str | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row of the table. Axes are letters of `dimensions`; a tensor is (prod(out), prod(in)), or (out,) without in.

    where: which modules have it; "layer" is any of dense, sparse and MTP blocks, "mtp" an MTP module beside its block.
    fp8: whether the released files hold it in FP8 blocks.
    keep_layout: stored as (out, in); for the embedding, which is only looked up.
    float32: stays float32 whatever the rest is cast to.
    """

    name: str
    where: Where
    out: tuple[str, ...]
    ins: tuple[str, ...]
    parts: tuple[Part, ...]
    fp8: bool = False
    keep_layout: bool = False
    float32: bool = False
    collection: str = "params"
    condition: str = ""
    copy_of: str = ""


def _row(name: str, where: Where, out: str, ins: str, path: str = "", **more: Any) -> Kind:
    parts = more.pop("parts", (Part(path or name.removesuffix(".weight").replace(".", "/")),))
    return Kind(name, where, tuple(out.split()), tuple(ins.split()), parts, **more)


def _feed_forward(name: str, where: Where, width: str, **more: Any) -> list[Kind]:
    gate, up = (_row(f"{name}.{p}_proj.weight", where, width, "D", fp8=True, **more) for p in ("gate", "up"))
    return [gate, up, _row(f"{name}.down_proj.weight", where, "D", width, fp8=True, **more)]


_KINDS: tuple[Kind, ...] = (
    _row("model.embed_tokens.weight", "model", "V", "D", "embed_tokens", keep_layout=True),
    _row("model.norm.weight", "model", "D", "", "norm"),
    _row("lm_head.weight", "model", "V", "D"),
    # Every block
    _row("input_layernorm.weight", "layer", "D", ""),
    _row("self_attn.q_proj.weight", "layer", "H N+P", "D", fp8=True, condition="full q"),
    _row("self_attn.q_a_proj.weight", "layer", "Rq", "D", fp8=True, condition="low-rank q"),
    _row("self_attn.q_a_layernorm.weight", "layer", "Rq", "", condition="low-rank q"),
    _row("self_attn.q_b_proj.weight", "layer", "H N+P", "Rq", fp8=True, condition="low-rank q"),
    _row("self_attn.kv_a_proj_with_mqa.weight", "layer", "R+P", "D", fp8=True),
    _row("self_attn.kv_a_layernorm.weight", "layer", "R", ""),
    # Rows go head by head, each head's nope part before its values.
    _row(
        "self_attn.kv_b_proj.weight",
        "layer",
        "H N+Vd",
        "R",
        fp8=True,
        parts=(Part("self_attn/k_b_proj", "N"), Part("self_attn/v_b_proj", "Vd")),
    ),
    _row("self_attn.o_proj.weight", "layer", "D", "H Vd", fp8=True),
    _row("post_attention_layernorm.weight", "layer", "D", ""),
    # Feed-forwards
    *_feed_forward("mlp", "dense", "F"),
    _row("mlp.gate.weight", "moe", "E", "D", "mlp/gate/weight"),
    _row(
        "mlp.gate.e_score_correction_bias",
        "moe",
        "E",
        "",
        float32=True,
        collection="router",
        condition="router bias",
    ),
    *_feed_forward("mlp.experts.*", "moe", "M"),
    *_feed_forward("mlp.shared_experts", "moe", "S", condition="shared experts"),
    # Multi-token prediction: `eh_proj` takes [embedding; hidden]; embedding and head are copies of the model's.
    _row("embed_tokens.weight", "mtp", "V", "D", copy_of="model.embed_tokens.weight"),
    _row("enorm.weight", "mtp", "D", ""),
    _row("hnorm.weight", "mtp", "D", ""),
    _row("eh_proj.weight", "mtp", "D", "2D"),
    _row("shared_head.norm.weight", "mtp", "D", "", "norm"),
    _row("shared_head.head.weight", "mtp", "V", "D", copy_of="lm_head.weight"),
)


def dimensions(config: ModelConfig) -> dict[str, int]:
    """Returns the size of every axis in the table."""
    c = config
    nope, rope, value, rank = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "2D": 2 * c.hidden_size,
        "F": c.intermediate_size,
        "M": c.moe_intermediate_size,
        "S": c.n_shared_experts * c.moe_intermediate_size,
        "E": c.n_routed_experts,
        "H": c.num_attention_heads,
        "N": nope,
        "Vd": value,
        "N+P": nope + rope,
        "N+Vd": nope + value,
        "R": rank,
        "R+P": rank + rope,
        "Rq": c.q_lora_rank or 0,
    }


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the model.

    path, shape: where it is in the variables, and (*stack, *in, *out).
    axes: the letters of the shape: "L" layers, "E" experts, then the kind's.
    stack: how many of the first axes index tensors, 0 to 2: layers, or layers and experts, or experts.
    start: the offset of its entries on the tensor's last output axis.
    names: the name of the tensor at each index of the stack, in C order.
    """

    path: TreePath
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    stack: int
    start: int
    kind: Kind
    names: tuple[str, ...]
    tensor_out: tuple[int, ...]
    tensor_in: tuple[int, ...]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the file."""
        out = (math.prod(self.tensor_out),)
        return (*out, math.prod(self.tensor_in)) if self.tensor_in else out

    @property
    def scale_path(self) -> TreePath:
        """Path of the scale grids, in the collection "scales"; the two halves of kv_b_proj share one."""
        last = "kv_b_proj" if len(self.kind.parts) > 1 else self.path[-1]
        return ("scales", *self.path[1:-1], last)


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a model, by their numbers in the files, in order.

    `main` are blocks of the model, dense ones first; `mtp` its MTP modules.
    """

    main: tuple[int, ...]
    mtp: tuple[int, ...]

    @classmethod
    def all(cls, config: ModelConfig) -> Layers:
        """Returns all layers; MTP modules are numbered after the model's."""
        last = config.num_hidden_layers
        return cls(tuple(range(last)), tuple(range(last, last + config.num_nextn_predict_layers)))

    def select(self, config: ModelConfig) -> ModelConfig:
        """Returns the configuration of the model made of these layers of `config`."""
        return dataclasses.replace(
            config,
            num_hidden_layers=len(self.main),
            first_k_dense_replace=sum(n < config.first_k_dense_replace for n in self.main),
            num_nextn_predict_layers=len(self.mtp),
        )


def leaves(config: ModelConfig, layers: Layers | None = None) -> dict[TreePath, Leaf]:
    """Returns every array of the model of `config`, with the tensors that it consists of.

    layers: the numbers of this model's layers in the files; by default those of a whole checkpoint.
    """
    layers = layers or Layers.all(config)
    dense, moe = layers.main[: config.num_dense_layers], layers.main[config.num_dense_layers :]
    found: dict[TreePath, Leaf] = {}

    def add(where: tuple[Where, ...], path: str, prefixes: tuple[str, ...], *, stacked: bool) -> None:
        for kind in _KINDS:
            if kind.where in where and not kind.copy_of and _applies(kind, config):
                for leaf in _leaves_of(kind, config, path, prefixes, stacked):
                    found[leaf.path] = leaf

    def prefix(numbers: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"model.layers.{n}." for n in numbers)

    add(("model",), "", ("",), stacked=False)
    if dense:
        add(("layer", "dense"), "dense_layers/", prefix(dense), stacked=True)
    if moe:
        add(("layer", "moe"), "moe_layers/", prefix(moe), stacked=True)
    for k, number in enumerate(layers.mtp):
        add(("mtp",), f"mtp_{k}/", prefix([number]), stacked=False)
        add(("layer", "moe"), f"mtp_{k}/block/", prefix([number]), stacked=False)
    return found


def copies(config: ModelConfig, layers: Layers | None = None) -> dict[str, str]:
    """Returns tensors that are copies of another one: MTP's embedding and head."""
    layers = layers or Layers.all(config)
    repeated = [kind for kind in _KINDS if kind.copy_of]
    return {f"model.layers.{n}.{kind.name}": kind.copy_of for n in layers.mtp for kind in repeated}


def tensor_shapes(config: ModelConfig, layers: Layers | None = None) -> dict[str, tuple[int, ...]]:
    """Returns every tensor of the model's checkpoint, without scales, and its shape in the file."""
    shapes = {name: leaf.tensor_shape for leaf in leaves(config, layers).values() for name in leaf.names}
    return shapes | {name: shapes[original] for name, original in copies(config, layers).items()}


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Returns the shape of an FP8 matrix's scale grid: one number per block, including partial ones at the edges."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def layer_number(name: str) -> int | None:
    """Returns the number in `model.layers.NUMBER.`. It is parsed, so that "layers.6" doesn't match "layers.61"."""
    parts = name.split(".")
    is_layer = parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal()
    return int(parts[2]) if is_layer else None


def _applies(kind: Kind, config: ModelConfig) -> bool:
    return {
        "": True,
        "full q": config.q_lora_rank is None,
        "low-rank q": config.q_lora_rank is not None,
        "router bias": config.has_router_bias,
        "shared experts": config.n_shared_experts > 0,
    }[kind.condition]


def _leaves_of(kind: Kind, config: ModelConfig, path: str, prefixes: tuple[str, ...], stacked: bool) -> Iterator[Leaf]:
    size = dimensions(config)
    expert = ".experts.*." in kind.name
    tensor_out, tensor_in = tuple(size[a] for a in kind.out), tuple(size[a] for a in kind.ins)
    stack_axes = ("L",) * stacked + ("E",) * expert
    stack_shape = (len(prefixes),) * stacked + (size["E"],) * expert
    if expert:
        names = tuple(p + kind.name.replace("*", str(e)) for p in prefixes for e in range(size["E"]))
    else:
        names = tuple(p + kind.name for p in prefixes)
    start = 0
    for part in kind.parts:
        last, width = (part.size, size[part.size]) if part.size else (kind.out[-1], tensor_out[-1])
        out_axes, out_shape = (*kind.out[:-1], last), (*tensor_out[:-1], width)
        axes = (*out_axes, *kind.ins) if kind.keep_layout else (*kind.ins, *out_axes)
        shape = (*out_shape, *tensor_in) if kind.keep_layout else (*tensor_in, *out_shape)
        yield Leaf(
            path=(kind.collection, *(path + part.path.replace("/*", "")).split("/")),
            shape=(*stack_shape, *shape),
            axes=(*stack_axes, *axes),
            stack=len(stack_shape),
            start=start,
            kind=kind,
            names=names,
            tensor_out=tensor_out,
            tensor_in=tensor_in,
        )
        start += width
