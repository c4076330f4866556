"""The training step: the report's equations; it learns; accumulation changes nothing; moments can be bfloat16."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.training.accumulate import sum_over_pieces
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, decays, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import TrainState, init_state, make_train_step, update_bias
from tests.configs import DOUBLE, SMALL
from tests.conftest import new_rng
from tests.model import equations

# In float64, against equations 17 to 25 in NumPy and the milestones of section 4.2 -------------------------

ALPHA = 0.1  # large enough that a balance loss of the wrong size can't hide
SPARSE = dataclasses.replace(SMALL, first_k_dense_replace=0, aux_loss_alpha=ALPHA)  # two layers, both sparse
PAPER = Schedule(ScheduleConfig(steps=148, batch_size=4))  # a step is 0.1T of the report's 14.8T tokens
SEGMENTS = np.array([[1] * 9, [1] * 4 + [2] * 5, [1] * 2 + [2] * 2 + [3] * 5, [1, 2] + [3] * 7], np.int32)
TRAINED = np.arange(36).reshape(4, 9) % 7 > 0

DOUBLE_MODEL = DeepSeekV3(SPARSE, dataclasses.replace(DOUBLE, experts_impl="reference"))
DOUBLE_STEP = jax.jit(
    make_train_step(DOUBLE_MODEL, optax.sgd(1.0), PretrainingLoss(SPARSE, PAPER))
)  # SGD of rate 1: minus the gradient


def step_once(step):
    """One step from step `step`: the state before and after it, its metrics, and the rows (B, T + 1) that it took."""
    rng = new_rng()
    variables = equations.random_variables(DOUBLE_MODEL, rng)
    params = variables["params"]
    before = TrainState(jnp.int32(step), params, variables["router"], optax.sgd(1.0).init(params), jax.random.key(0))
    rows = rng.integers(0, SPARSE.vocab_size, (4, 10), np.int32)
    batch = {"tokens": rows[:, :-1], "targets": np.where(TRAINED, rows[:, 1:], -100), "segments": SEGMENTS}
    after, metrics = DOUBLE_STEP(before, batch)
    return before, after, metrics, rows


def right_objective(params, router, rows, step):
    """Section 4.2: lambda is 0.3 for the first 10T tokens, 0.1 for the remaining 4.8T."""
    mtp_weight = 0.3 if step < 100 else 0.1
    return equations.objective(params, router, rows, SPARSE, ALPHA, mtp_weight, SEGMENTS, TRAINED)


@pytest.mark.parametrize("step", [0, 99, 101, 142, 144])
def test_objective_and_bias(x64, step):
    """Gamma is 0.001 for the first 14.3T tokens, zero for the remaining 500B."""
    before, after, metrics, rows = step_once(step)
    params, router = equations.float64(before.params), equations.float64(before.router)
    total, loads, (ce, count, hits, balance) = right_objective(params, router, rows, step)
    expected = {
        "objective": total,
        "loss": ce[0] / count[0],
        "mtp_loss": SPARSE.num_nextn_predict_layers * ce[1:].mean() / count[1:].sum(),
        "mtp_accuracy": hits[1:].sum() / count[1:].sum(),
        "balance_loss": balance / len(rows),
        "learning_rate": PAPER.learning_rate(step),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert after.step == step + 1
    gamma = 0.001 if step < 143 else 0.0
    assert after.router.keys() == loads.keys() == {"moe_layers", "mtp_0", "mtp_1"}
    for name, load in loads.items():
        old, new = (jax.tree.leaves(state.router[name])[0] for state in (before, after))
        expected = np.asarray(old) + gamma * np.sign(load.mean(-1, keepdims=True) - load)
        np.testing.assert_allclose(new, expected, rtol=0, atol=1e-7)  # biases are float32
        np.testing.assert_allclose(metrics[f"load_violation/{name}"], load.max(-1) / load.mean(-1) - 1, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 101])
def test_gradient(x64, step):
    """Along random directions, against differences of the objective in NumPy."""
    before, after, metrics, rows = step_once(step)
    params, router = equations.float64(before.params), equations.float64(before.router)
    flat, rebuild = ravel_pytree(params)
    gradient = flat - ravel_pytree(equations.float64(after.params))[0]
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-6)
    objective = lambda flat: right_objective(jax.tree.map(np.asarray, rebuild(flat)), router, rows, step)[0]
    rng, small = new_rng(), 1e-4
    for _ in range(4):
        direction = rng.standard_normal(flat.size)
        direction *= small / np.linalg.norm(direction)
        difference = objective(flat + direction) - objective(flat - direction)
        limit = 1e-7 * small * np.linalg.norm(gradient)
        np.testing.assert_allclose(2 * gradient @ direction, difference, rtol=0, atol=limit)


# In float32, by itself -------------------------------------------------------------------------------------

SCHEDULE = Schedule(
    ScheduleConfig(
        steps=100, batch_size=8, warmup_steps=1, peak_learning_rate=1e-2, end_learning_rate=1e-3, bias_update_speed=0.01
    )
)


def batch_of(seed, size=8, length=12):
    row = np.random.default_rng(seed).integers(0, SMALL.vocab_size, (size, 1))
    row = (row + np.arange(length + 1)) % SMALL.vocab_size  # counting: easy to learn
    return {"tokens": row[:, :-1].astype(np.int32), "targets": row[:, 1:].astype(np.int32)}


SHALLOW = dataclasses.replace(SMALL, first_k_dense_replace=0, num_nextn_predict_layers=1)
"""Fewer kinds of layers than the equations above, to compile faster."""


@functools.cache  # a test that takes the same step doesn't trace it again
def setup(optimizer_config=OptimizerConfig(), **how):
    model = DeepSeekV3(SHALLOW, Runtime(experts_impl="blocked"))
    optimizer = make_optimizer(optimizer_config, SCHEDULE)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    return state, jax.jit(make_train_step(model, optimizer, PretrainingLoss(model.config, SCHEDULE), **how))


@pytest.mark.parametrize("moments", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_it_learns(moments):
    state, step = setup(OptimizerConfig(moments_dtype=moments))
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.ndim} == {moments}
    losses = []
    for i in range(60):
        state, metrics = step(state, batch_of(i))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5
    assert losses[-1] < 0.5
    assert float(metrics["mtp_accuracy"]) > 0.5
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.ndim} == {moments}


def test_accumulated_microbatches_equal_the_whole_batch():
    batch = batch_of(0)
    segments = np.where(np.arange(12) < np.arange(8)[:, None], 1, 2).astype(np.int32)  # uneven token counts
    batch |= {"segments": segments, "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12))}
    state, step = setup()
    pieces = setup(microbatches=4)[1]
    (a, metrics_a), (b, metrics_b) = step(state, batch), pieces(state, batch)
    chex.assert_trees_all_close(metrics_a, metrics_b, rtol=2e-5)
    chex.assert_trees_all_equal(a.router, b.router)
    # Adam's first step is a sign: compare its moments, which are the gradients.
    chex.assert_trees_all_close(a.opt_state, b.opt_state, atol=1e-6)


@pytest.mark.slow  # test_a_ramp_compiles_one_step is its short form
def test_a_batch_that_grows_takes_one_program():
    """Padding, whatever is in it, changes nothing: neither losses nor loads nor gradients."""
    state, whole = setup()
    grows = setup(microbatches=3)[1]
    for size in (2, 3, 5, 9):
        batch = batch_of(size, 9)
        padded = {"tokens": batch["tokens"], "targets": np.where(np.arange(9)[:, None] < size, batch["targets"], -100)}
        (a, expected), (b, got) = (
            whole(state, {k: v[:size] for k, v in batch.items()}),
            grows(state, padded, np.int32(size)),
        )
        chex.assert_trees_all_close(got, expected, rtol=2e-5)
        chex.assert_trees_all_equal(b.router, a.router)
        chex.assert_trees_all_close(b.opt_state, a.opt_state, atol=1e-6)
    assert grows._cache_size() == 1


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_moments_have_their_dtype_whatever_the_parameters(param_dtype, moments):
    optimizer = make_optimizer(OptimizerConfig(moments_dtype=moments), SCHEDULE)
    params = {"w": jnp.ones((3, 2), param_dtype), "norm": jnp.ones(3, param_dtype)}
    state = optimizer.init(params)
    assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {moments}
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, params), state, params)
        assert {x.dtype.name for x in jax.tree.leaves(state) if x.ndim} == {moments}
        assert {x.dtype.name for x in jax.tree.leaves(optax.apply_updates(params, updates))} == {param_dtype}


def test_gradients_of_microbatches_are_summed_in_float32():
    """Also those of bfloat16 parameters, whose own sums of 64 would be some 1% off."""
    made = jnp.asarray(new_rng().normal(size=(64, 200)) + 0.2, jnp.bfloat16)
    gradient = lambda piece, rows: ({"w": piece["made"]}, jnp.float32(1))
    total, tally = jax.jit(lambda: sum_over_pieces(gradient, ({"made": made}, jnp.zeros((64, 1))), None))()
    assert (total["w"].dtype, float(tally)) == (jnp.float32, 64)
    np.testing.assert_allclose(total["w"], np.float64(made).sum(0), rtol=1e-5, atol=1e-5)
    assert sum_over_pieces(gradient, ({"made": made[:1]}, jnp.zeros((1, 1))), None)[0]["w"].dtype == jnp.float32


def test_bias_rises_for_the_idle_expert_and_falls_for_the_busy_one():
    router = {"moe_layers": {"mlp": {"gate": {"e_score_correction_bias": jnp.zeros((2, 4))}}}}
    load = {"moe_layers": jnp.array([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])}
    moved = jax.tree.leaves(update_bias(router, load, jnp.float32(0.1)))[0]
    np.testing.assert_allclose(moved, [[-0.1, 0.1, 0, 0], [0, 0, 0, 0]], atol=1e-7)


def test_a_step_moves_every_layers_bias_by_the_sign_of_its_load():
    state, step = setup()
    after, _ = step(state, batch_of(3))
    moved = {float(v) for x in jax.tree.leaves(after.router) for v in np.unique(np.round(np.float64(x), 6))}
    assert moved <= {-0.01, 0.0, 0.01}
    for name in ("moe_layers", "mtp_0"):  # the further-token module balances too
        assert float(jnp.abs(jax.tree.leaves(after.router[name])[0]).max()) == pytest.approx(0.01)


def test_balancing_evens_a_skewed_router():
    """From a bias that sends all to one group, updates by load alone bring the load back."""
    state, step = setup()
    skew = jax.tree.map(lambda b: b + jnp.array([1.0, 1.0, 0.0, 0.0]), state.router)
    state = state.replace(router=skew)
    first = last = None
    for i in range(60):
        state, metrics = step(state, batch_of(i))
        last = float(np.max(metrics["load_violation/moe_layers"]))
        first = last if first is None else first
    assert first == pytest.approx(1.0)  # two of four experts take everything
    assert last < 0.8


def test_norm_scales_are_not_decayed():
    state, _ = setup()
    mask = decays(state.params)
    flat = {"/".join(p.key for p in path): v for path, v in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name.split("/")[-1] for name, v in flat.items() if not v} == {
        "norm", "enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm"
    }  # fmt: skip


def test_optimizer_is_adamw():
    """Against optax's own AdamW at a constant rate."""
    flat = Schedule(
        ScheduleConfig(
            steps=10,
            batch_size=1,
            warmup_steps=1,
            peak_learning_rate=1e-2,
            constant_until=1,
            decay_until=1,
            tail_from=1,
        )
    )
    config = OptimizerConfig(clip_norm=0.5)
    ours = make_optimizer(config, flat)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decays)
    )
    params = {"w": jnp.arange(6.0).reshape(2, 3), "norm": jnp.ones(3)}
    a, b, sa, sb = params, params, ours.init(params), theirs.init(params)
    for i in range(5):
        grads = jax.tree.map(lambda x, i=i: jnp.cos(x * (i + 1)), params)
        ua, sa = ours.update(grads, sa, a)
        ub, sb = theirs.update(grads, sb, b)
        a, b = optax.apply_updates(a, ua), optax.apply_updates(b, ub)
    chex.assert_trees_all_close(a, b, rtol=1e-6)


