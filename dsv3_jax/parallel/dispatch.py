"""Expert parallelism: sends tokens to the devices that hold their experts, and returns the results.

Routed experts are sharded over the mesh axes `node` and `expert`. A token is sent once to each device that holds at
least one of its experts, and that device returns the weighted sum over its own. With both axes there are two hops
(report section 3.2.2): once to each node, to the device with the same index in it as the sender, and then within the
node. On the way back the sums of a node are added before they leave it.

No token is dropped, and buffers have fixed sizes: `dispatch_slack` times that of even routing. If the routing of a
batch is more uneven, which all devices determine together before anything is sent, the usual exchange carries nothing,
and the tokens are sent in several rounds, each so small that even the worst routing fits. The usual exchange is outside
of that conditional, so that a compiler can overlap it with other work.

If a buffer has room for all tokens, as over few devices, they are all-gathered instead: that sends as many bytes, and
nothing is packed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.parallel.rows import collect, spread
from dsv3_jax.parallel.sharding import LogicalSharding, current_sharding
from dsv3_jax.runtime import Runtime

SLACKS = (1.2, 1.5, 2.0, 3.0, 4.0)
"""Values of `runtime.dispatch_slack`: the default, and those that a run may choose."""

LocalExperts = Callable[..., jax.Array]
"""`(x (M, D), ids (M, K), weights (M, K), expert weights, rows) -> (M, D)`: applies one device's experts to its tokens.
An id equal to the number of experts means none; at most `rows` of the M K ids are below it.
"""


class Packing(Protocol):
    """Packing of tokens, and of gradients of the experts' outputs, for sending: (N, D) to (N, bytes), and back."""

    def pack(self, x: jax.Array, *, gradient: bool = False) -> jax.Array: ...
    def unpack(self, packed: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array: ...


def flatten(a: jax.Array) -> jax.Array:
    """(..., X) -> (N, X)."""
    return a.reshape(-1, a.shape[-1])


def experts_are_spread(runtime: Runtime) -> bool:
    """Whether experts, or their inputs, are sharded on the current mesh."""
    return current_sharding(runtime).mesh is not None


def spread_experts(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: Any,
    *,
    compute: LocalExperts,
    config: ModelConfig,
    runtime: Runtime,
    packing: Packing | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The experts seam on the current mesh.

    Args:
      x: (B, T, D), sharded over batch and sequence. ids, weights: (B, T, K), sharded alike.
      w: a NamedTuple of gate_proj, up_proj (E, D, F) and down_proj (E, F, D), sharded over experts and F.
      packing: for sending tokens; by default they aren't packed. Results never are.

    Returns:
      (B, T, D), sharded like `x`; and `RouterStats.exchanges`.

    Raises:
      ConfigError: experts, batch or sequence don't divide over their axes.
    """
    sharding = current_sharding(runtime)
    partial_sums = sharding.axes("expert_ffn")

    def on_device(x: jax.Array, ids: jax.Array, weights: jax.Array, w: Any) -> tuple[jax.Array, jax.Array]:
        layout = DispatchSizes.of(config, runtime, sharding, math.prod(x.shape[:2]), ids.shape[-1], len(w.gate_proj))
        y, over = _route(flatten(x), flatten(ids), flatten(weights), w, compute, layout, packing)
        y = lax.psum(y, partial_sums) if partial_sums else y
        return y.astype(x.dtype).reshape(x.shape), over.reshape(1, 1, -1)

    if sharding.manual:  # inside a pipeline's shard_map, where everything is one device's already
        return on_device(x, ids, weights, w)
    tokens = sharding.spec("the tokens of a batch", x.shape, ("batch", "sequence", None))
    up = sharding.spec("experts/gate_proj", w.gate_proj.shape, ("experts", None, "expert_ffn"))
    down = sharding.spec("experts/down_proj", w.down_proj.shape, ("experts", "expert_ffn", None))
    specs = (tokens, tokens, tokens, type(w)(up, up, down))
    gives = tokens, PartitionSpec(*tokens[:2])
    return jax.shard_map(on_device, in_specs=specs, out_specs=gives, check_vma=False)(x, ids, weights, w)


@dataclasses.dataclass(frozen=True)
class DispatchSizes:
    """Placement of experts and sizes of buffers. All counts are per device and layer.

    node, expert: sizes of the axes that experts are sharded over, or 1.
    local: experts per device. tokens: tokens per device. k: experts per token.
    cut: whether tokens are sharded over these axes too, or replicated.
    node_room: tokens for each node. device_room: tokens for each device of a node, from all nodes.
    row_room: pairs of a token and an expert.
    other_rooms: these three for each of `SLACKS`.
    """

    node: int
    expert: int
    local: int
    tokens: int
    k: int
    cut: bool
    method: str
    node_room: int
    device_room: int
    row_room: int
    other_rooms: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(
        cls, config: ModelConfig, runtime: Runtime, sharding: LogicalSharding, tokens: int, k: int, local: int
    ) -> DispatchSizes:
        axes, batch = sharding.axes("experts"), sharding.rules.batch
        if not set(axes) <= {"node", "expert"}:
            raise ConfigError(f"the rules spread experts over {', '.join(axes)}: it must be over node and expert")
        node, expert = (sharding.axis_size(a) if a in axes else 1 for a in ("node", "expert"))
        cut = set(axes) <= set(batch)
        if not cut and set(axes) & set(batch):
            raise ConfigError("the rules cut the batch over one of the axes node and expert, but not over the other")
        devices = node * expert
        # Groups that lie within nodes bound how many nodes a token reaches: M of section 2.1.2.
        nodes = min(k, node, config.topk_group if config.n_group % node == 0 else node)

        worst = devices * min(k, local)

        def rooms(slack: float) -> tuple[int, int, int]:
            def room(even: float, least: int, most: int) -> int:
                return max(least, min(most, int(even * slack)))

            return (
                room(tokens * nodes / node, 1, tokens),
                room(tokens * min(k, devices) / expert, node, tokens * node),
                room(tokens * k, worst, tokens * worst),
            )

        ours, others = rooms(runtime.dispatch_slack or SLACKS[0]), tuple(map(rooms, SLACKS))
        return cls(node, expert, local, tokens, k, cut, runtime.dispatch, *ours, others)

    @property
    def devices(self) -> int:
        return self.node * self.expert

    @property
    def axes(self) -> tuple[str, ...]:
        return ("node",) * (self.node > 1) + ("expert",) * (self.expert > 1)

    @property
    def hops(self) -> tuple[Hop, ...]:
        """Returns the hops of a token, over axes of more than one device."""
        hops = (
            Hop("node", self.node, self.expert * self.local, self.node_room),
            Hop("expert", self.expert, self.local, self.device_room),
        )
        return tuple(hop for hop in hops if hop.size > 1)

    @property
    def round_tokens(self) -> int:
        """Number of tokens per round such that the worst routing fits into every buffer."""
        worst_rows = self.devices * min(self.k, self.local)
        return min(self.node_room, self.device_room // self.node, self.row_room // worst_rows)


def _route(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    w: Any,
    compute: LocalExperts,
    layout: DispatchSizes,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """The part of one device: its tokens (N, D), ids and weights (N, K) -> the experts' outputs (N, D).

    Also returns an entry of `RouterStats.exchanges`.
    """
    quick = no_exchange()
    if layout.devices == 1:
        return compute(x, ids, weights, w, ids.size), quick
    if layout.method == "all_gather" or not layout.cut:
        return _gather(x, ids, weights, w, compute, layout), quick
    once = functools.partial(_exchange, w=w, compute=compute, layout=layout, packing=packing)
    none = layout.devices * layout.local
    rounds = -(-layout.tokens // layout.round_tokens)
    if rounds == 1:
        return once(x, ids, weights), quick

    def in_rounds(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        size = layout.round_tokens

        def cut(a: jax.Array, fill: int) -> jax.Array:
            padded = jnp.pad(a, ((0, rounds * size - len(a)), (0, 0)), constant_values=fill)
            return padded.reshape(rounds, size, -1)

        step = jax.checkpoint(lambda _, part: (None, once(*part)))
        y: jax.Array = lax.scan(step, None, (cut(x, 0), cut(ids, none), cut(weights, 0)))[1]
        return y.reshape(rounds * size, -1)[: len(x)]

    over = _overflows(ids, layout)
    fits = ~over[0]
    y = once(x, jnp.where(fits, ids, none), weights)
    y = lax.cond(fits, lambda y, *_: y, lambda _, *tokens: in_rounds(*tokens), y, x, ids, weights)
    return y, over.astype(jnp.float32)


def no_exchange() -> jax.Array:
    """An entry of `RouterStats.exchanges` for tokens that fit into any buffers, or aren't sent."""
    return jnp.zeros((1 + len(SLACKS),), jnp.float32)


def _reached(ids: jax.Array, bins: int, width: int) -> jax.Array:
    """Mask (N, bins): whether a token has an expert in each of `bins` groups of `width` consecutive experts."""
    return (ids[:, :, None] // width == jnp.arange(bins)).any(1)


def _overflows(ids: jax.Array, layout: DispatchSizes) -> jax.Array:
    """Whether the routing of this batch is too much for a buffer of any device: of our sizes, and those of each of
    `SLACKS`. The result is the same on each device.
    """
    count = functools.partial(jnp.sum, axis=0, dtype=jnp.int32)
    devices = count(_reached(ids, layout.devices, layout.local)).reshape(layout.node, layout.expert)
    rows = (ids[:, :, None] // layout.local == jnp.arange(layout.devices)).sum((0, 1), dtype=jnp.int32)
    nodes = count(_reached(ids, layout.node, layout.expert * layout.local))
    if layout.node > 1:
        devices = lax.psum(devices, "node")
    rows = lax.psum(rows, layout.axes)
    room = jnp.array([(layout.node_room, layout.device_room, layout.row_room), *layout.other_rooms])
    full = (jnp.stack([nodes.max(), devices.max(), rows.max()]) > room).any(1)
    devices_full: jax.Array = lax.psum(full.astype(jnp.int32), layout.axes)
    return devices_full > 0


def _gather(
    x: jax.Array, ids: jax.Array, weights: jax.Array, w: Any, compute: LocalExperts, layout: DispatchSizes
) -> jax.Array:
    """Gathers all tokens on every device and sums the contributions: for few tokens, or replicated ones."""
    if layout.cut:
        x, ids, weights = (lax.all_gather(a, layout.axes, tiled=True) for a in (x, ids, weights))
    here = _here(ids, lax.axis_index(layout.axes) * layout.local, layout.local)
    y = compute(x, here, jnp.where(here < layout.local, weights, 0), w, len(x) * min(layout.k, layout.local))
    total: jax.Array = lax.psum_scatter(y, layout.axes, tiled=True) if layout.cut else lax.psum(y, layout.axes)
    return total


def _here(ids: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """Returns ids relative to `first`, or `count` for those outside of [first, first + count)."""
    inside = (ids >= first) & (ids < first + count)
    return jnp.where(inside, ids - first, count)


def _exchange(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    *,
    w: Any,
    compute: LocalExperts,
    layout: DispatchSizes,
    packing: Packing | None,
) -> jax.Array:
    """Dispatches tokens to nodes and then to devices, applies the experts, and combines in reverse order."""
    hops: list[tuple[Send, jnp.dtype]] = []
    for hop in layout.hops:
        send = _plan_send(hop, ids, layout.method)
        mine = _here(send.dispatch(ids, hop.size * hop.width), lax.axis_index(hop.axis) * hop.width, hop.width)
        x, weights = _dispatch(packing, x, send), jnp.where(mine < hop.width, send.dispatch(weights, 0), 0)
        ids = mine
        hops.append((send, x.dtype))
    y = compute(x, ids, weights, w, min(layout.row_room, ids.size))
    for send, dtype in reversed(hops):
        y = _combine(packing, y, send).astype(dtype)
    return y


@dataclasses.dataclass(frozen=True)
class Hop:
    """An exchange along one mesh axis. size: of the axis. width: experts behind each position.
    room: tokens per position in a buffer.
    """

    axis: str
    size: int
    width: int
    room: int


@struct.dataclass
class Send:
    """Metadata of a hop, shared by dispatch and combine: the tokens that a device sends to each position.

    maps: the token of each row of the send buffer, and the rows of each token, as `source` and `places` of
      `parallel.rows`; None if all tokens are sent to every position.
    ragged: sizes and offsets for `ragged_all_to_all`, out and back; None for equal pieces of `room` tokens.
    """

    axis: str = struct.field(pytree_node=False)
    maps: tuple[jax.Array, jax.Array] | None
    ragged: tuple[Any, Any] | None

    @jax.named_scope("dispatch")
    def dispatch(self, a: jax.Array, fill: Any) -> jax.Array:
        """Sends rows of `a` (tokens, X) to the positions of their experts; empty rows are `fill`."""
        if self.maps is None:
            gathered: jax.Array = lax.all_gather(a, self.axis, tiled=True)
            return gathered
        source, places = self.maps
        rows = spread(a, source, places)
        if fill != 0:
            rows = jnp.where((source < len(places))[:, None], rows, fill)
        return self._exchange(rows, fill, 0)

    @jax.named_scope("combine")
    def combine(self, y: jax.Array) -> jax.Array:
        """Sends results (size * room, X) back and sums them per token: (tokens, X), float32 or wider."""
        back = self._exchange(y, 0, 1)
        if self.maps is None:
            each = back.reshape(lax.axis_size(self.axis), -1, back.shape[-1])
            return each.sum(0, dtype=jnp.promote_types(y.dtype, jnp.float32))
        return collect(back, *self.maps)

    def _exchange(self, rows: jax.Array, fill: Any, way: int) -> jax.Array:
        if self.ragged is None:
            return _all_to_all(rows, self.axis)
        empty = jnp.full_like(rows, fill)
        received: jax.Array = lax.ragged_all_to_all(rows, empty, *self.ragged[way], axis_name=self.axis)
        return received


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(packing: Packing | None, x: jax.Array, send: Send) -> jax.Array:
    """Sends tokens (N, D), packed if requested. Their gradient returns unpacked."""
    return send.dispatch(x, 0) if packing is None else _dispatch_packed(packing, x, send, gradient=False)


def _dispatch_packed(packing: Packing, x: jax.Array, send: Send, *, gradient: bool) -> jax.Array:
    return packing.unpack(send.dispatch(packing.pack(x, gradient=gradient), 0), x.shape[1], x.dtype)


def _dispatch_backward(packing: Packing | None, saved: tuple[Send, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    send, like = saved
    return send.combine(g).astype(like.dtype), None


_dispatch.defvjp(lambda packing, x, send: (_dispatch(packing, x, send), (send, _like(x))), _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(packing: Packing | None, y: jax.Array, send: Send) -> jax.Array:
    """Returns results unpacked. Their gradient is sent like tokens."""
    return send.combine(y)


def _combine_backward(packing: Packing | None, saved: tuple[Send, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    send, like = saved
    g = g.astype(like.dtype)
    return (send.dispatch(g, 0) if packing is None else _dispatch_packed(packing, g, send, gradient=True)), None


_combine.defvjp(lambda packing, y, send: (_combine(packing, y, send), (send, _like(y))), _combine_backward)


def _like(x: jax.Array) -> jax.Array:
    """Returns an empty array of the dtype of x, which is all that the backward pass needs of it."""
    return jnp.zeros((0,), x.dtype)


def _all_to_all(a: jax.Array, axis: str) -> jax.Array:
    received: jax.Array = lax.all_to_all(a, axis, 0, 0, tiled=True)
    return received


@jax.named_scope("plan_dispatch")
def _plan_send(hop: Hop, ids: jax.Array, method: str) -> Send:
    """Plans a hop for ids (N, K) among `size * width` experts; `size * width` for none."""
    if method == "all_to_all" and hop.room >= len(ids):
        return Send(hop.axis, None, None)
    reached = _reached(ids, hop.size, hop.width)
    place = jnp.cumsum(reached, axis=0) - 1  # of a token among those that go to the same position
    starts, ragged = jnp.arange(hop.size) * hop.room, None
    if method == "ragged_all_to_all":  # pieces of exactly the tokens that are needed, end to end
        swap = functools.partial(_all_to_all, axis=hop.axis)
        sent = reached.sum(0, dtype=jnp.int32)  # to each position
        starts = jnp.cumsum(sent) - sent
        received = swap(sent)
        ends_there = jnp.cumsum(received) - received
        lands = swap(ends_there)  # where my piece begins at its receiver
        came_from = swap(starts)  # and where the pieces that I received began at their senders
        ragged = (starts, sent, lands, received), (ends_there, received, came_from, sent)
    rows = hop.size * hop.room
    places = jnp.where(reached, starts + place, rows)
    source = jnp.full((rows,), len(ids)).at[places].set(jnp.arange(len(ids))[:, None], mode="drop")
    return Send(hop.axis, (source, places), ragged)
