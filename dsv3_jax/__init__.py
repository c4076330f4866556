"""DeepSeek-V3 in JAX: training, checkpoint conversion, inference and planning.

The names exported here cover the common uses; everything else is in the subpackages. Importing `dsv3_jax` loads none of
them: a subpackage is imported when one of its names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_jax.checkpoint import load_pretrained
    from dsv3_jax.config import ModelConfig
    from dsv3_jax.data import load_tokenizer
    from dsv3_jax.inference.sampling import Sampling
    from dsv3_jax.inference.text import generate
    from dsv3_jax.model.transformer import DeepSeekV3
    from dsv3_jax.parallel.mesh import MeshShape, make_mesh
    from dsv3_jax.runtime import Runtime
    from dsv3_jax.training.config import TrainConfig
    from dsv3_jax.training.losses import PretrainingLoss
    from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
    from dsv3_jax.training.schedule import Schedule, ScheduleConfig
    from dsv3_jax.training.step import init_state, make_train_step
    from dsv3_jax.training.trainer import train

__all__ = [
    "DeepSeekV3",
    "MeshShape",
    "ModelConfig",
    "OptimizerConfig",
    "PretrainingLoss",
    "Runtime",
    "Sampling",
    "Schedule",
    "ScheduleConfig",
    "TrainConfig",
    "generate",
    "init_state",
    "load_pretrained",
    "load_tokenizer",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "train",
]

_MODULES = {
    "checkpoint": ["load_pretrained"],
    "config": ["ModelConfig"],
    "data": ["load_tokenizer"],
    "inference.sampling": ["Sampling"],
    "inference.text": ["generate"],
    "model.transformer": ["DeepSeekV3"],
    "parallel.mesh": ["MeshShape", "make_mesh"],
    "runtime": ["Runtime"],
    "training.config": ["TrainConfig"],
    "training.losses": ["PretrainingLoss"],
    "training.optimizer": ["OptimizerConfig", "make_optimizer"],
    "training.schedule": ["Schedule", "ScheduleConfig"],
    "training.step": ["init_state", "make_train_step"],
    "training.trainer": ["train"],
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"dsv3_jax.{module}"), name)
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
