"""Serving: time of a decoding step and the number of sequences that fit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from dsv3_jax.accounting.flops import forward_flops, matmul_seconds
from dsv3_jax.accounting.hardware import Hardware
from dsv3_jax.accounting.parameters import cache_bytes_per_token, model_variables
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.planning.communication import nodes_reached, ring

_USABLE = 0.9
"""Fraction of a device's memory for weights and cache; the rest is for activations and the compiler."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """A deployment of the main model.

    devices: in total. attention_data: number of device groups that serve different sequences; the devices of a group
    split the heads of each layer. expert_groups: number of device groups that the experts are split over, by default
    one per device; the devices of a group split the width of each expert. exchange: `all_to_all` sends tokens to their
    experts' devices, `all_reduce` gives every device every token, sorts them all by expert, masks those of other
    devices' and sums.
    weight, cache: bytes per parameter and per cached number. expanded_cache: keys and values per head instead of the
    latent. redundant: extra copies of experts of each layer, one more slot on that many devices. overlap: prefill
    alternates two microbatches, one's links behind the other's products.
    """

    config: ModelConfig
    hardware: Hardware
    devices: int
    attention_data: int = 1
    expert_groups: int | None = None
    exchange: Literal["all_to_all", "all_reduce"] = "all_to_all"
    weight: float = 1
    cache: float = 2
    expanded_cache: bool = False
    redundant: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.devices < 1 or self.attention_data < 1:
            raise ConfigError(f"devices {self.devices}, attention_data {self.attention_data}: both must be >= 1")
        if self.devices % self.attention_data:
            raise ConfigError(f"attention_data={self.attention_data} doesn't divide devices ({self.devices})")
        if self.config.num_attention_heads % self.tensor:
            raise ConfigError(
                f"devices / attention_data = {self.tensor} doesn't divide num_attention_heads "
                f"({self.config.num_attention_heads}): choose attention_data so that it does"
            )

    @property
    def tensor(self) -> int:
        """Number of devices that split the heads of one sequence."""
        return self.devices // self.attention_data

    @property
    def groups(self) -> int:
        return min(self.expert_groups or self.devices, self.config.n_routed_experts)


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """Seconds of one decoding step over all layers, at the hardware's efficiency.

    attention: weights and cache of attention. experts: routed ones on the busiest device. other: dense and shared
    feed-forwards, gate, head. links: communication. latency: of its hops, independent of the efficiency.
    """

    attention: float
    experts: float
    other: float
    links: float
    latency: float
    batch: int
    devices: int

    @property
    def total(self) -> float:
        return self.attention + self.experts + self.other + self.links + self.latency

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all sequences, at one token per step."""
        return self.batch / self.total

    @property
    def tokens_per_device_second(self) -> float:
        return self.tokens_per_second / self.devices


