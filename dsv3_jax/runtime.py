"""How a run computes the model: `Runtime`, all choices that don't affect the architecture."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Literal

import ml_dtypes  # noqa: F401  # teaches NumPy the name bfloat16
import numpy as np

from dsv3_jax.config import ConfigError

Dtype = Literal["float32", "bfloat16", "float64"]
AttentionForm = Literal["expanded", "absorbed"]
FP8Scales = Literal["tiles", "block_gradients", "tensor"]
FP8AttentionOutput = Literal["e4m3", "e5m6"]
PipelineSchedule = Literal["1f1b", "zero_bubble"]
Remat = Literal["none", "block", "paper"]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a run computes the model. No choice changes the parameter tree, or the results beyond rounding."""

    dtype: Dtype = "float32"
    """Dtype of activations, and of weights as layers use them; router, softmax, norms and losses stay in float32. In
    Python any dtype-like is accepted, here and below, such as jnp.bfloat16.
    """
    param_dtype: Dtype = "float32"
    """Dtype in which parameters are stored and updated."""
    gradient_dtype: Dtype = "float32"
    """Dtype in which the gradients of weights are summed over devices; over microbatches it is float32 or wider.
    `bfloat16` halves the communication of data-parallel devices, and rounds each partial sum.
    """
    precision: Literal["dtype", "fp8"] = "dtype"
    """Precision of linear layers and experts: `dtype`, or `fp8` for weights and activations, forward and backward
    (report section 3.3). Embedding, head, router, norms and attention are unaffected. Requires a Hopper GPU; emulated
    on a CPU.
    """
    fp8_scales: FP8Scales = "tiles"
    """FP8 scales. `tiles` is the report's recipe: one per 1 x 128 of activations and gradients, and per 128 x 128 of
    weights. For experiments: gradients in 128 x 128 too, which diverged in the report (appendix B.2), and one scale per
    tensor.
    """
    fp8_power_of_two: bool = False
    """Whether all FP8 scales are powers of two ("ue8m0", DeepSeek-V3.1). Those of the inputs of experts and of the
    layer after attention always are.
    """
    fp8_attention_output: FP8AttentionOutput = "e4m3"
    """Format in which the input of the layer after attention is saved for the backward pass. `e5m6`: the report's 12
    bits, emulated in bfloat16, 2 bytes a number; that layer then multiplies E4M3 quantised from it.
    """
    attention_form: AttentionForm = "expanded"
    """`expanded` computes keys and values per head (training, prefill); `absorbed` attends to the latent (decoding)."""
    attention_impl: Literal[
        "auto", "reference", "blockwise", "pallas_reference", "gpu", "gpu_interpret", "tpu", "tpu_interpret"
    ] = "auto"
    """Implementation of attention. `auto`: the fastest that is correct here; see `model.auto`. `gpu` and `tpu`: kernels
    for Hopper and TPUs, bfloat16. `blockwise`: plain JAX, memory linear in the sequence. `reference`: one einsum. For
    tests on a CPU: `pallas_reference` calls the kernels' references, `gpu_interpret` and `tpu_interpret` interpret the
    kernels, slowly.
    """
    experts_impl: Literal["auto", "reference", "ragged", "blocked", "gpu", "tokamax"] = "auto"
    """Implementation of experts. `auto`: the fastest that is correct here. `ragged`: `jax.lax.ragged_dot`. `blocked`: a
    loop over blocks of rows, fast on a CPU. In bfloat16: `gpu`, our kernel for Hopper, and `tokamax`, for TPUs.
    """
    remat: Remat = "none"
    """Rematerialisation: nothing, whole blocks, or norms and up-projections as in the report (section 3.2.3)."""
    sharding: Literal["single", "fsdp", "fsdp_ep", "ep_tp", "pp_ep_dp"] = "single"
    """Sharding rules, a preset of `parallel.rules`: the mesh axes that each logical axis is sharded over."""
    sharding_overrides: tuple[str, ...] = ()
    """Changes to the sharding rules, each `NAME=MESH,AXES`, such as `embed=fsdp,data`."""
    dispatch: Literal["all_to_all", "ragged_all_to_all", "all_gather"] = "all_to_all"
    """Collective that sends tokens to experts: padded buffers, exact sizes (TPU, GPU), or all tokens to all devices."""
    pipeline: PipelineSchedule = "1f1b"
    """Pipeline schedule over the mesh axis `stage`; see `parallel.pipeline`."""
    dispatch_slack: float | None = None
    """Size of dispatch buffers relative to even routing; if routing exceeds it, tokens are sent in several rounds. By
    default 1.2, which a run raises if the routing that it sees needs more.
    """
    redundant_experts: int = 0
    """Number of redundant experts, for serving: `inference.expert_placement` assigns them to the busiest experts."""
    interleave: int = 1
    """Parts of a batch that a sparse block computes side by side, to overlap the dispatch of one with another's
    attention.
    """

    @property
    def sharded(self) -> bool:
        """Whether the sharding rules are for more than one device."""
        return self.sharding != "single"

    @classmethod
    def for_backend(cls, backend: str) -> Runtime:
        """Defaults for a backend: float32 on "cpu"; bfloat16 with rematerialisation on "gpu" and "tpu"."""
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
        if self.dispatch_slack is not None and not self.dispatch_slack >= 1:
            raise ConfigError(f"runtime.dispatch_slack is {self.dispatch_slack!r}: it must be at least 1")
        if self.redundant_experts < 0:
            raise ConfigError(f"runtime.redundant_experts is {self.redundant_experts!r}: it must not be negative")
        if self.interleave < 1:
            raise ConfigError(f"runtime.interleave is {self.interleave!r}: it must be at least 1")


def _dtype_name(value: Any) -> Any:
    """Returns the name of a dtype-like; anything else is returned unchanged."""
    try:
        return value if value is None else np.dtype(value).name  # NumPy takes None for float64
    except (TypeError, ValueError):
        return value


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    """Values of each field of `Runtime` that is annotated as a Literal."""
    hints = typing.get_type_hints(Runtime).items()
    return {name: typing.get_args(hint) for name, hint in hints if typing.get_origin(hint) is Literal}
