"""Does FP8 train to the same loss? The same model, seed and data in float32, bfloat16, FP8 and FP8's two variants.

On a GPU a second run in bfloat16, which sums its gradients over twice as many parts of a batch, shows what chance alone
makes of a curve; on a CPU float32 does.

    python -m experiments.fp8_curve --size cpu
    python -m experiments.fp8_curve --size gpu --minutes 9     # again, until it says that all runs are done
    python -m experiments.fp8_curve --size gpu --runs bf16 fp8 # only these
    python -m experiments.fp8_curve --size gpu --source texts  # 55 MB or more, so that a run sees no text twice

Every run saves what it has when its time is up, and goes on from there. The report (markdown, PNG, JSON) compares the
losses of a step, smoothed by an exponential mean, with bfloat16's, as appendix B of the DeepSeek-V3 report does. It is
of all runs in the folder, whichever call trained them and however far they are, and is written when a call ends.

Two runs drift apart, whatever first set them apart. So when all runs are done, losses and gradients of one held-out
batch are compared at the same weights, too: those of bfloat16's checkpoints.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

from dsv3_jax.accounting.parameters import count_parameters
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.data import DataConfig, load_tokenizer
from dsv3_jax.data.pipeline import prepared_tokenizer
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import CONFIG
from dsv3_jax.training.losses import PretrainingLoss
from dsv3_jax.training.metrics import read_metrics
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.step import TrainState, make_train_step
from dsv3_jax.training.trainer import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RUNS: dict[str, tuple[str, Runtime]] = {
    "bf16": ("bfloat16", Runtime(dtype="bfloat16")),
    "fp8": ("FP8", Runtime(dtype="bfloat16", precision="fp8")),
    "block_gradients": (
        "FP8, gradients in blocks",
        Runtime(dtype="bfloat16", precision="fp8", fp8_scales="block_gradients"),
    ),
    "tensor": ("FP8, one scale a tensor", Runtime(dtype="bfloat16", precision="fp8", fp8_scales="tensor")),
    "control": ("bfloat16, gradients in twice as many parts", Runtime(dtype="bfloat16")),
    "float32": ("float32", Runtime()),
}
"""Runs by the names of their folders: what reports call them, and their runtime."""
BASE = "bf16"
SMOOTHING = 0.9
"""Weight of what was before in the exponential mean, of a step; the report's figures use the same."""


def sizes() -> dict[str, TrainConfig]:
    """The two runs: widths are multiples of 128, so that no tile is filled up."""
    base = TrainConfig.preset("tiny", "cpu")

    # Few steps of large batches, at a lower rate than would be best: two runs that round differently drift apart, and
    # the more so the more steps they take and the higher their rate is.
    def schedule(batch: int, rate: float) -> ScheduleConfig:
        return ScheduleConfig(
            **dict(steps=100, batch_size=batch, warmup_steps=20, constant_until=0.4, bias_update_speed=0.01),
            **dict(peak_learning_rate=rate, end_learning_rate=rate / 10, tail_learning_rate=rate / 10),
        )

    quiet = dict(log_every=1, validate_every=10**6, validation_batches=1, sample_tokens=0)
    small = dataclasses.replace(
        base.model,
        **dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2),
        **dict(num_attention_heads=2, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32),
        **dict(v_head_dim=64, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1),
        num_nextn_predict_layers=0,
    )
    cpu = dataclasses.replace(
        base,
        model=small,
        data=DataConfig(sequence_length=128),
        schedule=schedule(batch=64, rate=3e-4),
        checkpoint_every=50,
        keep_every=50,
        **quiet,
    )
    large = dataclasses.replace(
        ModelConfig.preset("v3-mini"),
        **dict(vocab_size=264, bos_token_id=256, eos_token_id=257, hidden_size=512, intermediate_size=1536),
        **dict(moe_intermediate_size=256, num_hidden_layers=10, num_nextn_predict_layers=0),
    )
    gpu = dataclasses.replace(
        cpu,
        model=large,
        data=DataConfig(sequence_length=1024),
        schedule=schedule(batch=512, rate=1e-4),
        microbatches=8,
    )
    return {"cpu": cpu, "gpu": gpu}


