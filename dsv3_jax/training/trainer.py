"""The loop around the training step: data, progress, metrics, validation, checkpoints, and a clean stop."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
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

from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError
from dsv3_jax.data import load_tokenizer, train_iterator, validation_batches
from dsv3_jax.inference.generate import generate, longest
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.auto import choices
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.placement import OnMesh, Placement, all_processes_here, any_process
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import (
    CONFIG,
    METRICS,
    check_config,
    check_directory,
    keep_tokenizer,
    kept_tokenizer,
    locked,
    write_config,
)
from dsv3_jax.training.losses import PretrainingLoss, load_violations, mean_metrics
from dsv3_jax.training.metrics import MetricsLog, plot_metrics, read_metrics, worst_violation
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import TrainState, init_state, make_eval_step, make_train_step
from dsv3_jax.training.throughput import Throughput


class TrainResult(NamedTuple):
    """The end of a run. metrics: the last of each kind."""

    state: TrainState
    metrics: dict[str, Any]
    directory: Path


class TrainingError(RuntimeError):
    """Training can't go on: the message says why, and what is saved."""


def train(
    config: TrainConfig,
    directory: Path | str | None = None,
    *,
    resume: bool = False,
    check_hashes: bool = True,
    console: Console | None = None,
) -> TrainResult:
    """Trains to the last step of the schedule, or continues a run that was stopped.

    Args:
      directory: the run's own; `config.json`, the tokenizer's files, `metrics.jsonl`, `tensorboard/`, `checkpoints/`,
        `metrics.png`, `sample.txt` and `report.md` go there. By default a new one in `runs/`, named by date and time.
      resume: continue the run in `directory` from its newest finite checkpoint; on a CPU to the same bits.
      check_hashes: compare that checkpoint's files with the hashes that were saved with them.

    Returns:
      The state, the last metrics and the directory. `stopped` among the metrics is true if Ctrl-C or SIGTERM ended the
      run early; it is saved then.

    Raises:
      ConfigError: `directory` holds another run or is held by another process, there is nothing to resume, or
        something that the run would meet later (a batch of the ramp, validation, the sample) doesn't suit the rest.
      CheckpointError: a checkpoint couldn't be written or read.
      TrainingError: the loss, the gradient or the state is no longer finite: nothing of it is saved.
    """
    console = console or Console(quiet=jax.process_index() != 0)
    directory = Path(directory or f"runs/{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    check_config(config)
    check_directory(config, directory, resume=resume)
    tokenizer_path = kept_tokenizer(directory, config.data.tokenizer) if resume else config.data.tokenizer
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens: "
            "the model's must be at least as large"
        )
    # A preset's are those of another tokenizer.
    model = dataclasses.replace(config.model, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    config = dataclasses.replace(config, model=model)
    run = _Run(config, directory, tokenizer, console)  # reads the data: a failure leaves no directory behind
    all_processes_here()  # before one of them puts something into the directory that the others look at
    with _held_by_one(directory, console):
        check_directory(config, directory, resume=resume)  # again: another process may have been faster
        return run.run(resume, tokenizer_path, check_hashes)


@contextlib.contextmanager
def _held_by_one(directory: Path, console: Console) -> Iterator[None]:
    """Holds the run's directory for this job: its first process does."""
    with contextlib.ExitStack() as stack:
        refused = None
        if jax.process_index() == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if warning := stack.enter_context(locked(directory)):
                    console.print(f"warning: {warning}")
            except (ConfigError, OSError) as error:
                refused = error
        if any_process(refused is not None):
            raise refused or ConfigError(f"{directory} can't be used: process 0 says why")
        yield


class _Run:
    """One call of `train`: what its parts share."""

    def __init__(self, config: TrainConfig, directory: Path, tokenizer: Any, console: Console) -> None:
        self.config, self.directory, self.tokenizer, self.console = config, directory, tokenizer, console
        self.model = DeepSeekV3(config.model, config.runtime)
        self.schedule = Schedule(config.schedule)
        loss = PretrainingLoss(config.model, self.schedule)
        optimizer = make_optimizer(config.optimizer, self.schedule)
        self.init = lambda key: init_state(self.model, optimizer, key)
        self.placement = Placement(config.mesh, config.runtime, parameter_axes(self.model))
        self.abstract, _ = self.placement.abstract(self.init, {})
        step = make_train_step(self.model, optimizer, loss, microbatches=config.microbatches)
        self.train_step = self.placement.jit_step(step, self.abstract)
        self.evaluate = self.placement.jit_evaluation(make_eval_step(self.model, loss))
        self.finite = self.placement.jit_evaluation(all_finite)
        sizes = [stage.batch_size for stage in self.schedule.stages]
        ramp = f" (schedule's sizes are {', '.join(map(str, sizes))})" if len(sizes) > 1 else ""
        for stage in self.schedule.stages:
            self._check(self.train_step, stage.batch_size, f"the batch from step {stage.start_step} on{ramp}")
        self.sample_prompt, self.sample_tokens = self._sample_request()
        self.data = train_iterator(config.data, tokenizer, self.schedule.batch_size(0))
        self.validation = []
        if config.data.validation_fraction:
            self.validation = validation_batches(
                config.data,
                tokenizer,
                config.schedule.batch_size,
                config.validation_batches,
                multiple_of=self.placement.parts,
            )
            self._check(self.evaluate, len(self.validation[0]["tokens"]), "validation")
        self.throughput = Throughput(config.model, config.data.sequence_length)

    def _check(self, function: OnMesh, size: int, what: str) -> None:
        """Traces a step for a batch of `size`: what can't be is said before the first step, not in the middle."""
        names = _inputs(self.config.data.mask_documents)
        try:
            function.check(self.abstract, self.placement.abstract_batch(names, size, self.config.data.sequence_length))
        except ValueError as error:
            raise ConfigError(f"{what}: {error}") from error

    def run(self, resume: bool, tokenizer_path: str | Path | None, check_hashes: bool) -> TrainResult:
        config, primary = self.config, jax.process_index() == 0
        checkpoints = Checkpoints(self.directory / CHECKPOINTS, config.keep_checkpoints, check_hashes=check_hashes)
        last: dict[str, Any] = {}
        lost, log = False, None
        try:
            state = self.placement.init(self.init, jax.random.key(config.seed))
            if resume:
                state = self._restore(checkpoints, state)
            if primary:
                write_config(self.directory, config, keep_tokenizer(self.directory, tokenizer_path))
            if not resume:
                self._save(checkpoints, state)  # that there always is one; and a disk without room is noticed now
                checkpoints.wait()
            first = int(state.step)
            with jax.set_mesh(self.placement.mesh):
                self.console.print(choices(config.runtime, config.model, config.data.sequence_length), soft_wrap=True)
            log = MetricsLog(self.directory if primary else None, first_step=first)
            with _stop_on_signal() as stopping, self._progress(first) as report:
                for step in range(first, config.schedule.steps):
                    state, metrics = self.train_step(state, self._batch(step))
                    done = step + 1
                    self.throughput.add(self.schedule.batch_size(step) * config.data.sequence_length)
                    if self._due(done, config.log_every):
                        self._check_finite(checkpoints, done, metrics)
                        last = log.write(done, metrics | self.throughput.measure(state.step))
                    if self.validation and self._due(done, config.validate_every):
                        last |= log.write(done, self._validate(state))
                        self.throughput.restart()
                    report(done, last)
                    # Several processes agree on it, which takes a message: not at every step.
                    ask = jax.process_count() == 1 or self._due(done, config.log_every)
                    stop = ask and any_process(stopping())
                    if self._due(done, config.checkpoint_every) or stop:
                        self._check_finite(checkpoints, done, metrics)
                        self._save(checkpoints, state)
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
            if log is not None:
                log.close()
            if not lost:  # closing waits for the others
                checkpoints.close()
        finished = int(state.step) == config.schedule.steps
        if primary:
            self._finish(state, finished)
        return TrainResult(state, last | {"step": int(state.step), "stopped": not finished}, self.directory)

    def _restore(self, checkpoints: Checkpoints, state: TrainState) -> TrainState:
        """The newest state that is finite, the data's position with it. Newer ones are set aside, and it is said."""
        passed_over = []
        for step in reversed(checkpoints.steps()):
            state, position = checkpoints.restore(state, step)
            bad = self._not_finite(state)
            if not bad:
                break
            self.console.print(f"the checkpoint of step {step} is passed over: {bad}")
            passed_over.append(step)
        else:
            raise TrainingError(f"{checkpoints.directory} has no finite checkpoint to go on from")
        try:
            self.data.set_state(position)
        except ConfigError as error:
            raise ConfigError(f"checkpoint {checkpoints.directory / str(step)}: {error}") from None
        for other in passed_over:
            self.console.print(f"it is kept in {checkpoints.set_aside(other)}")
        changes = self.config.changes(TrainConfig.from_json(self.directory / CONFIG)).values()
        changed = f" with another config ({'; '.join(changes)})" if changes else ""
        self.console.print(f"going on from the checkpoint of step {step}{changed}", soft_wrap=True)
        return state

    def _save(self, checkpoints: Checkpoints, state: TrainState) -> None:
        """Saves a state that is finite. Raises TrainingError if it isn't: it would push a good one out."""
        if bad := self._not_finite(state):
            self._stop(checkpoints, int(state.step), bad)
        checkpoints.save(state, self.data.get_state())

    def _not_finite(self, state: TrainState) -> str:
        """Names the arrays that hold numbers that aren't finite; empty if none does."""
        finite = np.asarray(self.finite(state))
        names = [name for name, good in zip(_floats(state), finite, strict=True) if not good]
        more = f" and {len(names) - 1} more arrays" if len(names) > 1 else ""
        return f"{names[0]}{more} of the state isn't finite" if names else ""

    def _check_finite(self, checkpoints: Checkpoints, done: int, metrics: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(value := float(metrics[name])):
                self._stop(checkpoints, done, f"{name} is {value}")

    def _stop(self, checkpoints: Checkpoints, done: int, why: str) -> NoReturn:
        raise TrainingError(
            f"{why} at step {done}, which is not saved; the newest checkpoint is of step {checkpoints.latest()}: "
            "try a lower schedule.peak_learning_rate or a longer warm-up"
        )

    def _batch(self, step: int) -> dict[str, jax.Array]:
        size = self.schedule.batch_size(step)
        rows = self.placement.rows(size)
        return self._placed(rows, self.data.next_batch(size, rows), size)

    def _placed(self, rows: np.ndarray, batch: dict[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        taken = {name: batch[name] for name in _inputs(self.config.data.mask_documents)}
        return self.placement.batch(rows, taken, size)

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.schedule.steps

    def _validate(self, state: TrainState) -> dict[str, Any]:
        size = len(self.validation[0]["tokens"])
        every = np.arange(size)
        parts = [self.evaluate(state, self._placed(every, batch, size)) for batch in self.validation]
        total = jax.tree.map(lambda *parts: sum(parts), *parts)
        metrics = mean_metrics(total.loss) | load_violations(total.load)
        return {f"validation_{k}": v for k, v in metrics.items()}

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
        records = read_metrics(self.directory / METRICS)
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

    def _sample_request(self) -> tuple[list[int], int]:
        """The prompt of the sample at the end, and how many tokens are to follow. Raises ConfigError."""
        prompt = [self.tokenizer.bos_id, *map(int, self.tokenizer.encode(self.config.sample_prompt))]
        room = longest(self.model) - len(prompt)
        if self.config.sample_tokens and room < 1:
            raise ConfigError(
                f"sample_prompt has {len(prompt)} tokens, which leaves no room of the {longest(self.model)} for a "
                "sample: shorten it, or set sample_tokens to 0"
            )
        return prompt, min(self.config.sample_tokens, room)

    def _sample(self, state: TrainState) -> str:
        new = generate(
            self.model,
            state.variables,
            [self.sample_prompt],
            self.sample_tokens,
            sampling=Sampling(temperature=0.7, top_p=0.95),
            key=jax.random.key(self.config.seed),
            end_ids=[self.tokenizer.eos_id],
        )[0]
        return self.tokenizer.decode([*self.sample_prompt, *new])


def _inputs(mask_documents: bool) -> tuple[str, ...]:
    """Keys of a batch that the step takes: without document masks (report section 4.1), only tokens and targets."""
    return ("tokens", "targets", "segments", "positions") if mask_documents else ("tokens", "targets")


def _floats(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a state that hold floats, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): x for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


def all_finite(state: TrainState) -> jax.Array:
    """For each floating-point array of a state, whether all of its numbers are finite."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in _floats(state).values()])


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
