"""Pre-training at a size that a CPU or one GPU does in minutes, and reports whose every figure comes from their JSON.

Experiments share it: a run is a few hundred steps on bytes of Python's standard library, by the ordinary training step.
Each finished run is a file, so that an experiment that was stopped goes on with the next one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import matplotlib
import numpy as np
import scipy.stats
from rich.console import Console

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import DataConfig, load_tokenizer, open_sources, train_iterator, validation_batches
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.directory import replace_file
from dsv3_jax.training.losses import Loss, PretrainingLoss, load_violations, mean_metrics
from dsv3_jax.training.optimizer import OptimizerConfig, make_optimizer
from dsv3_jax.training.schedule import Schedule, ScheduleConfig
from dsv3_jax.training.step import TrainState, init_state, make_eval_step, make_train_step

matplotlib.use("Agg")

RESULTS = Path("docs/results")
Results = dict[str, Any]
Size = Literal["cpu", "gpu"]

SMALL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(num_hidden_layers=3, intermediate_size=256, moe_intermediate_size=48, n_routed_experts=8),
    **dict(num_experts_per_tok=2, n_group=1, topk_group=1, max_position_embeddings=512, initializer_range=0.02),
)
"""The presets' `tiny`, smaller still: about 0.5M parameters that a token uses."""

WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
WIDTHS += ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def enlarged(model: ModelConfig, by: int = 4, layers: int = 8) -> ModelConfig:
    """The model with all widths times `by` and more layers; a model of dense layers alone stays one."""
    widths = {name: by * width for name in WIDTHS if (width := getattr(model, name)) is not None}
    dense = model.first_k_dense_replace == model.num_hidden_layers
    kept = layers if dense else model.first_k_dense_replace
    return dataclasses.replace(model, **widths, num_hidden_layers=layers, first_k_dense_replace=kept)


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """A run: its model, length, seed (of the parameters and of the data's order), and balancing by bias."""

    model: ModelConfig = SMALL
    steps: int = 400
    batch_size: int = 16
    length: int = 128
    seed: int = 0
    peak_learning_rate: float = 3e-3
    bias_update_speed: float = 0.01
    runtime: Runtime = dataclasses.field(default_factory=Runtime)

    @classmethod
    def of(cls, size: Size, model: ModelConfig, steps: int | None = None, **others: Any) -> SmallRun:
        """A run of 2,048 tokens per step for a CPU; in bfloat16, of an enlarged model and 32,768 tokens, for a GPU."""
        if size == "gpu":
            others = dict(batch_size=64, length=512, peak_learning_rate=1e-3) | others
            others |= dict(model=enlarged(model), runtime=Runtime(dtype="bfloat16"))
        return cls(**(dict(model=model, steps=steps or {"cpu": 400, "gpu": 600}[size]) | others))

    @property
    def schedule(self) -> Schedule:
        """The learning rate, MTP weight and bias speed over the run."""
        peak = self.peak_learning_rate
        rates = dict(peak_learning_rate=peak, end_learning_rate=peak / 10, tail_learning_rate=peak / 30)
        config = ScheduleConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            warmup_steps=self.steps // 10,
            constant_until=0.4,
            bias_update_speed=self.bias_update_speed,
            **rates,
        )
        return Schedule(config)

    @property
    def data(self) -> DataConfig:
        """The data, one sequence after another."""
        return DataConfig(sequence_length=self.length, seed=self.seed)

    @property
    def tokens(self) -> int:
        """Tokens that are trained on."""
        return self.steps * self.batch_size * self.length


