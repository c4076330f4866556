"""Does sparsity pay? The tiny DeepSeek-V3 against a dense model of equal activated FLOPs, on the same tokens.

    python -m experiments.dense_vs_moe --steps 480

Trains both with the same recipe, data and order, and writes a report (markdown, PNG, JSON) under the output folder.
The dense twin has dense feed-forwards of the width that a token sees in the sparse layers: the shared experts' plus
the chosen routed experts'. Nothing else differs, but for the router, whose FLOPs the dense twin doesn't spend. Both
train without multi-token prediction, whose module is always sparse.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import jax
import matplotlib
import tyro

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.config import ModelConfig
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.metrics import read_metrics, worst_violation
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.trainer import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The dense model whose tokens pass as many feed-forward weights, summed over layers."""
    sparse = (config.n_shared_experts + config.num_experts_per_tok) * config.moe_intermediate_size
    widths = config.num_dense_layers * config.intermediate_size + config.num_moe_layers * sparse
    return dataclasses.replace(
        config,
        first_k_dense_replace=config.num_hidden_layers,
        intermediate_size=round(widths / config.num_hidden_layers),
        num_nextn_predict_layers=0,
    )


def main(steps: int = 480, out: Path = Path("runs/dense_vs_moe"), resume: bool = False) -> None:
    """Trains both and compares them.

    Args:
      steps: optimizer steps of each.
      out: where the two runs and the report go.
      resume: continue runs that were stopped.
    """
    base = TrainConfig.preset("tiny", jax.default_backend())
    base = dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, steps=steps))
    sparse = dataclasses.replace(base.model, num_nextn_predict_layers=0)
    rows, curves = [], {}
    for name, model in (("moe", sparse), ("dense", dense_twin(sparse))):
        config = dataclasses.replace(base, model=model)
        directory = out / name
        done = (directory / "report.md").exists()
        if not done and train(config, directory, resume=resume).metrics["stopped"]:
            raise SystemExit("stopped: add --resume to go on")
        curves[name] = read_metrics(directory / "metrics.jsonl")
        rows.append(_row(name, config, curves[name]))
    _write(out, rows, curves, steps, base)
    print((out / "report.md").read_text())


def _row(name: str, config: TrainConfig, records: list[dict]) -> dict:
    last: dict = {}
    for record in records:
        last |= record
    rates = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    tree = jax.eval_shape(_init(config.model), jax.random.key(0))
    return {
        "model": name,
        "parameters": sum(x.size for x in jax.tree.leaves(tree)),
        "training_flops_per_token": model_flops(config.model, config.data.sequence_length).total,
        "validation_loss": last["validation_loss"],
        "training_loss": last["loss"],
        "tokens_per_second_median": rates[len(rates) // 2],
        "largest_load_violation": worst_violation(last),
    }


def _init(model: ModelConfig):
    from dsv3_jax import DeepSeekV3

    return lambda key: DeepSeekV3(model).init(key, jax.numpy.zeros((1, 1), jax.numpy.int32))


def _write(out: Path, rows: list[dict], curves: dict, steps: int, base: TrainConfig) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, records in curves.items():
        points = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(
        xlabel="step", ylabel="validation loss (nats per byte)", title="sparse against dense, equal activated FLOPs"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "dense_vs_moe.png", dpi=130)
    (out / "report.json").write_text(json.dumps(rows, indent=2) + "\n")
    tokens = Schedule(base.schedule).total_sequences * base.data.sequence_length
    moe, dense = rows
    lines = [
        "# Sparse against dense at equal activated FLOPs",
        "",
        f"{datetime.date.today()}, {jax.devices()[0].device_kind}, jax {jax.__version__}; {steps} steps, "
        f"{tokens:,} tokens of `{base.data.source}`, same order for both. "
        f"Command: `python -m experiments.dense_vs_moe --steps {steps}`",
        "",
        "| | parameters | training FLOPs per token | validation loss (nats per byte) | training loss "
        "| tokens/s (median) |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['model']} | {r['parameters']:,} | {r['training_flops_per_token']:,.0f} | {r['validation_loss']:.4f} "
            f"| {r['training_loss']:.4f} | {r['tokens_per_second_median']:,.0f} |"
            for r in rows
        ),
        "",
        f"Validation loss, sparse minus dense: {moe['validation_loss'] - dense['validation_loss']:+.4f} nats per byte. "
        f"Largest load violation of a sparse layer at the end: {moe['largest_load_violation']:.3f}. One seed each.",
        "",
        "![validation loss](dense_vs_moe.png)",
        "",
    ]
    (out / "report.md").write_text("\n".join(lines))


if __name__ == "__main__":
    tyro.cli(main)