def main(
    size: Literal["cpu", "gpu"] = "cpu",
    runs: tuple[Literal["bf16", "fp8", "block_gradients", "tensor", "control", "float32"], ...] = (),
    source: str = "stdlib",
    minutes: float = 60,
    out: Path | None = None,
) -> None:
    """Trains what isn't trained yet, and writes the report of the steps that all runs past their warm-up have.

    Args:
      size: cpu, minutes of one core; gpu, at least 50M parameters and 50M tokens.
      runs: which to train, in this order; by default all, but on a GPU not float32, on a CPU not control.
      source: a file or folder of text, as `data.source`. Python's library is 8 million tokens, seen six times on a GPU.
      minutes: after which a run is saved and the program ends; it goes on when it is called again.
      out: where runs and report go, by default runs/fp8_curve/SIZE.
    """
    base, out, until = sizes()[size], out or Path("runs/fp8_curve") / size, time.monotonic() + 60 * minutes
    threading.Thread(target=_stop_at, args=(until,), daemon=True).start()
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, source=source))
    for config in out.glob(f"*/{CONFIG}"):
        if (other := TrainConfig.from_json(config).data.source) != source:
            raise ConfigError(f"{config.parent} is a run on {other!r}, not {source!r}: choose another --out")
    wanted = runs or tuple(name for name in RUNS if name != ("control" if size == "cpu" else "float32"))
    for name in wanted:
        if not (out / name / "report.md").exists() and time.monotonic() < until:
            runtime = RUNS[name][1] if size == "cpu" else dataclasses.replace(RUNS[name][1], remat="paper")
            started = any((out / name / "checkpoints").glob("[0-9]*"))
            parts = base.microbatches * (2 if name == "control" else 1)
            train(dataclasses.replace(base, runtime=runtime, microbatches=parts), out / name, resume=started)
    curves = {name: read_losses(out / name / "metrics.jsonl") for name in RUNS}
    curves = {name: curve for name, curve in curves.items() if max(curve, default=0) > base.schedule.warmup_steps}
    left = [name for name in wanted if not (out / name / "report.md").exists()]
    if BASE in curves and len(curves) > 1:
        others = [name for name in curves if name not in (BASE, "control")]
        write(out, size, base, curves, at_the_same_weights(base, out / BASE, others) if not left else {})
        print((out / f"fp8-curve-{size}.md").read_text())
    print(f"to be continued by the same command: {', '.join(left)}" if left else "all runs are done")


def read_losses(metrics: Path) -> dict[int, float]:
    """The loss of each step; nothing, of a run that hasn't started."""
    return {r["step"]: r["loss"] for r in read_metrics(metrics) if "loss" in r} if metrics.exists() else {}


def _stop_at(until: float) -> None:
    """Asks this process to save and stop, as a scheduler would, when the time is up."""
    time.sleep(max(0.0, until - time.monotonic()))
    os.kill(os.getpid(), signal.SIGTERM)


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Exponential mean over the steps, without a bias towards the first."""
    mean, weight, found = 0.0, 0.0, []
    for loss in losses:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        found.append(mean / weight)
    return np.array(found)


def relative(curve: np.ndarray, base: np.ndarray) -> np.ndarray:
    """By how many percent each value is above the base's, of as many steps as both have."""
    steps = min(len(curve), len(base))
    return 100 * (curve[:steps] / base[:steps] - 1)


def at_the_same_weights(base: TrainConfig, run: Path, names: list[str]) -> dict[str, dict[int, tuple[float, float]]]:
    """Compares losses and gradients of a held-out batch, at the weights of the base run's checkpoints, with the base's.

    Returns, of each run in `names` and by the checkpoint's step, by how many percent its loss is above, and how far
    its gradient is, in percent of the base's norm.
    """
    base = dataclasses.replace(base, runtime=RUNS[BASE][1])
    tokenizer = prepared_tokenizer(base.data)
    setup = Setup(base, load_tokenizer(tokenizer), tokenizer)
    batch = {name: jnp.asarray(setup.validation[0][name]) for name in ("tokens", "targets")}
    # In the place of an optimizer's state, the gradient.
    gradient = optax.GradientTransformation(lambda p: p, lambda g, _, p: (jax.tree.map(jnp.zeros_like, p), g))

    def of(runtime: Runtime):
        step = make_train_step(
            setup.model.clone(runtime=runtime), gradient, PretrainingLoss(base.model, setup.schedule)
        )

        def loss_and_gradient(state: TrainState):
            after, metrics = step(dataclasses.replace(state, opt_state=state.params), batch)
            return metrics["loss"], after.opt_state

        return jax.jit(loss_and_gradient)

    compute = {name: of(dataclasses.replace(RUNS[name][1], remat="paper")) for name in (BASE, *names)}
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in names}
    checkpoints = Checkpoints(run / "checkpoints", base.keep_checkpoints, keep_every=base.keep_every)
    for step in checkpoints.steps():
        state = checkpoints.restore(setup.abstract, step).state
        loss, grads = compute[BASE](state)
        for name in names:
            other, others = compute[name](state)
            far = optax.global_norm(jax.tree.map(jnp.subtract, others, grads)) / optax.global_norm(grads)
            found[name][step] = 100 * float(other / loss - 1), 100 * float(far)
    checkpoints.close()
    setup.data.stop()
    return found


