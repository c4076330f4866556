"""Closed forms of FLOPs against programs that are traced and counted, and against published figures."""

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.accounting.flops import (
    count_flops,
    decode_flops,
    forward_flops,
    forward_program,
    model_flops,
    recomputed_flops,
)
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.runtime import Runtime


def test_a_scan_counts_as_often_as_it_runs():
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    f = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]
    assert count_flops(f, a) == 7 * 2 * 4**3
    assert count_flops(f, a, repeat_loops=False) == 2 * 4**3


def test_a_branch_counts_as_the_one_with_most_work():
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x @ x @ x, x), a) == 7 * 2 * 4**3


def test_a_while_loop_of_products_is_refused():
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    with pytest.raises(ConfigError, match="while loop"):
        count_flops(lambda x: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ c, x), a)


@pytest.mark.parametrize("remat", ["none", "block", "paper"])
@pytest.mark.parametrize("preset", ["v3-671b", "v2-lite-16b"])
def test_training_as_written_agrees_with_closed_forms(preset, remat):
    """The traced attention is the full square, so closed forms get all keys instead of half of them."""
    config, length = ModelConfig.preset(preset), 1024
    forward, arguments = forward_program(
        config, Runtime(dtype="bfloat16", remat=remat, experts_impl="ragged"), 1, length
    )
    variables, *rest = arguments

    def loss(params, variables, *rest):
        out = forward({**variables, "params": params}, *rest)
        stats = [s for s in (out.stats, *out.mtp_stats) if s is not None]
        return sum(jnp.sum(x) for x in (out.logits, *out.mtp_logits, *(s.affinity for s in stats)))

    counted = count_flops(jax.grad(loss), variables["params"], variables, *rest) / length
    form = forward_flops(config, length, mtp=True).scaled(3, 3) + recomputed_flops(config, 2 * length, remat)
    assert counted == pytest.approx(form.total, rel=2e-3)


def test_decoding_in_absorbed_form():
    from dsv3_jax.model.cache import init_cache
    from dsv3_jax.model.transformer import DeepSeekV3

    config, context = ModelConfig.preset("v2-lite-16b"), 4096
    runtime = Runtime(dtype="bfloat16", attention_form="absorbed", experts_impl="ragged")
    model = DeepSeekV3(config, runtime)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    cache = jax.eval_shape(lambda: init_cache(config, runtime, 1, context))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    counted = count_flops(lambda v, t, c: model.apply(v, t, c, method="decode"), variables, token, cache)
    assert counted == pytest.approx(decode_flops(config, context).total, rel=2e-3)


@pytest.mark.parametrize(("preset", "published"), [("v3-671b", 250e9), ("v2-236b", 155e9)])
def test_published_flops_a_token(preset, published):
    """arXiv 2505.09343, table 2: training, sequences of 4K."""
    assert model_flops(ModelConfig.preset(preset), 4096, mtp=False).total == pytest.approx(published, rel=0.01)
