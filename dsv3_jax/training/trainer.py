"""The loop around the training step: data, progress, metrics, validation, checkpoints, and a clean stop."""

from __future__ import annotations

import contextlib
import datetime
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dsv3_jax.config import ConfigError
from dsv3_jax.data import load_tokenizer, train_iterator, validation_batches
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.placement import Placement, all_processes_here, any_process
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import keep_tokenizer, kept_tokenizer, write_config
from dsv3_jax.training.metrics import MetricsLog, plot_metrics, read_metrics, worst_violation
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import TrainState, evaluate_tally, init_state, make_eval_step, make_train_step
from dsv3_jax.training.throughput import Throughput


class TrainingError(RuntimeError):
    """Training can't go on: the message says why, and what is saved."""


def train(
    config: TrainConfig, directory: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Trains to the last step of the schedule, or continues a run that was stopped.

    Args:
      directory: the run's own; `config.json`, the tokenizer's files, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
        `metrics.png`, `sample.txt` and `report.md` go there.
      resume: continue the run in `directory` from its newest checkpoint, to the same numbers.

    Returns:
      The last metrics. `stopped` among them is true if Ctrl-C or SIGTERM ended the run early; it is saved then.

    Raises:
      ConfigError: `directory` holds another run, or the data doesn't fit the model.
      CheckpointError: a checkpoint couldn't be written or read.
      TrainingError: the loss is no longer finite.
    """
    primary = jax.process_index() == 0
    console = console or Console(quiet=not primary)
    check_directory(config, directory, resume=resume)
    tokenizer_path = kept_tokenizer(directory, config.data.tokenizer) if resume else config.data.tokenizer
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens: "
            "the model's must be at least as large"
        )
    run = _Run(config, directory, tokenizer, console)  # reads the data: a failure leaves no directory behind
    all_processes_here()  # before one of them puts something into the directory that the others look at
    if primary:
        directory.mkdir(parents=True, exist_ok=True)
        write_config(directory, config, keep_tokenizer(directory, tokenizer_path))
    all_processes_here()
    return run.run(resume)


def check_directory(config: TrainConfig, directory: Path, *, resume: bool) -> None:
    """Raises ConfigError if a run of `config` in `directory` would mix two runs, or there is nothing to resume."""
    path = directory / "config.json"
    if path.exists():
        differences = config.differences(TrainConfig.from_json(path))
        if differences:
            raise ConfigError(
                f"{directory} holds a run of another config ({'; '.join(differences)}): choose another --run-dir"
            )
        if not resume:
            raise ConfigError(
                f"{directory} holds this run already: add --resume to continue it, or choose another --run-dir"
            )
        return
    if resume:
        raise ConfigError(f"{directory} holds no run to resume: start it without --resume")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty and holds no run: choose another --run-dir")


class _Run:
    """One call of `train`: what its parts share."""

    def __init__(self, config: TrainConfig, directory: Path, tokenizer: Any, console: Console) -> None:
        self.config, self.directory, self.tokenizer, self.console = config, directory, tokenizer, console
        self.model = DeepSeekV3(config.model, config.runtime)
        self.schedule = Schedule(config.schedule)
        self.optimizer = make_optimizer(config.optimizer, self.schedule)
        self.placement = Placement(config.mesh, config.runtime)
        self.evaluate = self.placement.jit_evaluation(make_eval_step(self.model))
        self.data = train_iterator(config.data, tokenizer, self.schedule.batch_size(0))
        self.validation = []
        if config.data.validation_fraction:
            count, size = config.validation_batches, config.schedule.batch_size
            self.validation = validation_batches(config.data, tokenizer, size, count)
        self.throughput = Throughput(config.model, config.data.sequence_length)

    def run(self, resume: bool) -> dict[str, Any]:
        checkpoints = Checkpoints(self.directory / "checkpoints", self.config.keep_checkpoints)
        init = lambda key: init_state(self.model, self.optimizer, key)
        state = self.placement.init(init, jax.random.key(self.config.seed))
        step_function = make_train_step(
            self.model, self.optimizer, self.schedule, microbatches=self.config.microbatches
        )
        train_step = self.placement.jit_step(step_function, state)
        if resume and checkpoints.latest() is not None:
            state, data_state = checkpoints.restore(state)
            self.data.set_state(data_state)
        first = int(state.step)
        primary = jax.process_index() == 0
        log = MetricsLog(self.directory if primary else None, first_step=first)
        last: dict[str, Any] = {}
        lost = False
        try:
            with _stop_on_signal() as stopping, self._progress(first) as report:
                for step in range(first, self.config.schedule.steps):
                    state, metrics = train_step(state, self._batch(step))
                    done = step + 1
                    self.throughput.add(self.schedule.batch_size(step) * self.config.data.sequence_length)
                    if self._due(done, self.config.log_every):
                        last = self._record(log, done, metrics | self.throughput.measure(state.step), checkpoints)
                    if self.validation and self._due(done, self.config.validate_every):
                        last |= log.write(done, self._validate(state))
                        self.throughput.restart()
                    report(done, last)
                    # Several processes agree on it, which takes a message: not at every step.
                    ask = jax.process_count() == 1 or self._due(done, self.config.log_every)
                    stop = ask and any_process(stopping())
                    if self._due(done, self.config.checkpoint_every) or stop:
                        checkpoints.save(state, self.data.get_state())
                    if stop:
                        break
            checkpoints.wait()
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            lost, why = True, " ".join(str(error).split())[:300]
            raise TrainingError(
                f"process {jax.process_index()} of {jax.process_count()} lost the others ({why}); the newest "
                f"checkpoint is of step {checkpoints.latest()}: start all of them again with --resume"
            ) from None
        finally:
            log.close()
            if not lost:  # closing waits for the others
                checkpoints.close()
        finished = int(state.step) == self.config.schedule.steps
        if primary:
            self._finish(state, finished)
        return last | {"step": int(state.step), "stopped": not finished}

    def _batch(self, step: int) -> dict[str, jax.Array]:
        size = self.schedule.batch_size(step)
        rows = self.placement.rows(size)
        return self._placed(rows, self.data.next_batch(size, rows), size)

    def _placed(self, rows: np.ndarray, batch: dict[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        return self.placement.batch(rows, _model_inputs(batch, self.config.data.mask_documents), size)

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.schedule.steps

    def _record(self, log: MetricsLog, done: int, metrics: dict[str, Any], checkpoints: Checkpoints) -> dict[str, Any]:
        plain = log.write(done, metrics)
        if not np.isfinite(plain["loss"]):
            raise TrainingError(
                f"the loss is {plain['loss']} at step {done}; the newest checkpoint is of step {checkpoints.latest()}: "
                "try a lower schedule.peak_learning_rate or a longer warm-up"
            )
        return plain

    def _validate(self, state: TrainState) -> dict[str, Any]:
        size = len(self.validation[0]["tokens"])
        every = np.arange(size)
        tallies = [self.evaluate(state, self._placed(every, batch, size)) for batch in self.validation]
        total = jax.tree.map(lambda *parts: sum(parts), *tallies)
        return {f"validation_{k}": v for k, v in evaluate_tally(total).items()}

    @contextlib.contextmanager
    def _progress(self, first: int) -> Iterator[Any]:
        """A bar on a terminal, a line every `log_every` steps elsewhere."""
        steps = self.config.schedule.steps
        if not self.console.is_terminal:
            began = time.monotonic()

            def line(done: int, last: dict[str, Any]) -> None:
                if self._due(done, self.config.log_every):
                    left = (time.monotonic() - began) / (done - first) * (steps - done)
                    self.console.print(
                        f"step {done}/{steps}  {_summary(last)}  {datetime.timedelta(seconds=round(left))} left"
                    )

            yield line
            return
        columns = (
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("training", total=steps, completed=first, summary="compiling")
            yield lambda done, last: bar.update(task, completed=done, summary=_summary(last))

    def _finish(self, state: TrainState, finished: bool) -> None:
        """Figure, sample and report; of a stopped run only the figure."""
        records = read_metrics(self.directory / "metrics.jsonl")
        plot_metrics(self.directory / "metrics.png", records, str(self.directory))
        if not finished:
            return
        alone = jax.process_count() == 1  # others would have to take part in sampling
        sample = self._sample(state) if self.config.sample_tokens and alone else ""
        (self.directory / "sample.txt").write_text(sample)
        (self.directory / "report.md").write_text(_report(self.config, records, sample))
        if sample:
            self.console.rule("sample")
            self.console.print(sample, markup=False, highlight=False)
            self.console.rule()

    def _sample(self, state: TrainState) -> str:
        prompt = [self.tokenizer.bos_id, *map(int, self.tokenizer.encode(self.config.sample_prompt))]
        room = self.config.model.max_position_embeddings - len(prompt)
        new = generate(
            self.model,
            state.variables,
            [prompt],
            min(self.config.sample_tokens, room),
            sampling=Sampling(temperature=0.7, top_p=0.95),
            key=jax.random.key(self.config.seed),
        )[0]
        ends = np.flatnonzero(new == self.tokenizer.eos_id)
        return self.config.sample_prompt + self.tokenizer.decode(new[: ends[0]] if len(ends) else new)


def _model_inputs(batch: dict[str, np.ndarray], mask_documents: bool) -> dict[str, np.ndarray]:
    """What the step takes: without document masks, as in the report (section 4.1), only tokens and targets."""
    keys = ("tokens", "targets", "segments", "positions") if mask_documents else ("tokens", "targets")
    return {k: batch[k] for k in keys}


def _summary(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
    if "validation_loss" in metrics:
        parts.append(f"validation {metrics['validation_loss']:.3f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if (violation := worst_violation(metrics)) is not None:
        parts.append(f"load violation {violation:.2f}")
    return "  ".join(parts)


def _report(config: TrainConfig, records: list[dict[str, Any]], sample: str) -> str:
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    rows: list[tuple[str, Any]] = [
        ("steps", config.schedule.steps),
        ("tokens", Schedule(config.schedule).total_sequences * config.data.sequence_length),
    ]
    rows += [(k, f"{v:.4g}") for k, v in last.items() if isinstance(v, float)]
    if (violation := worst_violation(last)) is not None:
        rows.append(("largest load violation of a layer (max / mean - 1)", f"{violation:.3f}"))
    rows += [("device", jax.devices()[0].device_kind), ("jax", jax.__version__), ("date", f"{datetime.date.today()}")]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = (
        f"# Training run\n\n| | at the end |\n|---|---|\n{table}\n\n"
        "Losses are in nats a token. The run's config is in `config.json`.\n\n![loss and expert load](metrics.png)\n"
    )
    return text + (f"\n## Sample\n\n```\n{sample}\n```\n" if sample else "")


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Any]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second acts as ever."""
    asked: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: Any) -> None:
        asked.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    try:
        for s in before:
            signal.signal(s, ask)
    except ValueError:  # not in the main thread, where Python lets nobody set handlers
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
