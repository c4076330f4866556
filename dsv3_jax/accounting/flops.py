"""FLOPs of matmuls: counted in a traced program, and as closed forms over the model's own parameters.

A multiply-add is two FLOPs. Only matmuls are counted: norms, softmax and SwiGLU are bound by memory, and `planning`
accounts for them as memory traffic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from dsv3_jax.accounting.parameters import Variable, activated, model_variables
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.runtime import Runtime

# Counting a program ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Product:
    """A matmul in a program, and how often it runs.

    kind: "linear"; "attention", whose operands share batch axes; or "grouped", rows by expert.
    bytes: of both operands and the result.
    """

    kind: str
    flops: int
    bytes: int
    times: int


def products(function: Callable[..., Any], *arguments: Any, repeat_loops: bool = True) -> list[Product]:
    """Lists every matmul in `function(*arguments)` by tracing it; nothing is computed.

    Args:
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      repeat_loops: count the body of a scan as often as it runs. False counts it once, as XLA's cost analysis does.

    Raises:
      ConfigError: the program has a matmul in a `while` loop, whose trip count is unknown while tracing.
    """
    return list(_products(jax.make_jaxpr(function)(*arguments).jaxpr, 1, repeat_loops))


def count_flops(function: Callable[..., Any], *arguments: Any, repeat_loops: bool = True) -> int:
    """FLOPs of all `products`."""
    return sum(p.flops * p.times for p in products(function, *arguments, repeat_loops=repeat_loops))


def _products(jaxpr: Any, times: int, repeat: bool) -> Iterator[Product]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            batched = bool(eqn.params["dimension_numbers"][1][0])
            yield Product("attention" if batched else "linear", _dot_flops(eqn), _bytes(eqn), times)
        elif name in ("ragged_dot", "ragged_dot_general"):
            yield Product("grouped", _ragged_dot_flops(eqn), _bytes(eqn), times)
        elif name == "cond":
            branches = [list(_products(b.jaxpr, times, repeat)) for b in eqn.params["branches"]]
            yield from max(branches, key=lambda found: sum(p.flops * p.times for p in found))
        else:
            trips = eqn.params["length"] if name == "scan" and repeat else 1
            for inner in jaxprs_in_params(eqn.params):
                for product in _products(inner, times * trips, repeat):
                    if name == "while" and repeat:
                        raise ConfigError("can't count matrix products in a while loop: a trace doesn't know its trips")
                    yield product


def _bytes(eqn: Any) -> int:
    arrays = [*eqn.invars[:2], *eqn.outvars]
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in arrays)


def _dot_flops(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    depth: int = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    size: int = math.prod(eqn.outvars[0].aval.shape)
    return 2 * size * depth


def _ragged_dot_flops(eqn: Any) -> int:
    """Each row is multiplied with the matrix of one group, so the group axis of the right side is free."""
    left, right = (tuple[int, ...](v.aval.shape) for v in eqn.invars[:2])
    if len(right) == 3:  # (M, K) x (G, K, N) -> (M, N)
        return 2 * left[0] * right[1] * right[2]
    return 2 * left[0] * left[1] * right[1]  # the gradient of the weights: (M, K) x (M, N) -> (G, K, N)


def forward_program(
    config: ModelConfig, runtime: Runtime, batch: int, length: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the training forward pass, MTP included, and its abstract arguments."""
    from dsv3_jax.model.transformer import DeepSeekV3

    model = DeepSeekV3(config, runtime)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    further = (tokens,) * config.num_nextn_predict_layers

    def forward(variables: Any, tokens: Any, further: Any) -> Any:
        out: Any = model.apply(variables, tokens, further, method="forward")
        return out.replace(logits=out.logits.array(), mtp_logits=tuple(x.array() for x in out.mtp_logits))

    return forward, (variables, tokens, further)


