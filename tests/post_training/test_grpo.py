"""GRPO's formula against float64, its batches and its edges, and a round of it with a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data import load_tokenizer
from dsv3_jax.model.transformer import DeepSeekV3, expert_load
from dsv3_jax.post_training.grpo import GRPOConfig, Rollout, experts_of, grpo, grpo_batch, token_logprobs
from dsv3_jax.post_training.losses import GRPOLoss, group_advantages
from dsv3_jax.post_training.rewards import SafeReward, arithmetic_problems, arithmetic_reward, load_reward
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.losses import IGNORE, SFTLoss, Whole, forward, loss_sums, model_inputs
from dsv3_jax.training.step import init_state, make_train_step
from tests.conftest import new_rng

CONFIG = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4),
    **dict(num_experts_per_tok=2, n_group=1, topk_group=1),
)


def batch_of(rng, rows=2, length=6):
    targets = rng.integers(0, 250, (rows, length)).astype(np.int32)
    targets[rng.random((rows, length)) < 0.4] = IGNORE
    targets[:, 3] = 7  # at least one in each row
    return {
        "tokens": rng.integers(0, 250, (rows, length)).astype(np.int32),
        "targets": targets,
        "advantages": np.repeat(rng.standard_normal((rows, 1)), length, 1),
        "old_logprobs": rng.normal(-5.5, 0.3, (rows, length)),
        "reference_logprobs": rng.normal(-5.5, 0.3, (rows, length)),
    }


@pytest.mark.parametrize("normalise", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_formula(normalise):
    """Written out by itself, token by token, in float64."""
    rng, loss = new_rng(), None
    with jax.enable_x64(True):
        model = DeepSeekV3(dataclasses.replace(CONFIG, num_nextn_predict_layers=0), Runtime("float64", "float64"))
        variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        batch = batch_of(rng)
        loss = GRPOLoss(model.config, clip_low=0.2, clip_high=0.3, kl_weight=0.05, normalise=normalise)

        def ours(params):
            inputs = model_inputs(model, batch, loss.batch_keys)
            outputs = forward(model, {**variables, "params": params}, inputs)
            tokens = jnp.sum(jnp.asarray(batch["targets"]) != IGNORE)
            return loss(outputs, inputs, Whole(jnp.int32(0), tokens, jnp.int32(2)))[0]

        def formula(params):
            logits = model.apply({**variables, "params": params}, batch["tokens"])
            rows = []
            for i in range(2):
                terms = []
                for t in range(6):
                    target = batch["targets"][i, t]
                    if target == IGNORE:
                        continue
                    logp = logits[i, t, target] - jnp.log(jnp.sum(jnp.exp(logits[i, t])))
                    r, a = jnp.exp(logp - batch["old_logprobs"][i, t]), batch["advantages"][i, t]
                    clipped = jnp.where(r < 0.8, 0.8, jnp.where(r > 1.3, 1.3, r))
                    gain = jnp.where(r * a < clipped * a, r * a, clipped * a)
                    q = jnp.exp(batch["reference_logprobs"][i, t] - logp)
                    terms.append(-(gain - 0.05 * (q - jnp.log(q) - 1)))
                rows.append(terms)
            if normalise == "token":
                return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
            return sum(sum(row) / len(row) for row in rows) / len(rows)

        expected, got = jax.jit(jax.grad(formula))(variables["params"]), jax.jit(jax.grad(ours))(variables["params"])
        assert jnp.abs(expected["lm_head"]).max() > 1e-4
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), got, expected)


def test_advantages():
    got = group_advantages([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]])
    np.testing.assert_allclose(got, [[1, -1, -1, 1], [0, 0, 0, 0]])
    assert not group_advantages([[1e8 / 3] * 7]).any()  # whose mean isn't exactly that number


def test_a_batch_trains_the_sampled_tokens_alone():
    rollouts = [Rollout([1, 2, 3], [4, 5], [-0.5, -0.7]), Rollout([6], [7], [-0.1])]
    batch = grpo_batch(rollouts, np.array([1.0, -1.0]), 6)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 0, 0], [6, 0, 0, 0, 0, 0]]
    x = IGNORE
    assert batch["targets"].tolist() == [[x, x, 4, 5, x, x], [7, x, x, x, x, x]]
    np.testing.assert_allclose(batch["old_logprobs"], [[0, 0, -0.5, -0.7, 0, 0], [-0.1, 0, 0, 0, 0, 0]])


def test_a_rewards_error_counts_as_zero_and_is_reported():
    def broken(problem, text):
        raise KeyError(text)

    safe = SafeReward(broken)
    assert safe({}, "x") == 0
    assert safe.errors == 1
    assert "KeyError" in safe.last_error
    assert SafeReward(lambda problem, text: float("nan"))({}, "") == 0
    with pytest.raises(ConfigError, match="can't be imported"):
        load_reward("no.such.thing")
    assert load_reward("dsv3_jax.post_training.rewards.arithmetic_reward") is arithmetic_reward
    problem = {"prompt": "1+1=", "answer": "2"}
    assert [arithmetic_reward(problem, text) for text in ("2", "2 apples", "22", "", "x2")] == [1, 1, 0.1, 0, 0]
    for problem in arithmetic_problems(20, seed=0):
        assert eval(problem["prompt"][:-1]) == int(problem["answer"])


@pytest.mark.slow
def test_mtp_modules_train_and_leave_the_rest_alone():
    model, rng = DeepSeekV3(CONFIG), new_rng()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    batch = {k: v for k, v in batch_of(rng).items() if k in ("tokens", "targets")}
    batch["targets"] = np.where(batch["targets"] == IGNORE, 3, batch["targets"])

    @jax.jit
    def gradient(params, weight):
        def of(params):
            inputs = model_inputs(model, batch)
            outputs = forward(model, {**variables, "params": params}, inputs, detach_mtp=True)
            sums = loss_sums(outputs, inputs, CONFIG)
            return sums.cross_entropy + weight * sums.mtp_cross_entropy

        return jax.grad(of)(params)

    without, with_mtp = gradient(variables["params"], 0.0), gradient(variables["params"], 1.0)
    for name in without:
        if name.startswith("mtp_"):
            assert optax.global_norm(with_mtp[name]) > 1e-3
        else:
            jax.tree.map(np.testing.assert_array_equal, without[name], with_mtp[name])


def test_a_round_of_it(tmp_path):
    model, optimizer = DeepSeekV3(CONFIG), optax.adam(1e-3)
    state = init_state(model, optimizer, jax.random.key(0))
    tokenizer = load_tokenizer(None)
    config = GRPOConfig(iterations=2, prompts=2, samples=4, max_new_tokens=6, length=32)
    reward = lambda problem, text: float(sum(c.islower() for c in text))
    problems = [{"prompt": "1+1="}, {"prompt": "12-3="}, {"prompt": "5+55="}]
    before = jax.tree.map(np.asarray, state.params)
    loss = GRPOLoss(CONFIG)
    for state_then, metrics in grpo(model, state, optimizer, loss, problems, reward, tokenizer, config):
        trained = state_then
        assert metrics["sampling_gap"] < 1e-3  # the log-probabilities of training are those of sampling
        assert np.isfinite(metrics["loss"])
        assert metrics["reward_errors"] == 0
    assert not np.array_equal(before["lm_head"], trained.params["lm_head"])
    state = trained

    def failing(problem, text):
        raise RuntimeError("no")

    with pytest.raises(ConfigError, match="failed on every text"):
        next(grpo(model, state, optimizer, GRPOLoss(CONFIG), problems, failing, tokenizer, config))
    short = dataclasses.replace(config, length=8)
    with pytest.raises(ConfigError, match="length is 8"):
        next(grpo(model, state, optimizer, GRPOLoss(CONFIG), problems, reward, tokenizer, short))


@pytest.mark.slow
def test_empty_texts_of_equal_reward_change_nothing():
    model, optimizer = DeepSeekV3(CONFIG), optax.adam(1e-3)
    state, tokenizer, seen = init_state(model, optimizer, jax.random.key(0)), load_tokenizer(None), []
    config = GRPOConfig(iterations=1, prompts=2, samples=2, max_new_tokens=4, length=16, epochs=2)  # experts replayed
    before = jax.tree.map(np.asarray, state.params)
    reward = lambda problem, text: float(not seen.append(text))
    how = dict(end_ids=range(CONFIG.vocab_size))  # the first token ends a text
    rounds = grpo(
        model, state, optimizer, GRPOLoss(CONFIG, mtp_weight=0), [{"prompt": "a"}], reward, tokenizer, config, **how
    )
    ((after, metrics),) = rounds
    assert seen == [""] * 4
    assert metrics["groups_without_signal"] == 1
    assert metrics["length"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after.params))


def test_tokens_are_trained_at_the_experts_of_sampling():
    """After the gate has changed, a batch with the experts of before is still sent to them."""
    model, rng = DeepSeekV3(CONFIG), new_rng()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    batch = {k: v for k, v in batch_of(rng, 4, 8).items() if k in ("tokens", "targets")}
    experts = experts_of(model, variables, batch)
    moved = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), variables)
    run = jax.jit(lambda v, b: expert_load(forward(model, v, model_inputs(model, b))))
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert not same(run(moved, batch), run(variables, batch))
    assert same(run(moved, batch | {"experts": experts}), run(variables, batch))
    halves = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch | {"experts": experts}) for i in range(2)]
    parts = [run(moved, half) for half in halves]
    assert same(jax.tree.map(lambda a, b: a + b, *parts), run(variables, batch))
    assert same(experts_of(model, moved, batch | {"experts": experts}), experts_of(model, moved, batch))


@pytest.mark.slow
def test_fine_tuning_learns_what_has_a_target():
    model, optimizer = DeepSeekV3(CONFIG), optax.adam(1e-2)
    state = init_state(model, optimizer, jax.random.key(0))
    rollouts = [Rollout([1, 2, 3], [4, 5, 6], [0, 0, 0])] * 2
    batch = {k: jnp.asarray(v) for k, v in grpo_batch(rollouts, np.zeros(2), 8).items() if k in ("tokens", "targets")}
    step = jax.jit(make_train_step(model, optimizer, SFTLoss(CONFIG)))
    first = float(token_logprobs(model, state.variables, batch).sum())
    for _ in range(20):
        state, metrics = step(state, batch)
    assert float(token_logprobs(model, state.variables, batch).sum()) > first + 10
    assert metrics["loss"] < 2
