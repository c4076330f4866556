"""Runs that start from the weights of another run, a converted checkpoint, or a Hugging Face directory.

Used for context extension (report section 4.3) and fine-tuning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from dsv3_jax.checkpoint.load import checkpoint_config, read_variables
from dsv3_jax.checkpoint.names import TreePath
from dsv3_jax.checkpoint.remote import fetched
from dsv3_jax.checkpoint.run_tokenizer import run_tokenizer
from dsv3_jax.checkpoint.runs import CHECKPOINTS, read_newest
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data import Tokenizer, has_tokenizer, load_tokenizer
from dsv3_jax.data.tokenizer import identity
from dsv3_jax.model.router import ROUTER
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.step import TrainState

_MAY_DIFFER = {
    *("max_position_embeddings", "rope_scaling", "rope_theta"),
    *("initializer_range", "aux_loss_alpha", "bos_token_id", "eos_token_id"),
}
"""Fields of the architecture that don't affect the weights."""


def check_source(path: str | Path, config: ModelConfig, tokenizer: Tokenizer, *, optimizer_state: bool) -> None:
    """Raises ConfigError if a model of `config` that reads `tokenizer`'s tokens can't start from the weights at `path`.

    Length and RoPE may differ, and the model may omit the MTP modules of the source.

    optimizer_state: whether to load it too, which requires a run.
    """
    path = fetched(path)
    source = checkpoint_config(path)
    for field in dataclasses.fields(ModelConfig):
        mine, there = getattr(config, field.name), getattr(source, field.name)
        without_mtp = field.name == "num_nextn_predict_layers" and mine == 0
        if mine != there and field.name not in _MAY_DIFFER and not without_mtp:
            raise ConfigError(f"model.{field.name} is {mine!r}, but the weights of {path} are for {there!r}")
    if optimizer_state and not (path / CHECKPOINTS).is_dir():
        raise ConfigError(f"init_optimizer is for the directory of a run: {path} holds weights alone")
    _check_tokenizer(path, tokenizer)


def _check_tokenizer(path: Path, mine: Tokenizer) -> None:
    """Raises ConfigError if a token of the source differs in `mine`, which may have additional tokens."""
    if (path / CHECKPOINTS).is_dir():
        theirs: Tokenizer = run_tokenizer(path)
    elif has_tokenizer(path):
        theirs = load_tokenizer(path)
    else:
        return
    if identity(mine) == identity(theirs):
        return
    try:
        there, here = theirs.token_bytes(), mine.token_bytes()
    except ConfigError:  # of text that isn't made of tokens one after another
        raise ConfigError(f"data.tokenizer isn't that of {path}: its tokens would mean something else") from None
    for i, token in enumerate(there):
        if i >= len(here) or here[i] != token:
            other = repr(here[i]) if i < len(here) else "none"
            raise ConfigError(f"data.tokenizer isn't that of {path}: token {i} is {other}, there {token!r}")


def state_from(
    path: str | Path,
    runtime: Runtime,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    optimizer_state: bool = False,
    check_hashes: bool = True,
) -> TrainState:
    """Returns a state at step 0 with the weights and router biases at `path`. Each device reads its part.

    Args:
      abstract: shapes, dtypes and shardings of the state.
      key: a typed key, as for `init_state`.
      optimizer_state: also load the moments of the run at `path`, but not its position in the schedule.

    Raises CheckpointError if the files can't be read, or don't match `abstract`.
    """
    path = fetched(path)
    where: Mapping[TreePath, Sharding] = {
        (collection, *(part.key for part in keys)): leaf.sharding
        for collection, tree in (("params", abstract.params), (ROUTER, abstract.router))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    mtp = any(name.startswith("mtp_") for name in abstract.params)
    variables = read_variables(path, runtime, lambda *_: where, mtp=mtp, check_hashes=check_hashes)[1]
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if optimizer_state:
        found = read_newest(path, {"opt_state": abstract.opt_state}, check_hashes=check_hashes)["opt_state"]
        opt_state = jax.tree.map(_at_the_schedules_start, found, is_leaf=lambda x: isinstance(x, _Place))
    else:
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(variables["params"])
    begin = lambda key: (jnp.zeros((), jnp.int32), jax.random.split(key)[1])
    step, rng = jax.jit(begin, out_shardings=(shardings.step, shardings.rng))(key)
    return TrainState(step, variables["params"], variables.get(ROUTER, {}), opt_state, rng)


_Place = optax.ScaleByScheduleState


def _at_the_schedules_start(part: Any) -> Any:
    """Resets the count of schedule steps in a part of the optimizer state."""
    return _Place(jnp.zeros_like(part.count)) if isinstance(part, _Place) else part


def with_model_of(path: str | Path, config: TrainConfig) -> TrainConfig:
    """Returns `config` with the architecture and, unless the data has one, the tokenizer of the weights at `path`."""
    path = fetched(path)
    model, data = checkpoint_config(path), config.data
    if data.tokenizer is None and has_tokenizer(path):
        data = dataclasses.replace(data, tokenizer=str(path))
    data = dataclasses.replace(data, sequence_length=min(data.sequence_length, model.max_position_embeddings))
    return dataclasses.replace(config, model=model, data=data)