def test_bad_microbatches_are_named():
    state, step = setup(microbatches=3)
    with pytest.raises(ValueError, match="8 sequences can't be cut into 3 microbatches"):
        step(state, batch_of(0))


def test_runtime_doesnt_change_the_state():
    optimizer = make_optimizer(OptimizerConfig(), SCHEDULE)
    build = lambda r: jax.jit(lambda k: init_state(DeepSeekV3(SHALLOW, r), optimizer, k))(jax.random.key(0))
    chex.assert_trees_all_equal(
        build(Runtime()).params, build(dataclasses.replace(Runtime(), dtype="bfloat16", remat="paper")).params
    )


def test_a_profile_reads_like_the_model():
    """Every block, seam and phase of the step gives its name to the operations in it."""
    runtime, mesh = Runtime(sharding="fsdp_ep"), make_mesh(MeshShape(fsdp=2, expert=4))
    schedule = Schedule(ScheduleConfig(steps=10, batch_size=8))
    model, optimizer = DeepSeekV3(SHALLOW, runtime), make_optimizer(OptimizerConfig(), schedule)
    state = jax.eval_shape(lambda key: init_state(model, optimizer, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(SHALLOW, schedule)))
    with jax.set_mesh(mesh):
        text = step.lower(state, {"tokens": tokens, "targets": tokens}).as_text(debug_info=True)
    paths = [set(re.split(r"[/()]", path)) for path in re.findall(r'loc\("([^"]*/[^"]*)"', text)]
    for name in ("model_inputs", "loss", "cross_entropy", "optimizer", "router_bias", "metrics"):
        assert any(name in path for path in paths), name
    attention = ("q_a_proj", "k_b_proj", "o_proj", "rms_norm", "rope", "attend", "all_gather_weight")
    for block, seams in {"self_attn": attention, "mlp": ("gate", "select_experts", "shared_experts")}.items():
        for seam in seams:
            for stack in ("moe_layers", "mtp_0"):
                assert any({stack, block, seam} <= path for path in paths), (stack, block, seam)
    apart = ("plan_dispatch", "dispatch", "grouped_swiglu", "combine")  # in a shard_map, which is lowered apart
    for name in apart:
        assert f"/{name}/" in text, name