def pretrain(
    run: SmallRun, loss: Loss | None = None, *, every: int = 20, console: Console | None = None, name: str = "run"
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains from noise; returns the state and the metrics of every `every`-th step, validation with the last one.

    loss: by default pre-training's.
    """
    model, console = DeepSeekV3(run.model, run.runtime), console or Console(stderr=True)
    loss = PretrainingLoss(run.model, run.schedule) if loss is None else loss
    optimizer = make_optimizer(OptimizerConfig(), run.schedule)
    state = init_state(model, optimizer, jax.random.key(run.seed))
    step = jax.jit(make_train_step(model, optimizer, loss), donate_argnums=0)
    tokenizer = load_tokenizer(None)
    opened = open_sources(run.data, tokenizer, console=console)
    data, records = train_iterator(run.data, tokenizer, run.batch_size, opened=opened), []
    for done in range(1, run.steps + 1):
        state, metrics = step(state, _taken(data.next_batch(run.batch_size)))
        if done % every == 0 or done == run.steps:
            records.append({"step": done} | {k: np.asarray(v).tolist() for k, v in metrics.items()})
            console.print(f"{name}: step {done}/{run.steps}, loss {records[-1]['loss']:.3f}")
    data.stop()
    records[-1] |= validate(run, model, state, tokenizer, opened)
    return state, records


def validate(run: SmallRun, model: DeepSeekV3, state: TrainState, tokenizer: Any, opened: Any) -> dict[str, Any]:
    """Metrics over 16 batches of held-out text, the same for every seed."""
    evaluate = jax.jit(make_eval_step(model, PretrainingLoss(run.model, run.schedule)))
    data = dataclasses.replace(run.data, seed=0)
    batches = validation_batches(data, tokenizer, run.batch_size, 16, opened=opened)
    parts = [evaluate(state, _taken(batch)) for batch in batches]
    total = jax.tree.map(lambda *parts: sum(parts), *parts)
    metrics = mean_metrics(total.loss) | load_violations(total.load)
    return {f"validation_{k}": np.asarray(v).tolist() for k, v in metrics.items()}


def _taken(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: batch[k] for k in ("tokens", "targets")}


# Files -----------------------------------------------------------------------------------------------------


def once(file: Path, compute: Callable[[], Any]) -> Any:
    """The JSON in `file`, or `compute()` kept there: a piece of an experiment that isn't done twice."""
    if file.exists():
        return json.loads(file.read_text())
    value = json.loads(json.dumps(compute()))
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(value).encode())
    return value


def compute_pieces(pieces: Mapping[Path, Callable[[], Any]], workers: int = 1) -> list[Any]:
    """`once` of each file, in their order; those that aren't there `workers` at a time, each on its share of the cores.

    The callables must be picklable if there are several workers.
    """
    missing = {file: compute for file, compute in pieces.items() if not file.exists()}
    if workers > 1 and missing:
        how = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        shares = how.Queue()
        for i in range(workers):
            shares.put(cores[i * len(cores) // workers : (i + 1) * len(cores) // workers] or cores)
        with concurrent.futures.ProcessPoolExecutor(workers, how, _on_cores, (shares,)) as pool:
            waiting = [pool.submit(once, file, compute) for file, compute in missing.items()]
            for done in concurrent.futures.as_completed(waiting):
                done.result()
    return [once(file, compute) for file, compute in pieces.items()]


def _on_cores(shares: Any) -> None:
    os.sched_setaffinity(0, shares.get())  # before XLA counts them for its threads


def result_name(name: str, size: Size) -> str:
    """The files' name of a result: that of a GPU stands beside that of a CPU."""
    return name if size == "cpu" else f"{name}-{size}"


def circumstances(command: str) -> dict[str, str]:
    """Date, hardware, versions, commit and command of a result."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = jax.devices()[0]
    hardware = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    return {
        "date": f"{datetime.date.today()}",
        "hardware": hardware,
        "jax": jax.__version__,
        "commit": os.environ.get("COMMIT", commit),  # of a copy that git doesn't know
        "command": command,
    }


def circumstances_line(results: Results) -> str:
    """`circumstances` in a line of a report."""
    c = results["circumstances"]
    return f"{c['date']}, {c['hardware']}, jax {c['jax']}, commit {c['commit']}. Command: `{c['command']}`"


def write_results(
    name: str,
    results: Results,
    render: Callable[[Results], str],
    plot: Callable[[Results, Path], None],
    folder: Path = RESULTS,
) -> None:
    """Writes `NAME.json`, and the report and the figure that follow from it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.md").write_text(render(results))
    plot(results, folder / f"{name}.png")
    print((folder / f"{name}.md").read_text())


# Statistics ------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t), of two values or more."""
    t = float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
