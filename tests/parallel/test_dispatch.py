"""Expert dispatch against every expert on every token: whatever the routing, nothing is dropped and nothing hangs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.moe import ExpertWeights, experts, experts_and_exchanges, experts_reference
from dsv3_jax.parallel.dispatch import DispatchSizes
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.rules import rules_of
from dsv3_jax.parallel.sharding import LogicalSharding
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.step import dispatch_metrics

E, K, D, F, B, T = 16, 4, 8, 8, 8, 6
CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2),
)


def problem(routing, batch=B, tokens=T):
    keys = jax.random.split(jax.random.key(0), 6)
    draw = lambda key, *shape: jax.random.normal(key, shape) / 3
    w = ExpertWeights(draw(keys[0], E, D, F), draw(keys[1], E, D, F), draw(keys[2], E, F, D))
    x = draw(keys[3], batch, tokens, D)
    ids = jnp.argsort(jax.random.uniform(keys[4], (batch, tokens, E)))[..., :K].astype(jnp.int32)
    if routing == "same experts":
        ids = jnp.broadcast_to(jnp.array([5, 4, 7, 6], jnp.int32), ids.shape)  # all on one or two devices
    elif routing == "ends":
        ids = jnp.broadcast_to(jnp.array([0, 15, 1, 14], jnp.int32), ids.shape)  # none on the devices between
    return x, ids, jax.random.uniform(keys[5], ids.shape), w


def value_and_gradients(f):
    loss = lambda x, ids, weights, w: jnp.sum(jnp.sin(f(x, ids, weights, w)))
    return jax.jit(jax.value_and_grad(loss, (0, 2, 3)))


def reference(x, ids, weights, w):
    flat = lambda a: a.reshape(-1, a.shape[-1])
    return experts_reference(flat(x), flat(ids), flat(weights), w).reshape(x.shape)


reference_and_gradients = value_and_gradients(reference)


def check(shape, runtime, *routings):
    """Compares one program, whatever the routing, with the reference."""
    run = Runtime(**{"sharding": "fsdp_ep", "experts_impl": "blocked"} | runtime)
    ours = value_and_gradients(lambda *a: experts(*a, CONFIG, run))
    for routing in routings:
        arguments = problem(routing)
        expected = reference_and_gradients(*arguments)
        with jax.set_mesh(make_mesh(MeshShape.parse(shape))):
            got = ours(*arguments)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=1e-5, err_msg=routing)
    assert ours._cache_size() == 1


@pytest.mark.parametrize(
    ("shape", "groups", "tokens", "rooms"),
    [
        # Tokens reach 2 of 2 nodes: 1.5 times all of them, but there are no more than 100. K = 4 copies go to 4 devices
        # of a node: 100 each. 400 rows.
        ("node=2,expert=4", (4, 2), 100, (100, 150, 600)),
        ("node=2,expert=4", (4, 1), 100, (75, 150, 600)),  # one group lies in one node
        ("node=8", (4, 2), 100, (75, 600, 600)),  # groups are larger than nodes: K = 4 of 8
        ("expert=8", (4, 2), 100, (100, 75, 600)),  # 4 of 8 devices
        ("node=2,expert=4", (4, 2), 1, (1, 2, 16)),  # the worst routing of one token per device: 8 devices send 2 rows
        ("expert=2", (4, 2), 100, (100, 100, 600)),  # both devices get all tokens
    ],
)
def test_buffers_hold_what_even_routing_sends_and_half_as_much_again(shape, groups, tokens, rooms):
    """Counted by hand for 16 experts in 4 groups, 4 a token; and a round is as large as the worst routing allows."""
    config = dataclasses.replace(CONFIG, n_group=groups[0], topk_group=groups[1])
    runtime = Runtime(sharding="fsdp_ep", dispatch_slack=1.5)
    mesh = make_mesh(MeshShape.parse(shape), jax.devices()[: 2 if shape == "expert=2" else 8])
    local = E // mesh.size
    sharding = LogicalSharding(rules_of(runtime), mesh.abstract_mesh)
    layout = DispatchSizes.of(config, runtime, sharding, tokens, K, local)
    assert (layout.node_room, layout.device_room, layout.row_room) == rooms
    most = min(K, local)  # experts of a token on one device
    fits = lambda n: np.less_equal([n, n * layout.node, n * mesh.size * most], rooms).all()
    assert 0 < layout.round_tokens <= tokens
    assert fits(layout.round_tokens)
    assert not fits(layout.round_tokens + 1)


@pytest.mark.parametrize("shape", ["expert=8", "node=2,expert=4"])
def test_full_buffers_need_no_rounds(shape, monkeypatch):
    """Without slack, of a routing so even that every buffer is full to its last row. In rounds, here, all is NaN."""
    x, _, weights, w = problem("even")
    token = np.arange(B * T).reshape(B, T, 1)
    ids = jnp.asarray(
        (token % 2 + np.arange(0, 8, 2)) * 2 + token % 4 // 2, jnp.int32
    )  # an expert of every other device
    expected = reference(x, ids, weights, w)
    monkeypatch.setattr(jax.lax, "scan", lambda _, init, xs: (init, jnp.full_like(xs[0], jnp.nan)))
    run = Runtime(sharding="fsdp_ep", experts_impl="reference", dispatch_slack=1.0)
    with jax.set_mesh(make_mesh(MeshShape.parse(shape))):
        got = jax.jit(lambda *a: experts(*a, CONFIG, run))(x, ids, weights, w)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "runtime"),
    [
        ("expert=8", {"dispatch_slack": 1.0}),
        ("node=2,expert=4", {}),
        ("node=8", {}),
        ("fsdp=4,expert=2", {}),
        ("expert=4,tensor=2", {"dispatch": "all_gather"}),
        ("node=2,expert=4", {"sharding": "ep_tp"}),
    ],
)
def test_even_and_uneven_routing(shape, runtime):
    check(shape, runtime, "spread", "same experts", "ends")


def test_one_token_where_tokens_are_not_cut():
    x, ids, weights, w = problem("spread", batch=1, tokens=1)
    run = Runtime(sharding="ep_tp")
    with jax.set_mesh(make_mesh(MeshShape(node=2, expert=2, tensor=2))):
        got = jax.jit(lambda *a: experts(*a, CONFIG, run))(x, ids, weights, w)
    np.testing.assert_allclose(got, reference(x, ids, weights, w), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("busy", "slack", "share", "needed"),
    # Of 12 tokens a device, these send all 4 choices to one device, and the others one to each of 4 devices: of its
    # 48 rows by even routing, the busiest device gets 48 + 4 * 3 for each token of a device that is so.
    [(0, 1.0, 0, 1.2), (1, None, 1, 1.5), (3, 2.0, 0, 2.0), (12, 1.0, 1, 4.0)],
)
def test_it_is_counted_which_slack_would_have_sufficed(busy, slack, share, needed):
    x, _, weights, w = problem("spread")
    spread, together = jnp.array([0, 4, 8, 12], jnp.int32), jnp.arange(4, dtype=jnp.int32)
    ids = jnp.where((jnp.arange(B * T) % 12 < busy)[:, None], together, spread).reshape(B, T, K)
    run = Runtime(sharding="fsdp_ep", experts_impl="blocked", dispatch_slack=slack)
    mesh = make_mesh(MeshShape(expert=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *a: experts_and_exchanges(*a, CONFIG, run)[1])(x, ids, weights, w)
    assert found.shape[:2] == (4, 1)
    counts = jnp.append(found.sum((0, 1)), 4.0)
    metrics = {name: float(value) for name, value in dispatch_metrics(counts).items()}
    assert metrics == pytest.approx({"dispatch_in_rounds": share, "dispatch_slack_needed": needed})


def test_what_does_not_divide_is_named():
    with jax.set_mesh(make_mesh(MeshShape(expert=8))):
        with pytest.raises(ConfigError, match=r"the tokens of a batch \(1, 1, 8\): its 'batch' of 1 doesn't divide"):
            experts(*problem("spread", batch=1, tokens=1), CONFIG, Runtime(sharding="fsdp_ep"))
        odd = dataclasses.replace(CONFIG, n_routed_experts=12)
        x, ids, weights, w = problem("spread")
        few = ExpertWeights(*(a[:12] for a in w))
        with pytest.raises(ConfigError, match=r"experts/gate_proj \(12, 8, 8\): its 'experts' of 12 doesn't divide"):
            experts(x, ids, weights, few, odd, Runtime(sharding="fsdp_ep"))


def test_ragged_exchange_lowers_for_accelerators():
    """XLA has no ragged all-to-all for CPUs; elsewhere the exchange is one."""
    run = Runtime(sharding="fsdp_ep", dispatch="ragged_all_to_all")
    with jax.set_mesh(make_mesh(MeshShape(node=2, expert=4))):
        text = (
            jax.jit(lambda *a: experts(*a, CONFIG, run))
            .trace(*problem("spread"))
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )
    assert "ragged_all_to_all" in text


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its definition, from all devices' arrays: rows that nobody expects are lost."""
    here, parts = jax.lax.axis_index(axis_name), (operand, input_offsets, send_sizes, output_offsets)
    # In one collective: eight devices of a CPU with few cores can block each other in several at once.
    together = jax.lax.all_gather(jnp.concatenate([a.ravel().astype(jnp.float32) for a in parts]), axis_name)
    cuts = np.cumsum([a.size for a in parts])[:-1]
    row = jnp.arange(len(output))[:, None]
    for j, device in enumerate(together):
        sent, begin, size, lands = (
            a.reshape(like.shape).astype(like.dtype) for a, like in zip(jnp.split(device, cuts), parts, strict=True)
        )
        place = row - lands[here]
        mine = (place >= 0) & (place < jnp.minimum(size[here], recv_sizes[j]))
        output = jnp.where(mine, jnp.take(sent, begin[here] + place[:, 0], axis=0, mode="clip"), output)
    return output


@pytest.mark.parametrize("shape", [pytest.param("expert=8", marks=pytest.mark.slow), "node=2,expert=4"])
def test_ragged_exchange(shape, monkeypatch):
    """XLA has no ragged all-to-all for CPUs: here it is made of all-gathers."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    check(shape, {"dispatch": "ragged_all_to_all"}, "spread", "ends")