def test_the_learning_rate_after_a_skipped_step_is_that_of_the_step():
    """In a warm-up, where it rises at every step, as the metric says."""
    schedule = Schedule(ScheduleConfig(steps=100, batch_size=2, warmup_steps=10))
    model = DeepSeekV3(dataclasses.replace(SMALL, num_hidden_layers=1, num_nextn_predict_layers=0))
    optimizer = optax.scale_by_learning_rate(schedule.learning_rate)
    step = jax.jit(make_train_step(model, optimizer, PretrainingLoss(model.config, schedule)))
    state = jax.jit(lambda: init_state(model, optimizer, jax.random.key(0)))()
    batch = {"tokens": jnp.arange(8).reshape(2, 4), "targets": jnp.arange(1, 9).reshape(2, 4)}
    broken = state.replace(params=state.params | {"lm_head": state.params["lm_head"] * jnp.nan})
    after, metrics = step(broken, batch)
    assert metrics["skipped"] == 1
    trained, metrics = step(after.replace(params=state.params), batch)
    assert metrics["skipped"] == 0
    moved = optax.global_norm(jax.tree.map(jnp.subtract, trained.params, state.params))
    np.testing.assert_allclose(moved, metrics["learning_rate"] * metrics["grad_norm"], rtol=1e-3)
