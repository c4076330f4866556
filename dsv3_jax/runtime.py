"""How a run computes the model: `Runtime`, every choice that leaves the architecture as it is."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Literal

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np

from dsv3_jax.config import ConfigError

Dtype = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a run computes the model. None of it changes the parameter tree or, within the dtype, the numbers."""

    dtype: Dtype = "float32"
    """Dtype of activations and of weights as they are used; router, softmax, norms and losses stay in float32.
    In Python any dtype-like is taken, here and below, such as jnp.bfloat16."""
    param_dtype: Dtype = "float32"
    """Dtype of the parameters as they are stored and optimised."""
    gradient_dtype: Dtype = "float32"
    """Dtype in which the gradients of weights are added up over devices; over microbatches it is float32 or wider.
    `bfloat16` halves what data-parallel devices exchange, and rounds each partial sum."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """`dtype` multiplies in `dtype`. `fp8` quantises weights and activations of every linear layer and expert, forward
    and backward (report section 3.3); embedding, head, router, norms and attention stay as they are. On a Hopper GPU,
    or emulated on a CPU."""
    fp8_scales: Literal["tiles", "block_gradients", "tensor"] = "tiles"
    """`tiles` is the report's: 1 x 128 of activations and gradients, 128 x 128 of weights. For experiments: gradients
    in 128 x 128 too, which diverged in the report's appendix B.2, and one scale for a whole tensor."""
    fp8_power_of_two: bool = False
    """Whether all FP8 scales are powers of two ("ue8m0", DeepSeek-V3.1). Those of the inputs of experts and of the
    layer after attention always are."""
    attention_form: Literal["expanded", "absorbed"] = "expanded"
    """`expanded` makes keys and values per head (training, prefill); `absorbed` attends to the latent (decode)."""
    attention_impl: Literal[
        "auto", "reference", "blockwise", "pallas_reference", "gpu", "gpu_interpret", "tpu", "tpu_interpret"
    ] = "auto"
    """`auto`: the fastest that is right here; see `model.auto`. `gpu` and `tpu`: the kernels for Hopper and TPUs,
    bfloat16. `blockwise`: plain JAX, memory linear in the sequence.
    `reference`: one einsum. For tests on a CPU: `pallas_reference` takes the same way to the kernels' plain twins,
    `_interpret` to the kernels, slowly."""
    experts_impl: Literal["auto", "reference", "ragged", "blocked", "gpu", "tokamax"] = "auto"
    """`auto`: the fastest right one. `ragged` is `jax.lax.ragged_dot`; `blocked` loops over blocks of rows, the fast
    way on a CPU. For bfloat16: `gpu`, our kernel for Hopper, and `tokamax` (TPUs)."""
    remat: Literal["none", "block", "paper"] = "none"
    """Recomputed in the backward pass: nothing, whole blocks, or norms and up-projections (report section 3.2.3)."""
    sharding: Literal["single", "fsdp", "fsdp_ep", "ep_tp", "pp_ep_dp"] = "single"
    """Preset of `parallel.rules`: the mesh axes that each logical axis is sharded over."""
    sharding_overrides: tuple[str, ...] = ()
    """Changes to the preset, each `NAME=MESH,AXES`, such as `embed=fsdp,data`."""
    dispatch: Literal["all_to_all", "ragged_all_to_all", "all_gather"] = "all_to_all"
    """How tokens reach experts on other devices: in padded pieces, in exact ones (TPU, GPU), or all to all devices."""
    pipeline: Literal["1f1b", "zero_bubble"] = "1f1b"
    """The order of work over the mesh axis `stage`; see `parallel.pipeline`."""
    dispatch_slack: float = 1.2
    """Room for uneven routing, over even routing's, before the exchange takes its slower way of several rounds."""
    redundant_experts: int = 0
    """Slots for experts beyond one each, for serving: `inference.expert_placement` fills them with the busiest."""
    interleave: int = 1
    """Shares of a batch that a sparse block computes side by side: one's exchange may hide behind another's attention.
    """

    @classmethod
    def for_backend(cls, backend: str) -> Runtime:
        """A starting point on `backend` ("cpu", "gpu" or "tpu"): float32 on a CPU, else bfloat16 with recomputation."""
        return cls() if backend == "cpu" else cls(dtype="bfloat16", remat="paper")

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype", "gradient_dtype"):
            object.__setattr__(self, name, _dtype_name(getattr(self, name)))
        for name, valid in _choices().items():
            if getattr(self, name) not in valid:
                raise ConfigError(f"runtime.{name} is {getattr(self, name)!r}: it must be one of {', '.join(valid)}")
        if (
            self.attention_impl not in ("auto", "reference", "blockwise", "pallas_reference")
            and self.dtype != "bfloat16"
        ):
            raise ConfigError(f"runtime.attention_impl {self.attention_impl!r} takes dtype bfloat16, not {self.dtype}")
        if self.experts_impl in ("gpu", "tokamax") and self.dtype != "bfloat16":
            raise ConfigError(
                f"runtime.experts_impl {self.experts_impl!r} takes dtype bfloat16, not {self.dtype}: ragged takes both"
            )
        if not self.dispatch_slack >= 1:
            raise ConfigError(f"runtime.dispatch_slack is {self.dispatch_slack!r}: it must be at least 1")
        if self.redundant_experts < 0:
            raise ConfigError(f"runtime.redundant_experts is {self.redundant_experts!r}: it must not be negative")
        if self.interleave < 1:
            raise ConfigError(f"runtime.interleave is {self.interleave!r}: it must be at least 1")


def _dtype_name(value: Any) -> Any:
    """The name of any dtype-like; what is none stays as it is."""
    try:
        return value if value is None else np.dtype(value).name  # NumPy takes None for float64
    except (TypeError, ValueError):
        return value


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """The values of each field of `Runtime` that is annotated as a Literal."""
    hints = typing.get_type_hints(Runtime).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}
