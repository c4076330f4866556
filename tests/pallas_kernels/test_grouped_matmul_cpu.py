"""The loop over tiles against one masked product a group, in double precision: any sizes, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from tests.conftest import new_rng

D, F = 6, 5
sizes = st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 130]), min_size=1, max_size=5)


def problem(group_sizes, unused):
    rows, groups = max(1, sum(group_sizes) + unused), len(group_sizes)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    matrices = draw(groups, D, F), draw(groups, D, F), draw(groups, F, D)
    return draw(rows, D), *matrices, draw(rows, 1), jnp.asarray(group_sizes)


def values_and_gradients(f, *arrays):
    loss = lambda *a: jnp.sum(jnp.sin(f(*a)))
    return f(*arrays), jax.grad(loss, tuple(range(len(arrays))))(*arrays)


@pytest.mark.parametrize("what", ["product", "experts"])
@settings(max_examples=6)
@given(group_sizes=sizes, unused=st.sampled_from([0, 1, 70]))
@example(group_sizes=[0, 0], unused=0)
@example(group_sizes=[5], unused=2)
def test_any_group_sizes(what, group_sizes, unused):
    with jax.enable_x64(True):
        x, gate, up, down, factors, counts = problem(group_sizes, unused)
        if what == "product":
            f = lambda name: lambda x, w: grouped_matmul(x, w, counts, implementation=name)
            arrays = x, gate
        else:
            f = lambda name: lambda *a: grouped_swiglu(*a, counts, implementation=name)
            arrays = x, gate, up, down, factors
        got, expected = (values_and_gradients(f(name), *arrays) for name in ("blocked", "reference"))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_experts_may_be_some_of_more():
    with jax.enable_x64(True):
        x, gate, up, down, factors, counts = problem([3, 0, 65], unused=1)
        around = lambda w: jnp.concatenate([w[::-1] + 1, w, w + 2])  # those of the groups are the fourth to sixth
        experts = lambda *a: grouped_swiglu(*a, counts, implementation="blocked", first=jnp.int32(3))
        some = lambda x, gate, up, down, factors: experts(x, around(gate), around(up), around(down), factors)
        alone = lambda *a: grouped_swiglu(*a, counts, implementation="blocked")
        got, expected = (values_and_gradients(f, x, gate, up, down, factors) for f in (some, alone))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, expected)


@pytest.mark.parametrize("what", ["product", "experts"])
def test_gradients_of_bfloat16_matrices_are_summed_in_float32(what):
    """Over 128 tiles. What is left is the rounding of operands and of the sum, 2^-9 at most of each."""
    rng, rows = new_rng(), 8192
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) + 0.2, jnp.bfloat16)
    x, gate, up, down, dy = draw(rows, 32), draw(1, 32, 16), draw(1, 32, 16), draw(1, 16, 32), draw(rows, 32)
    counts = jnp.array([rows], jnp.int32)
    if what == "product":
        f, arrays = lambda x, w: grouped_matmul(x, w, counts, implementation="blocked"), (x, draw(1, 32, 32))
        exact = [np.einsum("mk,mn->kn", np.float64(x), np.float64(dy))]
    else:
        one = jnp.ones((rows, 1), jnp.float32)
        f, arrays = lambda *a: grouped_swiglu(*a, one, counts, implementation="blocked"), (x, gate, up, down)
        plain = lambda x, g, u, d: (jax.nn.silu(x @ g[0]) * (x @ u[0])) @ d[0]
        exact = jax.vjp(plain, *(jnp.float32(a) for a in arrays))[1](jnp.float32(dy))[1:]
    got = jax.jit(lambda *a: jax.vjp(f, *a)[1](dy))(*arrays)[1:]
    for a, b in zip(got, exact, strict=True):
        assert np.linalg.norm(np.float64(a).squeeze() - np.float64(b).squeeze()) < 5e-3 * np.linalg.norm(np.float64(b))


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_experts_that_do_not_fit_are_refused(implementation):
    x, gate, up, down, *rest = problem([3, 2], 0)
    with pytest.raises(ValueError, match="needs one dtype"):
        grouped_swiglu(x.astype(jnp.bfloat16), gate, up, down, *rest, implementation=implementation)
    with pytest.raises(ValueError, match=r"needs \(M, K\), \(G, K, N\) and \(G,\)"):
        grouped_swiglu(x, gate, up, gate, *rest, implementation=implementation)
    with pytest.raises(ValueError, match=r"needs factors \(5, 1\), but got \(5,\)"):
        grouped_swiglu(x, gate, up, down, rest[0][:, 0], rest[1], implementation=implementation)