@functools.cache
def busiest_group(experts: int, groups: int, tokens: int, k: int) -> tuple[float, float]:
    """Expected maximum over groups of (distinct experts used, tokens received), for uniform routing.

    Simulated with a fixed seed: each of tokens >= 1 picks k of the experts. Beyond 4096 tokens, all experts are assumed
    to be used and the load to be even.
    """
    if tokens > 4096:
        return float(-(-experts // groups)), tokens * k / groups
    rng = np.random.default_rng(0)
    draws = max(4, min(64, 16384 // tokens))  # many tokens are their own average
    distinct = received = 0.0
    for _ in range(draws):
        picks = rng.random((tokens, experts)).argpartition(k - 1, axis=1)[:, :k]
        counts = np.bincount(picks.ravel(), minlength=experts)
        by_group = np.array_split(counts, groups)
        distinct += max(int(np.count_nonzero(g)) for g in by_group)
        received += max(int(g.sum()) for g in by_group)
    return distinct / draws, received / draws


def decode_step(serving: Serving, batch: int, context: int, efficiency: float | None = None) -> DecodeStep:
    """Predicts a decoding step for `batch` sequences (over all devices) with `context` cached tokens each.

    Each matmul takes the longer of reading its operands and multiplying; a matrix unit processes at least `matmul_rows`
    rows.
    """
    if batch < 1 or context < 0:
        raise ConfigError(
            f"batch {batch}, context {context}: a step needs at least one sequence, and no negative context"
        )
    e = serving.hardware.efficiency if efficiency is None else efficiency
    local = -(-batch // serving.attention_data)  # sequences of a device's group
    attention, experts, other = _product_seconds(serving, batch, local, local)
    attention += serving.config.num_hidden_layers * _cache_seconds(serving, local, context)
    links, latency = _exchange(serving, batch, local)
    return DecodeStep(attention / e, experts / e, other / e, links / e, latency, batch, serving.devices)


def _product_seconds(serving: Serving, tokens: int, local: int, sampled: int) -> tuple[float, float, float]:
    """Seconds of the matmuls with weights over all layers: attention, routed experts, others.

    tokens: in total, of which `local` belong to the device's group, and `sampled` of these go through the head.
    """
    c, s, sheet = serving.config, serving, serving.hardware
    operand = sheet.peak("fp8" if s.weight <= 1 else "bf16")

    def product(weights: float, n: float) -> float:
        """Seconds to multiply n rows with that many weights on one device."""
        rows = -(-n // sheet.matmul_rows) * sheet.matmul_rows
        return max(weights * s.weight / sheet.bandwidth, 2 * weights * rows / operand)

    attention = other = 0.0
    routed_per_expert = 0.0
    for variable in model_variables(c):
        last, weights = variable.path[-1], float(variable.size)
        if variable.is_mtp or variable.is_norm or variable.collection != "params" or last == "embed_tokens":
            continue
        if variable.is_routed:
            routed_per_expert += weights / c.n_routed_experts / c.num_moe_layers
        elif "self_attn" in variable.path:
            attention += product(weights / (1 if "_a_proj" in last else s.tensor), local)
        elif last == "weight":  # the gate
            other += product(weights, local if s.exchange == "all_to_all" else tokens)
        elif "shared_experts" in variable.path and s.exchange == "all_to_all":
            other += product(weights, -(-local // s.tensor))
        else:  # dense feed-forwards and head, split over the group; shared experts too under all_reduce
            other += product(weights / s.tensor, sampled if last == "lm_head" else local)

    experts = 0.0
    if c.num_moe_layers:
        width_split = s.devices / s.groups
        active, received = busiest_group(c.n_routed_experts, s.groups, tokens, c.num_experts_per_tok)
        each = routed_per_expert / width_split
        experts = c.num_moe_layers * active * product(each, received / active)
        experts += tokens * _masked_bytes(serving) / sheet.bandwidth
    return attention, experts, other


def _cache_seconds(serving: Serving, local: int, context: int) -> float:
    """Seconds of scores and values in one layer: the longer of reading the cache and multiplying."""
    c, s, sheet = serving.config, serving, serving.hardware
    heads = c.num_attention_heads // s.tensor
    if s.expanded_cache:
        per_token = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
        flops = 2 * per_token  # one query a head: a product of a vector, which needs no matrix unit
    else:  # every device of a group reads the whole latent, which all its heads share
        per_token = c.kv_lora_rank + c.qk_rope_head_dim
        rows = -(-heads // sheet.matmul_rows) * sheet.matmul_rows
        flops = 2 * rows * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return local * context * max(per_token * s.cache / sheet.bandwidth, flops / sheet.peak("bf16"))


def _masked_bytes(serving: Serving) -> float:
    """Bytes that a device moves over all layers per token under `all_reduce`, whether it holds the experts or not.

    K rows are written in the order of experts, as the result of matmuls (zeros for other devices' experts), read and
    written in the order of tokens, and read to be summed. SwiGLU reads two rows of the experts' width and writes one.
    """
    c, s = serving.config, serving
    if s.exchange != "all_reduce":
        return 0.0
    width = 5 * c.hidden_size + 3 * c.moe_intermediate_size * s.groups / s.devices
    return 2 * c.num_moe_layers * c.num_experts_per_tok * width


def _exchange(serving: Serving, tokens: int, local: int) -> tuple[float, float]:
    """Seconds of communication over all layers: for bandwidth, and for latency."""
    c, s, sheet = serving.config, serving, serving.hardware
    links = latency = 0.0
    width = 2 * c.hidden_size

    def all_reduce(rows: float, size: int, layers: int) -> None:
        nonlocal links, latency
        if size > 1:
            rate = sheet.links if size <= sheet.domain else sheet.network
            links += layers * 2 * rows * width * ring(size) / rate
            latency += layers * 2 * hops(sheet, size) * sheet.latency

    all_reduce(local, s.tensor, c.num_hidden_layers + c.num_dense_layers)
    if s.exchange == "all_reduce":
        all_reduce(local if s.attention_data == 1 else tokens, s.devices, c.num_moe_layers)
    elif s.devices > 1:
        mine = local / s.tensor
        per_copy = 3 * c.hidden_size if sheet.peak("fp8") > sheet.peak("bf16") else 4 * c.hidden_size
        if sheet.torus_axes:
            side = s.devices ** (1 / sheet.torus_axes)
            seconds = mine * c.num_experts_per_tok * per_copy * max(1.0, sheet.torus_axes * side / 4) / sheet.links
        elif s.devices <= sheet.domain:
            seconds = mine * c.num_experts_per_tok * per_copy / sheet.links
        else:
            nodes = s.devices / sheet.domain
            seconds = mine * nodes_reached(c, int(nodes)) * per_copy / sheet.network
        links += c.num_moe_layers * seconds
        latency += c.num_moe_layers * 2 * hops(sheet, s.devices) * sheet.latency
    return links, latency


def prefill_step(serving: Serving, prompts: int, length: int, efficiency: float | None = None) -> float:
    """Seconds to process `prompts` prompts (over all devices) of `length` tokens, in expanded form.

    With few prompts, some groups of devices have no attention to compute, and all experts are read for little work.
    """
    if prompts < 1 or length < 1:
        raise ConfigError(f"prompts {prompts}, length {length}: both must be >= 1")
    c, s, sheet = serving.config, serving, serving.hardware
    e = sheet.efficiency if efficiency is None else efficiency
    most = -(-prompts // s.attention_data)  # of a device's group
    scores = forward_flops(c, length / 2).attention * most * length / s.tensor / sheet.peak("bf16")
    compute = scores + sum(_product_seconds(serving, prompts * length, most * length, most))
    links, latency = _exchange(serving, prompts * length, most * length)
    return (max(compute, links) if s.overlap else compute + links) / e + latency


def prefill_tokens_per_second(serving: Serving, length: int, efficiency: float | None = None) -> float:
    """Prompt tokens per second over all devices, for prompts of `length` tokens in expanded form.

    Matmuls run at their peak rate; communication is hidden behind them with `overlap`, and follows them without.
    """
    sheet = serving.hardware
    e = sheet.efficiency if efficiency is None else efficiency
    linear = sheet.peak("fp8" if serving.weight <= 1 else "bf16")
    flops = dataclasses.replace(forward_flops(serving.config, length / 2), head=0.0)  # a prompt needs one row
    compute = matmul_seconds(flops, sheet.peak("bf16"), linear) / serving.devices
    links = _exchange(serving, length * serving.devices, length * serving.tensor)[0] / (length * serving.devices)
    masked = _masked_bytes(serving) / sheet.bandwidth
    return e / (masked + (max(compute, links) if serving.overlap else compute + links))


def hops(sheet: Hardware, size: int) -> float:
    """Number of sequential hops when `size` devices gather: along each dimension of a torus; one behind a switch."""
    if not sheet.torus_axes:
        return 1.0 if size <= sheet.domain else 2.0
    side: float = size ** (1 / sheet.torus_axes)
    return sheet.torus_axes * (side - 1)


# Memory ----------------------------------------------------------------------------------------------------


def weight_bytes(serving: Serving) -> float:
    """Bytes of weights on the fullest device: experts are split over all devices, attention over a group."""
    c, s = serving.config, serving
    total = 0.0
    for variable in model_variables(c):
        if variable.is_mtp:
            continue
        if variable.is_routed:
            slots = -(-c.n_routed_experts // s.groups) + (1 if s.redundant else 0)
            total += variable.size / c.n_routed_experts * slots / (s.devices / s.groups) * s.weight
        elif variable.path[-1] in ("embed_tokens", "lm_head"):
            total += variable.size / s.tensor * 2
        elif "shared_experts" in variable.path and s.exchange == "all_to_all":
            total += variable.size * s.weight
        else:
            whole = "_a_proj" in variable.path[-1] or variable.is_norm or "gate" in variable.path
            total += variable.size * s.weight / (1 if whole else s.tensor)
    return total


def cache_bytes(serving: Serving) -> float:
    """Bytes per cached token on a device that holds its sequence."""
    c, s = serving.config, serving
    if not s.expanded_cache:
        return cache_bytes_per_token(c, "bfloat16") / 2 * s.cache
    widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return c.num_hidden_layers * c.num_attention_heads / s.tensor * widths * s.cache


def largest_batch(serving: Serving, context: int) -> int:
    """Number of sequences of `context` tokens that fit over all devices; 0 if the weights alone don't fit."""
    room = _USABLE * serving.hardware.memory - weight_bytes(serving)
    return max(0, int(room // (cache_bytes(serving) * max(1, context)))) * serving.attention_data
