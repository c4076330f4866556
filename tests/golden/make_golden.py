"""Writes the golden checkpoints beside this file: small random models with the logits that transformers gives them.

It needs PyTorch and transformers, which the project itself never does:

    python -m pip install torch transformers safetensors numpy
    python tests/golden/make_golden.py

Every folder holds a Hugging Face checkpoint and `expected.npz`: `tokens` (B, T) int64 and `logits` (B, T, V)
float32, and for MTP depth k `mtp_logits_k` (B, T-k-1, V): position i has seen the tokens up to i+k+1. Weights are
wide and norms are random, so that logits are of order one to ten and routing differs from token to token.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    SarvamMLAConfig,
)
from transformers.modeling_layers import MtpModel

HERE = Path(__file__).parent
FP8_MAX = 448.0

BASE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=10,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    max_position_embeddings=160,
    initializer_range=0.25,
    num_nextn_predict_layers=0,
    attn_implementation="eager",
    experts_implementation="eager",
)
YARN = dict(
    type="yarn",
    factor=10,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=16,
)
V2 = BASE | dict(n_shared_experts=2, num_experts_per_tok=2, routed_scaling_factor=1.0, norm_topk_prob=False)
del V2["num_nextn_predict_layers"]

SMALL = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    q_lora_rank=12,
    kv_lora_rank=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    initializer_range=0.35,
)
VISION = dict(  # there to be left out model that is there to be left out
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    patch_size=2,
    pos_emb_height=2,
    pos_emb_width=2,
)
KIMI = SMALL | dict(n_routed_experts=6, routed_scaling_factor=2.827, rope_theta=50000.0)

CASES: dict[str, dict[str, Any]] = {
    "v3_base": {},
    "v3_full_q": dict(q_lora_rank=None),
    "v3_one_group": dict(n_group=1, topk_group=1, n_routed_experts=6),
    "v3_yarn": dict(rope_scaling=YARN),
    "v3_yarn_paper_form": dict(rope_scaling={k: v for k, v in YARN.items() if "mscale" not in k}, q_lora_rank=None),
    "v3_two_shared": dict(n_shared_experts=2, routed_scaling_factor=1.0),
    "v3_negative_bias": dict(n_group=4, topk_group=1, num_experts_per_tok=2, bias=(-3.0, 0.5)),
    "v3_all_sparse": dict(first_k_dense_replace=0, num_hidden_layers=2),
    "v3_all_dense": dict(first_k_dense_replace=3),
    "v3_unnormalised": dict(norm_topk_prob=False, rope_theta=500.0),
    "v3_sharded": dict(shards="60KB", rms_norm_eps=1e-5, num_attention_heads=3, num_key_value_heads=3),
    # What transformers writes when nobody set these two: a number of heads that MLA ignores, MTP that isn't saved.
    "v3_class_defaults": dict(num_hidden_layers=2, written=dict(num_key_value_heads=128, num_nextn_predict_layers=1)),
    "v2_greedy": dict(family=2, q_lora_rank=None, n_group=None, topk_group=None, topk_method="greedy"),
    "v2_groups": dict(
        family=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
        rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    ),
    # True, which no released file has; transformers' class doesn't read it.
    "v2_norm_topk_prob": SMALL
    | dict(family=2, topk_method="greedy", norm_topk_prob=True, routed_scaling_factor=2.0, n_shared_experts=1),
    "glm_flash": SMALL
    | dict(
        family="glm",
        rms_norm_eps=1e-5,
        routed_scaling_factor=1.8,
        mtp=1,
        num_nextn_predict_layers=1,
        qk_nope_head_dim=12,  # of 16 with RoPE's, as values
        v_head_dim=16,
        eos_token_id=[28, 30, 31],
        intermediate_size=16,
        moe_intermediate_size=6,
        tokens=24,
        written=dict(partial_rotary_factor=1.0, topk_method="noaux_tc", first_k_dense_replace=1, rope_scaling=None),
    ),
    "kimi_k2": KIMI
    | dict(rope_scaling=YARN | dict(factor=32, beta_fast=1.0, beta_slow=1.0), written=dict(model_type="kimi_k2")),
    "kimi_k25": KIMI | dict(n_routed_experts=4, tokens=32, family="kimi_k25", rms_norm_eps=1e-5, rope_scaling=YARN),
    "sarvam_mla": SMALL
    | dict(
        family="sarvam",
        q_lora_rank=None,
        rope_scaling=YARN,
        written=dict(head_dim=16, rope_parameters=None, rope_scaling=YARN | dict(type="deepseek_yarn")),
        renamed=dict(n_routed_experts="num_experts", n_shared_experts="num_shared_experts"),
    ),
    "mtp_1": dict(mtp=1, num_nextn_predict_layers=1, num_hidden_layers=2),
    "mtp_2": dict(mtp=2, num_nextn_predict_layers=2, num_hidden_layers=2, rope_scaling=YARN, n_shared_experts=2),
    "fp8_small_blocks": dict(mtp=1, num_nextn_predict_layers=1, num_hidden_layers=2, block=(8, 16)),
    "fp8_ragged": dict(
        mtp=1,
        num_nextn_predict_layers=1,
        num_hidden_layers=2,
        hidden_size=160,
        intermediate_size=200,
        moe_intermediate_size=136,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=132,
        q_lora_rank=140,
        initializer_range=0.08,
        block=(128, 128),
        shards=300_000,
    ),
}


def randomise(module: torch.nn.Module, std: float, bias: tuple[float, float]) -> None:
    """Every weight N(0, std), every norm around one, every router bias N(*bias); the values fp32 can hold exactly."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(*bias)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                tensor.normal_(0.0, std)