def write(
    out: Path,
    size: str,
    base: TrainConfig,
    curves: dict[str, dict[int, float]],
    same: dict[str, dict[int, tuple[float, float]]],
) -> None:
    """Writes fp8-curve-SIZE as .md, .png and .json.

    curves: the losses of each run by step, from 1 on. same: see `at_the_same_weights`.
    """
    losses = {name: np.array([curve[s + 1] for s in range(len(curve))]) for name, curve in curves.items()}
    smooth = {name: smoothed(of_run) for name, of_run in losses.items()}
    against = {name: relative(curve, smooth[BASE]) for name, curve in smooth.items() if name != BASE}
    rows = {}
    for name, far in against.items():
        warm = far[base.schedule.warmup_steps :]
        rows[name] = {
            "steps": len(far),
            "last_percent": float(far[-1]),
            "largest_percent_after_warmup": float(np.abs(warm).max()),
            "mean_absolute_percent_after_warmup": float(np.abs(warm).mean()),
            "mean_percent_after_warmup": float(warm.mean()),
            "last_smoothed_loss": float(smooth[name][-1]),
        }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, curve in smooth.items():
        left.plot(range(1, len(curve) + 1), curve, label=RUNS[name][0], linewidth=1)
    for name, far in against.items():
        right.plot(range(1, len(far) + 1), far, label=RUNS[name][0], linewidth=1)
    right.axhspan(-0.25, 0.25, alpha=0.15, color="grey")
    limit = max(1.0, *(r["largest_percent_after_warmup"] for r in rows.values()))
    right.set(xlabel="step", ylabel=f"loss relative to {RUNS[BASE][0]}'s, %", ylim=(-limit, limit))
    left.set(xlabel="step", ylabel="loss, smoothed (nats per byte)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    name = f"fp8-curve-{size}"
    figure.savefig(out / f"{name}.png", dpi=130)
    tokens = Schedule(base.schedule).total_sequences * base.data.sequence_length
    setting = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": str(datetime.date.today()),
        "parameters": count_parameters(base.model).total,
        "tokens": tokens,
        "data": base.data.source,
        "smoothing": SMOOTHING,
        "base": BASE,
        "base_last_smoothed_loss": float(smooth[BASE][-1]),
    }
    loss = {run: np.round(of_run, 5).tolist() for run, of_run in losses.items()}
    (out / f"{name}.json").write_text(json.dumps({**setting, "runs": rows, "same": same, "loss": loss}) + "\n")
    lines = [
        f"# FP8 against bfloat16: loss curves ({size})",
        "",
        f"{setting['date']}, {setting['device']}, jax {setting['jax']}. {setting['parameters']:,} parameters, "
        f"{base.schedule.steps:,} steps, {tokens:,} tokens of `{setting['data']}`; one seed, "
        f"the same batches in the same order. Command: `python -m experiments.fp8_curve --size {size}`",
        "",
        f"Losses are smoothed over the steps (exponential mean, {SMOOTHING}) and compared with {RUNS[BASE][0]}'s, "
        f"whose last is {setting['base_last_smoothed_loss']:.4f} nats per byte. The DeepSeek-V3 report (section 3.3) "
        "states a relative error below 0.25%.",
        "",
        "| run | steps | last smoothed loss | difference at the end | mean after warm-up | mean magnitude | largest |",
        "|---|---:|---|---|---|---|---|",
        *(
            f"| {RUNS[name][0]} | {r['steps']:,} | {r['last_smoothed_loss']:.4f} | {r['last_percent']:+.3f}% "
            f"| {r['mean_percent_after_warmup']:+.3f}% | {r['mean_absolute_percent_after_warmup']:.3f}% "
            f"| {r['largest_percent_after_warmup']:.3f}% |"
            for name, r in rows.items()
        ),
        "",
        f"![loss curves]({name}.png)",
        "",
    ]
    if same:
        steps = sorted(next(iter(same.values())))
        of = lambda name, step: "{:+.3f}%, {:.1f}%".format(*same[name][step])
        lines += [
            f"The loss of a held-out batch, and the distance of its gradient from {RUNS[BASE][0]}'s in percent of its "
            f"norm, at the weights of {RUNS[BASE][0]}'s checkpoints:",
            "",
            f"| at step | {' | '.join(RUNS[name][0] for name in same)} |",
            "|---|" + "---|" * len(same),
            *(f"| {step:,} | {' | '.join(of(name, step) for name in same)} |" for step in steps),
            "",
        ]
    (out / f"{name}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