# Closed forms ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs per token by kind of matmul: `linear` may be FP8, the others are bfloat16.

    linear: projections and feed-forwards. head: the output head, also where MTP uses it. router: gates.
    attention: scores and weighted values.
    """

    linear: float
    head: float
    router: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.head + self.router + self.attention

    def __add__(self, other: TokenFlops) -> TokenFlops:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return TokenFlops(*(a + b for a, b in zip(mine, others, strict=True)))

    def scaled(self, weights: float, attention: float) -> TokenFlops:
        """Scales the matmuls with weights by one factor, and attention by another."""
        return TokenFlops(self.linear * weights, self.head * weights, self.router * weights, self.attention * attention)


def multiplies(variable: Variable) -> bool:
    """Whether a token is multiplied with `variable`: true except for the embedding, norms and the router bias."""
    return variable.collection == "params" and not variable.is_norm and variable.path[-1] != "embed_tokens"


@functools.cache
def _weights(config: ModelConfig, mtp: bool) -> tuple[int, int, int]:
    """Counts the weights that multiply one token: in linear layers, in the head, in gates."""
    linear = head = router = 0
    for variable in model_variables(config):
        if not multiplies(variable) or (variable.is_mtp and not mtp):
            continue
        used = activated(variable, config)
        if variable.path[-1] == "lm_head":
            head += used * (1 + (config.num_nextn_predict_layers if mtp else 0))
        elif "gate" in variable.path:
            router += used
        else:
            linear += used
    return linear, head, router


def forward_flops(config: ModelConfig, keys: float, *, mtp: bool = False) -> TokenFlops:
    """FLOPs of the forward pass of one token, in expanded form, with `keys` keys on average (causal: half the
    sequence).

    Linears cost 2 FLOPs per weight; scores and values 2 H (N + P + Vd) per key and layer.
    """
    c = config
    linear, head, router = _weights(c, mtp)
    layers = c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)
    widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return TokenFlops(2.0 * linear, 2.0 * head, 2.0 * router, 2.0 * layers * c.num_attention_heads * widths * keys)


def model_flops(config: ModelConfig, length: int, *, mtp: bool = True) -> TokenFlops:
    """FLOPs per training token without recomputation, which define MFU: three forward passes, causal attention."""
    return forward_flops(config, length / 2, mtp=mtp).scaled(3, 3)


def recomputed_flops(config: ModelConfig, length: int, remat: str, *, mtp: bool = True) -> TokenFlops:
    """FLOPs per token that the backward pass recomputes under a remat policy (`Runtime.remat`).

    `block` recomputes every block except its last matmuls, which no gradient needs: the down-projections of
    feed-forwards. `paper` recomputes what it doesn't save: the up-projections of queries, keys and values, the scores
    and the gate.
    """
    c = config
    everything = forward_flops(c, length / 2, mtp=mtp)
    if remat == "none":
        return TokenFlops(0, 0, 0, 0)
    counted = [v for v in model_variables(c) if mtp or not v.is_mtp]
    if remat == "block":
        last = sum(activated(variable, c) for variable in counted if variable.path[-1] == "down_proj")
        return dataclasses.replace(everything, linear=everything.linear - 2.0 * last, head=0)
    up = ("q_b_proj", "k_b_proj", "v_b_proj", "q_proj")
    repeated = sum(variable.size for variable in counted if variable.path[-1] in up)
    qk, v = c.qk_nope_head_dim + c.qk_rope_head_dim, c.v_head_dim
    return TokenFlops(2.0 * repeated, 0, everything.router, everything.attention * qk / (qk + v))


def decode_flops(config: ModelConfig, context: int) -> TokenFlops:
    """FLOPs per decoded token in absorbed form: queries and outputs are multiplied with W^UK and W^UV.

    Scores cost 2 H (R + P) and values 2 H R per cached token and layer.
    """
    c = config
    linear, head, router = _weights(c, mtp=False)
    widths = 2 * c.kv_lora_rank + c.qk_rope_head_dim
    attention = 2.0 * c.num_hidden_layers * c.num_attention_heads * widths * context
    return TokenFlops(2.0 * linear, 2.0 * head, 2.0 * router, attention)


def matmul_seconds(flops: TokenFlops, bf16: float, linear: float) -> float:
    """Seconds per token at two peak rates in FLOP/s, of linear layers and of everything else."""
    return flops.linear / linear + (flops.head + flops.router + flops.attention) / bf16
