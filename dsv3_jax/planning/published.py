"""Comparison with published measurements, none of which was used to set a constant of the planner."""

from __future__ import annotations

import dataclasses

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.accounting.hardware import EFFICIENCY, hardware
from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.planning.serving import Serving, decode_step, prefill_step
from dsv3_jax.planning.step_time import step_time
from dsv3_jax.planning.training_plan import TrainingPlan


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A published figure. predicted and measured are in `unit`, less is better. missing: what isn't modelled."""

    what: str
    source: str
    unit: str
    measured: float
    predicted: float
    missing: str

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


_JLE = "jax-llm-examples, deepseek_r1_jax/README.md (jax 0.5.2)"
_JLE_MISSING = "launches and synchronisation of small kernels; converting int8 weights on the vector unit"
_SGL = "sglang-jax issue 1318 (bench_serving, 1K in, 1K out)"
_TPU_RECIPE = "tpu-recipes training/v5p/DeepSeek3-671B-MaxText"

JLE_DECODE = (
    (1, 32, 75.8),
    (1, 512, 75.9),
    (1, 4096, 73.8),
    (1, 8192, 71.0),
    (8, 32, 50.5),
    (8, 512, 48.0),
    (8, 4096, 42.1),
    (8, 8192, 35.6),
    (128, 32, 19.6),
    (128, 512, 17.4),
)
"""Batch, context, and tokens per second of each sequence on v5e-64."""


def compare() -> list[Comparison]:
    """Returns all published figures with their predictions."""
    return [*_training(), *_v5e_decoding(), *_v6e_serving()]


def report_plan() -> TrainingPlan:
    """Pre-training as in the report: PP16, EP64, ZeRO-1, FP8, DualPipe, Adam's moments in bfloat16."""
    config, mesh = ModelConfig.preset("v3-671b"), MeshShape(stage=16, data=2, expert=64)
    return TrainingPlan(
        config, hardware("h800"), mesh, 15360, precision="fp8", moment=2, weight=1, pipeline_schedule="dualpipe"
    )


def extension_plans() -> list[TrainingPlan]:
    """The two phases of context extension, 1,000 steps each (report section 4.3)."""
    phases = (
        (1920, 32768, "paper", MeshShape(stage=32, expert=8, context=4, tensor=2)),
        (480, 131072, "block", MeshShape(stage=2, fsdp=4, expert=8, context=8, tensor=4)),
    )
    return [
        dataclasses.replace(report_plan(), batch=batch, length=length, remat=remat, mesh=mesh)  # type: ignore[arg-type]
        for batch, length, remat, mesh in phases
    ]


def maxtext_plan() -> TrainingPlan:
    """MaxText's recipe for 512 v5p: FSDP, 6 sequences of 8,192 per device, no MTP, blocks recomputed."""
    config = dataclasses.replace(ModelConfig.preset("v3-671b"), num_nextn_predict_layers=0)
    return TrainingPlan(
        config, hardware("v5p"), MeshShape(fsdp=512), 6 * 512, 8192, 6, remat="block", weight=0, mtp=False
    )


def _training() -> list[Comparison]:
    rows = []
    for preset, measured in (("v3-671b", 250e9), ("v2-236b", 155e9)):
        flops = model_flops(ModelConfig.preset(preset), 4096, mtp=False).total
        what = f"training FLOPs per token, {preset} at 4K"
        rows.append(Comparison(what, "arXiv 2505.09343, table 2", "GFLOP", measured / 1e9, flops / 1e9, "nothing"))
    hours = 1e12 / step_time(report_plan()).tokens_per_device_second / 3600
    missing = "tensor cores given to links (20 of 132 SMs), FP8 scaling and promotion, stragglers, restarts"
    rows.append(
        Comparison(
            "pre-training, 2,048 H800", "arXiv 2412.19437, section 1", "K h / 1T tokens", 180.0, hours / 1e3, missing
        )
    )
    missing = "the report's layouts, which it doesn't give: these are the fastest that fit"
    hours = sum(plan.tokens * 1000 / step_time(plan).tokens_per_device_second / 3600 for plan in extension_plans())
    source = "arXiv 2412.19437, table 1"
    rows.append(Comparison("context extension to 32K and 128K, H800", source, "K h", 119.0, hours / 1e3, missing))
    seconds = step_time(maxtext_plan()).total
    missing = "padding of 192-wide heads, offloading to hosts, input pipeline"
    rows.append(Comparison("training step, 512 v5p", _TPU_RECIPE, "s", 90.668, seconds, missing))
    return rows


def _v5e_decoding() -> list[Comparison]:
    """Heads over all 64 chips, experts over 8 and their width over 8, tokens replicated, int8, keys per head."""
    config, sheet = ModelConfig.preset("v3-671b"), hardware("v5e")
    serving = Serving(config, sheet, 64, 1, 8, "all_reduce", weight=1, cache=1, expanded_cache=True)
    rows = []
    for batch, context, rate in JLE_DECODE:
        step = decode_step(serving, batch, context)
        what = f"decoding step, 64 v5e, batch {batch}, context {context:,}"
        rows.append(Comparison(what, _JLE, "ms", 1e3 / rate, step.total * 1e3, _JLE_MISSING))
    return rows


def _v6e_serving() -> list[Comparison]:
    """Requests of 1,024 tokens in and out on v6e-64: on average 1,536 tokens are cached."""
    config, sheet = ModelConfig.preset("v3-671b"), hardware("v6e")
    besides = "prompts that wait for each other, padding of a prompt's step; besides the above"
    rows = []
    for name, exchange, latency, rates in (
        ("fused", "all_to_all", 57.5, {512: 5315, 420: 5299}),
        ("epmoe", "all_reduce", 87.2, {512: 3291, 420: 2958}),
    ):
        serving = Serving(config, sheet, 64, 8, 64, exchange)  # type: ignore[arg-type]
        step = {batch: decode_step(serving, batch, 1536).total for batch in rates}
        missing = "converting FP8 weights block by block, launches, the host between steps"
        rows.append(Comparison(f"median decoding step, 64 v6e, {name}", _SGL, "ms", latency, step[512] * 1e3, missing))
        for batch, rate in rates.items():
            # The server puts prompts ahead of decoding: one per sequence that ends, whose place it takes.
            both = step[batch] + batch * prefill_step(serving, 1, 1024) / 1024
            what = f"time per token at {batch} sequences, prefill included, {name}"
            rows.append(Comparison(what, _SGL, "ms", batch * 1e3 / rate, both * 1e3, besides))
    return rows


def markdown() -> str:
    """Formats the comparison as a markdown table, with the efficiencies used."""
    lines = [
        "| what | published | predicted | predicted / published | not in the model |",
        "|---|---:|---:|---:|---|",
    ]
    for row in compare():
        mark = "" if 0.6 <= row.ratio <= 1.4 else " (outside 0.6 to 1.4)"
        lines.append(
            f"| {row.what} [{row.source}] | {row.measured:,.1f} {row.unit} | {row.predicted:,.1f} {row.unit} "
            f"| {row.ratio:.2f}{mark} | {row.missing} |"
        )
    lines += ["", "One efficiency per family, from measurements of another model:", ""]
    lines += [f"- {name}: {e.value:.1%}. {e.source}." for name, e in EFFICIENCY.items()]
    return "\n".join(lines)
