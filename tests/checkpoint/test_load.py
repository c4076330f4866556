"""`load_pretrained`: dtypes as JAX writes them, meshes as JAX makes them, and a run's checkpoint in shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from rich.console import Console

from dsv3_jax import ModelConfig, load_pretrained
from dsv3_jax.checkpoint.synthetic import write_random_checkpoint
from dsv3_jax.config import ConfigError
from dsv3_jax.runtime import Runtime
from dsv3_jax.training import trainer
from tests.parallel.small_run import WIDTHS, small_config

TOKENS = jnp.arange(64, dtype=jnp.int32).reshape(8, 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("load") / "hf"
    config = dataclasses.replace(ModelConfig.preset("tiny"), num_nextn_predict_layers=0, **WIDTHS)
    write_random_checkpoint(directory, config, block=None)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("load") / "run"
    config = small_config("", "single")
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, steps=2))
    trainer.train(config, directory, console=Console(quiet=True))
    return directory


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16", np.dtype(jnp.bfloat16)], ids=repr)
def test_any_dtype_like_is_taken(checkpoint, dtype):
    model, variables = load_pretrained(checkpoint, dtype=dtype)
    assert variables["params"]["norm"].dtype == jnp.bfloat16
    assert model.runtime == Runtime(dtype="bfloat16", param_dtype="bfloat16") == Runtime(dtype, dtype)
    _, variables = load_pretrained(checkpoint, dtype=dtype, runtime=Runtime(dtype=np.float32))
    assert variables["params"]["norm"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [np.int8, jnp.float16, "bf16", 3])
def test_other_dtypes_are_refused(checkpoint, dtype):
    with pytest.raises(ConfigError, match=r"must be one of float32, bfloat16"):
        load_pretrained(checkpoint, dtype=dtype)


def test_float64_needs_x64(checkpoint):
    with pytest.raises(ConfigError, match="jax_enable_x64"):
        load_pretrained(checkpoint, dtype="float64")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])  # Explicit is jax.make_mesh's default
@pytest.mark.parametrize("source", ["checkpoint", pytest.param("run", marks=pytest.mark.slow)])
def test_a_mesh_of_make_mesh_cuts_the_parameters(source, kind, request):
    path = request.getfixturevalue(source)
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(kind,) * 2)
    (model, whole), (_, cut) = load_pretrained(path), load_pretrained(path, mesh=mesh)
    up = cut["params"]["moe_layers"]["mlp"]["experts"]["up_proj"]
    assert up.addressable_shards[0].data.size == up.size // 8
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    np.testing.assert_allclose(jax.jit(model.apply)(cut, TOKENS), model.apply(whole, TOKENS), atol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "names", "sharding", "named"),
    [
        ((4, 2), ("data", "model"), "single", "'model' of 2 devices cuts nothing: the axes that do are data"),
        ((8,), ("stage",), "single", "'stage' of 8 devices cuts nothing"),
        ((3,), ("expert",), "single", "'expert' of 3 devices cuts nothing: its size divides no array"),
        ((2,), ("fsdp",), "ep_tp", "'fsdp' of 2 devices cuts nothing: the axes that do are data, node"),
    ],
)
@pytest.mark.parametrize("source", ["checkpoint", "run"])
def test_an_axis_that_cuts_nothing_is_refused(source, sizes, names, sharding, named, request):
    mesh = jax.make_mesh(sizes, names, devices=jax.devices()[: np.prod(sizes)])
    with pytest.raises(ConfigError, match=named):
        load_pretrained(request.getfixturevalue(source), mesh=mesh, runtime=Runtime(sharding=sharding))


def test_axes_of_activations_and_of_size_1_are_fine(checkpoint):
    mesh = jax.make_mesh((2, 1, 4), ("data", "model", "tensor"))
    model, variables = load_pretrained(checkpoint, mesh=mesh)
    assert jax.jit(model.apply)(variables, TOKENS).shape == (8, 8, model.config.vocab_size)
