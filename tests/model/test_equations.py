"""The model in float64 against the report's equations in NumPy. Frequencies of RoPE are float32: hence 1e-6."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from dsv3_jax import DeepSeekV3, Runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.model.cache import init_cache
from tests.configs import SMALL
from tests.conftest import new_rng
from tests.model import equations

DOUBLE = dict(dtype="float64", param_dtype="float64")
V3 = dataclasses.replace(
    SMALL, num_hidden_layers=3, n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=3, n_shared_experts=2
)
V2 = dict(
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    n_group=2,
    topk_group=1,
    norm_topk_prob=False,
    num_nextn_predict_layers=0,
)


@pytest.mark.parametrize(
    ("change", "runtime"),
    [
        ({}, {}),
        ({"n_group": 1, "topk_group": 1, "n_shared_experts": 0}, {"experts_impl": "blocked"}),
        (V2 | {"q_lora_rank": None}, {"attention_form": "absorbed", "experts_impl": "reference"}),
        ({"num_hidden_layers": 1, "rms_norm_eps": 1e-2}, {"remat": "paper", "interleave": 2}),
        ({"first_k_dense_replace": 0}, {"remat": "block"}),
    ],
    ids=["v3", "no groups, no shared experts", "v2", "one dense layer", "no dense layer"],
)
def test_the_model_is_the_equations(x64, change, runtime):
    config = dataclasses.replace(V3, **change)
    model, rng, depths = DeepSeekV3(config, Runtime(**DOUBLE, **runtime)), new_rng(), config.num_nextn_predict_layers
    variables = equations.random_variables(model, rng)
    rows = rng.integers(0, config.vocab_size, (2, 10 + depths))
    tokens, *further = (rows[:, k : k + 10] for k in range(depths + 1))
    segments = np.array([[1] * 10, [1] * 4 + [2] * 6])
    positions = np.array([np.arange(10) + 3, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    forward = lambda v: model.apply(v, tokens, further, positions=positions, segments=segments, method="forward")
    out = jax.jit(forward)(variables)
    trees = equations.float64(variables["params"]), equations.float64(variables.get("router", {}))
    for b in range(2):
        ahead = [f[b] for f in further]
        logits, routing = equations.forward(*trees, tokens[b], ahead, config, positions[b], segments[b])
        for got, expected in zip((out.logits, *out.mtp_logits), logits, strict=True):
            np.testing.assert_allclose(got.array()[b], expected, rtol=1e-6, atol=1e-6)
        stats = {} if out.stats is None else {"moe_layers": out.stats}
        stats |= {f"mtp_{k}": jax.tree.map(lambda a: a[None], s) for k, s in enumerate(out.mtp_stats)}
        assert stats.keys() == routing.keys()
        for name, (loads, balance) in routing.items():
            np.testing.assert_array_equal(stats[name].load[:, b], loads)
            f_p = np.asarray(stats[name].fraction[:, b] * stats[name].affinity[:, b]).sum(-1)
            np.testing.assert_allclose(f_p, balance, rtol=1e-6)


def test_the_ends_of_a_pipeline_are_the_equations(x64):
    """The first and last stage, with no sparse layer between them."""
    config = dataclasses.replace(V3, num_hidden_layers=1, first_k_dense_replace=1)
    model, rng = DeepSeekV3(config, Runtime(**DOUBLE)), new_rng()
    variables = equations.random_variables(model, rng)
    trees = equations.float64(variables["params"]), equations.float64(variables["router"])
    tokens, *further = (rng.integers(0, config.vocab_size, (2, 6)) for _ in range(3))
    begin = lambda v: model.apply(v, tokens, method="first_stage")
    out = jax.jit(lambda v: model.apply(v, begin(v), further, method="last_stage"))(variables)
    assert out.stats is None
    for b in range(2):
        logits, routing = equations.forward(*trees, tokens[b], [f[b] for f in further], config)
        for got, expected in zip((out.logits, *out.mtp_logits), logits, strict=True):
            np.testing.assert_allclose(got.array()[b], expected, rtol=1e-6, atol=1e-6)
        for k, stats in enumerate(out.mtp_stats):
            np.testing.assert_array_equal(stats.load[b], routing[f"mtp_{k}"][0][0])
    sparse = DeepSeekV3(dataclasses.replace(config, first_k_dense_replace=0), Runtime(**DOUBLE))
    embedded = sparse.apply(variables, tokens, method="first_stage")
    np.testing.assert_array_equal(embedded, variables["params"]["embed_tokens"][tokens])


def test_remat_keeps_what_its_name_says():
    """Saved activations of a stack of layers: `block` their inputs alone, `paper` more, `none` still more."""
    config = dataclasses.replace(SMALL, num_hidden_layers=4, num_nextn_predict_layers=0)  # three layers are sparse
    tokens = jax.ShapeDtypeStruct((2, 7), np.int32)

    def kept(remat):
        model = DeepSeekV3(config, Runtime(remat=remat, experts_impl="reference"))
        variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        parameters = {x.shape for x in jax.tree.leaves(variables)}
        loss = lambda p, t: model.apply(variables | {"params": p}, t)
        backward = jax.eval_shape(lambda p, t: jax.vjp(lambda p: loss(p, t), p)[1], variables["params"], tokens)
        return [x.shape for x in jax.tree.leaves(backward) if x.shape[:1] == (3,) and x.shape not in parameters]

    block, paper, none = map(kept, ("block", "paper", "none"))
    assert block == [(3, 2, 7, config.hidden_size)]
    assert {math.prod(shape[2:]) for shape in paper} >= {7 * config.q_lora_rank, 7 * 2 * config.v_head_dim}
    assert len(block) < len(paper) < len(none)


def test_interleaving_cuts_batches_of_training_and_none_of_decoding():
    model = DeepSeekV3(V3, Runtime(interleave=2))
    tokens = jax.ShapeDtypeStruct((3, 4), np.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)  # of any batch
    with pytest.raises(ConfigError, match=r"runtime\.interleave is 2: it doesn't divide the 3 sequences"):
        jax.eval_shape(model.apply, variables, tokens)
    cache = jax.eval_shape(lambda: init_cache(V3, model.runtime, 3, 8))
    logits, _ = jax.eval_shape(lambda *a: model.apply(*a, method="decode"), variables, tokens, cache)
    assert logits.shape == (3, 4, V3.vocab_size)