def released_mtp_tensors(mtp: MtpModel, main: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The modules' weights under the names that the released files give them."""
    tensors = {}
    for k, layer in enumerate(mtp.layers):
        prefix = f"model.layers.{main.config.num_hidden_layers + k}."
        for name, tensor in layer.state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            if name == "mlp.experts.gate_up_proj":
                for e, both in enumerate(tensor):
                    gate, up = both.chunk(2)
                    tensors[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate
                    tensors[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up
            elif name == "mlp.experts.down_proj":
                for e, down in enumerate(tensor):
                    tensors[f"{prefix}mlp.experts.{e}.down_proj.weight"] = down
            else:
                tensors[prefix + name] = tensor
        tensors[prefix + "embed_tokens.weight"] = main.model.embed_tokens.weight.data
        tensors[prefix + "shared_head.head.weight"] = main.lm_head.weight.data
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def is_quantised(name: str) -> bool:
    """The released files keep these in FP8: attention and feed-forward projections; not the gate, not eh_proj."""
    return "_proj" in name and name.endswith(".weight") and "eh_proj" not in name


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, their scales, one per block, and the float32 weight that both stand for."""
    rows, columns = (-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = part.abs().max() / FP8_MAX
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: weight.shape[0], : weight.shape[1]]
    values = (weight / wide).to(torch.float8_e4m3fn)
    return values, scales, values.float() * wide


def set_by_name(main: torch.nn.Module, mtp: MtpModel | None, name: str, value: torch.Tensor) -> None:
    """Writes `value` into the model under the name that the file gives it."""
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    k = int(layer) - main.config.num_hidden_layers
    block = main.model.layers[int(layer)] if k < 0 else mtp.layers[k].mtp_block
    if ".experts." in name:
        _, _, expert, which, _ = rest.split(".")
        experts, half = block.mlp.experts, main.config.moe_intermediate_size
        where = {
            "gate_proj": lambda: experts.gate_up_proj.data[int(expert), :half],
            "up_proj": lambda: experts.gate_up_proj.data[int(expert), half:],
            "down_proj": lambda: experts.down_proj.data[int(expert)],
        }[which]()
    else:
        where = block.get_parameter(rest).data
    where.copy_(value)


def save_in_shards(tensors: dict[str, torch.Tensor], folder: Path, limit: int) -> None:
    """Several files with an index, scales last: a weight and its scale come apart, as some do in the released files."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name in sorted(tensors, key=lambda n: (n.endswith("_scale_inv"), n)):
        if sum(t.nbytes for t in shards[-1].values()) > limit:
            shards.append({})
        shards[-1][name] = tensors[name]
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.torch.save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    size = sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


def make(name: str, case: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    case = copy.deepcopy(case)  # transformers writes into dictionaries that it is given
    bias, depth = case.pop("bias", (0.0, 0.3)), case.pop("mtp", 0)
    written = case.pop("written", {})
    block, shards = case.pop("block", None), case.pop("shards", "1GB")
    length = case.pop("tokens", 40)
    family, renamed = case.pop("family", 3), case.pop("renamed", {})
    if family == 2:
        main = DeepseekV2ForCausalLM(DeepseekV2Config(**V2 | case)).eval()
    elif family == "glm":
        main = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**BASE | case)).eval()
    elif family == "sarvam":
        main = DeepseekV3ForCausalLM(SarvamMLAConfig(**BASE | case)).eval()
    elif family == "kimi_k25":
        text = DeepseekV3Config(**BASE | case)
        config = Kimi_K25Config(
            text_config=text.to_dict(), vision_config=VISION, projection_hidden_size=8, tie_word_embeddings=False
        )
        main = Kimi_K25ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    else:
        main = DeepseekV3ForCausalLM(DeepseekV3Config(**BASE | case)).eval()
    text_config = main.config.get_text_config()
    if depth and family == "glm":  # its class lacks these two fields
        main.config.num_mtp_layers, main.config.mtp_mlp_layer_types = depth, ["sparse"] * depth
    mtp = MtpModel(main, depth).eval() if depth else None
    if depth and family == "glm":
        del main.config.num_mtp_layers, main.config.mtp_mlp_layer_types
    std = text_config.initializer_range
    randomise(main, std, bias)
    if mtp is not None:
        randomise(mtp.layers, std, bias)

    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    main.save_pretrained(folder, max_shard_size=shards if isinstance(shards, str) else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    fields = json.loads((folder / "config.json").read_text()) | written
    fields = {renamed.get(k, k): v for k, v in fields.items()}
    if block:
        fields["quantization_config"] = dict(
            activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=list(block)
        )
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if family == "kimi_k25":  # transformers 5.24 writes these names, and reads the released ones
        file = folder / "model.safetensors"
        tensors = {
            name.replace("language_model.model.blocks.", "language_model.model.layers.").removeprefix("model."): tensor
            for name, tensor in safetensors.torch.load_file(file).items()
        }
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    if mtp is not None:
        file = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(file) | released_mtp_tensors(mtp, main)
        if block:
            for tensor in [t for t in tensors if is_quantised(t)]:
                values, scales, exact = quantise(tensors[tensor], block)
                tensors[tensor], tensors[tensor + "_scale_inv"] = values, scales
                set_by_name(main, mtp, tensor, exact)
        if isinstance(shards, int):
            file.unlink()
            save_in_shards(tensors, folder, shards)
        else:
            safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    tokens = torch.randint(0, text_config.vocab_size, (2, length))
    expected: dict[str, np.ndarray] = {"tokens": tokens.numpy()}
    with torch.no_grad():
        out = main(tokens, output_hidden_states=True)
        expected["logits"] = out.logits.numpy()
        hidden = out.hidden_states[-1]  # after the final norm
        for k in range(depth):
            ahead = tokens[:, k + 1 :]
            positions = torch.arange(ahead.shape[1])[None]
            hidden = mtp.forward_layer(k, hidden[:, : ahead.shape[1]], positions, None, input_ids=ahead)
            expected[f"mtp_logits_{k}"] = main.lm_head(hidden).numpy()
    np.savez_compressed(folder / "expected.npz", **expected)
    print(f"{name:20s} |logits| <= {out.logits.abs().max():.2f}")


def main(only: list[str]) -> None:
    """Writes all cases, or those named."""
    for seed, (name, case) in enumerate(CASES.items()):
        if not only or name in only:
            make(name, case, seed)
    versions = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        safetensors=safetensors.__version__,
        numpy=np.__version__,
    )
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
