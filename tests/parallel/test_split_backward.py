"""A backward pass in two halves against `jax.vjp`'s, and what each half computes."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.parallel.pipeline import bubble, duration, pipeline_gradients
from dsv3_jax.parallel.split_backward import SplitBackward
from tests.conftest import new_rng


def layer(x, w):
    return jnp.tanh(x @ w.astype(jnp.bfloat16).astype(x.dtype)) + x


def layers(late, early, x, rest):
    """Recomputed layers, a branch with a weight whose gradient isn't late, one with weights whose gradient is."""
    *several, extra = late
    for w in several:
        x = jax.checkpoint(layer)(x, w)
    y = jax.lax.cond(rest > 0, lambda x: x @ early, lambda x: 2.0 * x, x)
    y = jax.lax.cond(rest > 1, lambda y: layer(y, extra), lambda y: y, y)
    return (y, jnp.sum(y**2)), jnp.sum(x)


def products(eqns):
    return collections.Counter(eqn.primitive.name for eqn in eqns)["dot_general"]


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_the_halves_together_are_the_backward_pass(rest):
    rng = new_rng()
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    late, early, x, rest = [draw(8, 8) for _ in range(4)], draw(8, 8), draw(5, 8), jnp.int32(rest)
    split = SplitBackward(layers, late, early, x, rest)
    (outputs, aux), kept = split.forward(late, early, x, rest)
    g = draw(5, 8), draw()
    (d_early, dx), handed_on = split.first(late, early, kept, g)
    d_late = split.second(late, early, kept, handed_on)
    expected, pull, measured = jax.vjp(lambda *a: layers(*a, rest), late, early, x, has_aux=True)
    got = d_late, d_early, dx, outputs, aux
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((*pull(g), expected, measured)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_nothing_is_computed_in_both_halves_and_no_weight_is_kept():
    """Three layers: forward again and the gradient of the input in the first half, that of weights in the second."""

    def three(late, early, x, rest):
        for w in late:
            x = jax.checkpoint(layer)(x, w)
        return x * early, ()

    rng = new_rng()
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    late, early, x = [draw(8, 8) for _ in range(3)], draw(8), draw(5, 8)
    split = SplitBackward(three, late, early, x, ())
    _, kept = split.forward(late, early, x, ())
    assert {a.shape for a in kept} == {(5, 8)}
    assert (products(split._first), products(split._second)) == (6, 3)


@pytest.mark.parametrize(("schedule", "forward"), [("zero_bubble", 3 * 5), ("1f1b", 2 * 3 * 5 - 5)])
def test_a_microbatch_passes_forward_once(schedule, forward):
    """Counted as the program runs, three stages and five microbatches; 1F1B computes all but the last stage's again."""
    stages, microbatches, counts = 3, 5, collections.Counter()

    def seen(name, x):
        def note(x):
            counts[name] += 1
            return x

        return jax.pure_callback(note, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    @jax.custom_vjp
    def product(x, w):
        return seen("forward", x @ w)

    def backward(saved, g):
        x, w = saved
        return seen("input", g @ w.T), seen("weights", x.T @ g)

    product.defvjp(lambda x, w: (product(x, w), (x, w)), backward)

    def function(own, shared, x, piece, constants, stage):
        x = jnp.where(stage == 0, piece, x)
        y = jnp.tanh(product(x, own["w"][0])) * shared
        objective = jnp.where(stage == stages - 1, jnp.sum(y**2), 0.0)
        return y, objective, objective, jnp.zeros(1)

    rng = new_rng()
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    own, shared, pieces = {"w": draw(stages, 4, 4)}, draw(4), draw(microbatches, 2, 4)
    with jax.set_mesh(make_mesh(MeshShape(stage=stages), jax.devices()[:stages])):
        run = jax.jit(
            lambda *arguments: pipeline_gradients(
                function,
                *arguments,
                (jnp.zeros((stages, 1)), ()),
                take=lambda own: own,
                dtypes={"w": "float32"},
                stages=stages,
                specs=({"w": PartitionSpec("stage")}, PartitionSpec()),
                batch=(),
                activation=jax.ShapeDtypeStruct((2, 4), jnp.float32),
                schedule=schedule,
                held=frozenset(jax.sharding.get_abstract_mesh().axis_names),
            )
        )
        d_own, d_shared, total, _ = jax.block_until_ready(run(own, shared, pieces))

    def whole(own, shared):
        x = pieces
        for w in own["w"]:
            x = jnp.tanh(x @ w) * shared
        return jnp.sum(x**2)

    expected = jax.grad(whole, (0, 1))(own, shared)
    for a, b in zip(jax.tree.leaves((d_own, d_shared)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, whole(own, shared), rtol=1e-5)
    assert counts == {"forward": forward, "input": stages * microbatches, "weights": stages * microbatches}


def test_ticks_of_zero_bubble_take_what_the_planner_says():
    """Each tick as long as the busiest stage: passes that `parallel.pipeline` names, of one unit each."""
    for stages, microbatches in [(2, 4), (4, 8), (8, 9), (16, 120)]:
        last, total = stages - 1, 0
        for t in range(microbatches + 2 * last):
            passes = ((t - s, t - 2 * last + s, t - 2 * last) for s in range(stages))
            total += max(sum(0 <= m < microbatches for m in of_stage) for of_stage in passes)
        assert total == duration("zero_bubble", stages, microbatches)
        assert np.isclose(bubble("zero_bubble", stages, microbatches), 1 - 3 * microbatches / total)
