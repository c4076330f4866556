"""The seams from outside: a weight, a loss and a cache layout are each added here, without a change to the packages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec

from dsv3_jax import DeepSeekV3, ModelConfig, Runtime
from dsv3_jax.model.cache import Cache, Keys, init_cache
from dsv3_jax.model.linear import linear_weight, multiply
from dsv3_jax.model.transformer import parameter_axes
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.losses import Loss, PretrainingLoss
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import init_state, make_train_step
from tests.conftest import new_rng

SMALL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2),
    **dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    num_nextn_predict_layers=0,
)
DENSE = dataclasses.replace(SMALL, num_hidden_layers=1)
SCHEDULE = Schedule(ScheduleConfig(steps=10, batch_size=8, warmup_steps=1))


def batch_of(rng):
    row = rng.integers(0, 32, (8, 9), np.int32)
    return {"tokens": row[:, :-1], "targets": row[:, 1:]}


class WithAdapter(DeepSeekV3):
    """A model with one more weight, between the last norm and the head."""

    def setup(self):
        super().setup()
        self.adapter = linear_weight(self, "adapter", (16, 16), ("embed", None))

    def _head(self, hidden):
        return super()._head(hidden + multiply(hidden, self.adapter))


def test_a_weight(tmp_path):
    """It is declared in its layer, and then trained, sharded and saved like the others."""
    model = WithAdapter(DENSE, Runtime(sharding="fsdp"))
    placement = Placement(MeshShape(fsdp=8), model.runtime, parameter_axes(model))
    state = placement.jit_init(lambda key: init_state(model, optax.sgd(1.0), key))(jax.random.key(0))
    assert state.params["adapter"].sharding.spec == PartitionSpec(("fsdp",), None)
    before = np.asarray(state.params["adapter"])
    step = placement.jit_step(make_train_step(model, optax.sgd(1.0), PretrainingLoss(DENSE, SCHEDULE)), state)
    state, _ = step(state, placement.batch(np.arange(8), batch_of(new_rng()), 8))
    assert np.abs(np.asarray(state.params["adapter"]) - before).max() > 0
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {})
    checkpoints.wait()
    restored, *_ = checkpoints.restore(state)
    checkpoints.close()
    np.testing.assert_array_equal(restored.params["adapter"], state.params["adapter"])
    assert restored.params["adapter"].sharding == state.params["adapter"].sharding


class WeightedLoss(Loss):
    """Cross entropy of the next token with a weight for each position."""

    batch_keys = ("weights",)

    def __call__(self, outputs, inputs, whole):
        nll = jnp.sum(outputs.logits.cross_entropy(inputs.targets[0])[0] * inputs.extra["weights"])
        return nll / whole.tokens, {"weight": jnp.sum(inputs.extra["weights"])}

    def metrics(self, sums, whole):
        return {"mean_weight": sums["weight"] / whole.tokens}


def test_a_loss():
    """Twice the weights, twice the gradient; over microbatches as over the whole batch."""
    model, rng = DeepSeekV3(DENSE), new_rng()
    batch = batch_of(rng) | {"weights": rng.random((8, 8), np.float32)}
    state = jax.jit(lambda key: init_state(model, optax.sgd(1.0), key))(jax.random.key(0))
    run = lambda n, b: jax.jit(make_train_step(model, optax.sgd(1.0), WeightedLoss(), microbatches=n))(state, b)[1]
    once, twice = run(1, batch), run(4, batch | {"weights": 2 * batch["weights"]})
    np.testing.assert_allclose(twice["grad_norm"], 2 * once["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(once["mean_weight"], batch["weights"].mean(), rtol=1e-6)


@struct.dataclass
class PagedCache:
    """Pages of 4 tokens in any order, the same in each layer.

    latent: (L, pages, 4, R). rope_key: (L, pages, 4, P). tables: (B, pages of a sequence).
    """

    latent: jax.Array
    rope_key: jax.Array
    tables: jax.Array

    def append(self, latent, rope_key, where, layer):
        page, slot = jnp.take_along_axis(self.tables, where.places // 4, axis=1), where.places % 4
        write = lambda pages, new: pages.at[layer, page, slot].set(new)
        extended = PagedCache(write(self.latent, latent), write(self.rope_key, rope_key), self.tables)
        read = lambda pages: pages[layer][self.tables].reshape(len(self.tables), -1, pages.shape[-1])
        places = jnp.broadcast_to(jnp.arange(4 * self.tables.shape[1]), (len(self.tables), 4 * self.tables.shape[1]))
        keys = Keys(read(extended.latent), read(extended.rope_key), places, lengths=where.cached + latent.shape[1])
        return extended, keys


def test_a_cache_layout():
    """Decoding from pages gives what decoding from the contiguous cache gives."""
    model, rng = DeepSeekV3(SMALL, Runtime(attention_form="absorbed")), new_rng()
    tokens = jnp.asarray(rng.integers(0, 32, (2, 11)), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    tables = jnp.asarray(rng.permutation(6).reshape(2, 3))
    pages = lambda layers, width: jnp.zeros((layers, 6, 4, width))
    stack = lambda n: PagedCache(pages(n, 8), pages(n, 4), tables)
    caches = [Cache(stack(1), stack(1), (), jnp.zeros(2, jnp.int32)), init_cache(SMALL, model.runtime, 2, 12)]
    decode = jax.jit(lambda t, c: model.apply(variables, t, c, method="decode"))
    for piece in jnp.split(tokens, [5, 6, 8], axis=1):
        (paged, caches[0]), (contiguous, caches[1]) = (decode(piece, cache) for cache in caches)
        np.testing.assert_allclose(paged, contiguous, rtol=1e-5, atol=1e-6)
