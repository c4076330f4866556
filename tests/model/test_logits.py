"""Cross entropy piece by piece against all logits at once, on one device and with the vocabulary cut over several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import DeepSeekV3
from dsv3_jax.model import logits
from dsv3_jax.model.logits import Logits, cross_entropy
from dsv3_jax.parallel.mesh import MeshShape, make_mesh
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.step import init_state, make_train_step
from tests.configs import SCHEDULE, SMALL
from tests.conftest import new_rng

B, T, D, V = 4, 6, 8, 40


@pytest.fixture
def small_pieces(monkeypatch):
    """Seven pieces of four tokens each for 24 tokens of one device, the last one filled up."""
    monkeypatch.setattr(logits, "PIECE", 150)


def test_cross_entropy_is_minus_log_probability():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5)) * 3
    targets = jnp.array([[0, 1, 2], [4, 3, 0]])
    expected = -np.log(np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(targets)[..., None], -1))[
        ..., 0
    ]
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5)


def problem(dtype):
    rng = new_rng()
    targets = rng.integers(0, V, (B, T))
    targets[0, 2], targets[1, 5], targets[3, 0] = -100, V, 0
    hidden, head, weights = rng.normal(0, 1, (B, T, D)), rng.normal(0, 1, (D, V)), rng.random((B, T))
    hidden[2, 3] = head[:, targets[2, 3]]  # predicted right
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), jnp.asarray(targets, jnp.int32), jnp.asarray(weights)


def weighted(hidden, head, targets, weights, runtime=Runtime()):
    nll, correct = Logits(hidden, head, runtime).cross_entropy(targets)
    there = (targets >= 0) & (targets < V)
    return jnp.sum(jnp.where(there, nll * weights, 0)), (nll, correct & there)


def summed(hidden, head, targets, weights, runtime=Runtime()):
    """The sum over some tokens, whose gradient is computed with it."""
    there = (targets >= 0) & (targets < V)
    total, correct = Logits(hidden, head, runtime).cross_entropy_sum(targets, there & (weights > 0.3))
    return total / 7, correct & there


def summed_written_out(hidden, head, targets, weights):
    weights = (weights > 0.3).astype(hidden.dtype) / 7
    total, (_, correct) = written_out(hidden, head, targets, weights)
    return total, correct


def written_out(hidden, head, targets, weights):
    nll, there = cross_entropy(hidden @ head, targets), (targets >= 0) & (targets < V)
    correct = ((hidden @ head).argmax(-1) == targets) & there
    return jnp.sum(jnp.where(there, nll * weights, 0)), (nll, correct)


def check(got, expected, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.nanmax(jnp.abs(b.astype(float)))))


gradients = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)


both = pytest.mark.parametrize(
    ("function", "expected"), [(weighted, written_out), (summed, summed_written_out)], ids=["each", "sum"]
)


@both
def test_pieces_in_float64(x64, small_pieces, function, expected):
    arrays = problem(jnp.float64)
    check(jax.jit(gradients(function))(*arrays), gradients(expected)(*arrays), 1e-12)


@both
def test_pieces_in_float32(small_pieces, function, expected):
    arrays = problem(jnp.float32)
    check(jax.jit(gradients(function))(*arrays), gradients(expected)(*arrays), 1e-6)
    np.testing.assert_allclose(jax.jit(function)(*arrays)[0], expected(*arrays)[0], rtol=1e-6)


@both
def test_the_gradient_of_the_head_is_a_float32_sum(small_pieces, function, expected):
    """In bfloat16, a sum over 4096 tokens in pieces is rounded once."""
    rng = new_rng()
    hidden, head = (jnp.asarray(rng.normal(0, 1, s), jnp.bfloat16) for s in ((1, 4096, D), (D, V)))
    arguments = hidden, head, jnp.asarray(rng.integers(0, V, (1, 4096)), jnp.int32), jnp.ones((1, 4096))
    got = jax.jit(gradients(function))(*arguments)[1][1]
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)
    exact = gradients(expected)(hidden, head, *arguments[2:])[1][1]
    assert float(jnp.linalg.norm(got.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)) < 4e-3


@both
@pytest.mark.parametrize("shape", ["fsdp=2,tensor=2,context=2", "tensor=8", "fsdp=4,tensor=2"])
def test_a_vocabulary_cut_over_devices(shape, function, expected, small_pieces, monkeypatch):
    monkeypatch.setattr(logits, "PIECE", 30)
    runtime, arrays = Runtime(sharding="fsdp"), problem(jnp.float32)
    with jax.set_mesh(mesh := make_mesh(MeshShape.parse(shape))):
        on_mesh = jax.jit(gradients(functools.partial(function, runtime=runtime)))
        specs = P(("fsdp",), "context", None), P(None, "tensor"), P(("fsdp",), "context"), P(("fsdp",), "context")
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]
        program = on_mesh.lower(*placed).compile()
        check(program(*placed), gradients(expected)(*arrays), 1e-6)
        assert "all-to-all" not in program.as_text()
        if "fsdp" not in shape:
            assert "all-gather" not in program.as_text()


def test_inside_a_shard_map(small_pieces):
    """As a pipeline's last stage has it: the sequences are one device's, the vocabulary is whole."""
    runtime, arrays = Runtime(sharding="fsdp"), problem(jnp.float32)
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, tensor=2))):

        def on_device(*arrays):
            (total, aux), (d_hidden, d_head) = gradients(functools.partial(weighted, runtime=runtime))(*arrays)
            return (jax.lax.psum(total, "fsdp"), aux), (d_hidden, jax.lax.psum(d_head, "fsdp"))

        rows, whole = P("fsdp"), P()
        specs = dict(in_specs=(rows, whole, rows, rows), out_specs=((whole, rows), (rows, whole)), check_vma=False)
        got = jax.jit(jax.shard_map(on_device, **specs))(*arrays)
    check(got, gradients(written_out)(*arrays), 1e-6)


def test_a_training_step_never_has_all_logits(small_pieces):
    """Neither for the next token nor for those of multi-token prediction."""
    model = DeepSeekV3(SMALL)
    optimizer = make_optimizer(OptimizerConfig(), SCHEDULE)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((3, 23), jnp.int32)
    step = make_train_step(model, optimizer, PretrainingLoss(SMALL, SCHEDULE))
    program = str(jax.make_jaxpr(step)(state, {"tokens": tokens, "targets": tokens}))
    assert "[3,23,17]" not in program
    assert "[69,17]" not in program
    assert "[9,17]" in program  # a piece: 8 of 9 tokens each
