"""The loop around the training step: progress, metrics, validation, checkpoints, and a clean stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from rich.console import Console

from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError
from dsv3_jax.model.auto import choices
from dsv3_jax.parallel.placement import any_process
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import CONFIG, METRICS, keep_tokenizer, write_config
from dsv3_jax.training.guard import TrainingError, name_not_finite, stop_on_signal
from dsv3_jax.training.metrics import MetricsLog, plot_metrics, read_metrics
from dsv3_jax.training.report import progress, report
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.step import TrainState


class TrainResult(NamedTuple):
    """The end of a run. metrics: the last of each kind."""

    state: TrainState
    metrics: dict[str, Any]
    directory: Path


class Loop:
    """One call of `train`, in a directory that it holds."""

    def __init__(self, setup: Setup, directory: Path, console: Console) -> None:
        self.setup, self.config = setup, setup.config
        self.directory, self.console = directory, console

    def run(self, resume: bool, tokenizer_path: str | Path | None, check_hashes: bool) -> TrainResult:
        """Takes the steps that are left, and leaves a checkpoint of the last one; see `train`."""
        config, setup, primary = self.config, self.setup, jax.process_index() == 0
        checkpoints = Checkpoints(
            self.directory / CHECKPOINTS,
            config.keep_checkpoints,
            keep_every=config.keep_every,
            check_hashes=check_hashes,
        )
        last: dict[str, Any] = {}
        lost, log = False, None
        try:
            if resume:
                state = self._restore(checkpoints)
            else:
                state = setup.placement.init(setup.init, jax.random.key(config.seed))
            if primary:
                write_config(self.directory, config, keep_tokenizer(self.directory, tokenizer_path))
            if not resume:
                self._save(checkpoints, state)  # that there always is one; and a disk without room is noticed now
                checkpoints.wait()
            first, steps = int(state.step), config.schedule.steps
            with jax.set_mesh(setup.placement.mesh):
                self.console.print(choices(config.runtime, config.model, config.data.sequence_length), soft_wrap=True)
            log = MetricsLog(self.directory if primary else None, first_step=first)
            with stop_on_signal() as stopping, progress(self.console, first, steps, config.log_every) as show:
                for step in range(first, steps):
                    state, metrics = setup.train_step(state, *setup.batch(step))
                    if step == first:
                        jax.block_until_ready(metrics)
                        self.console.print(f"first step after {time.perf_counter() - setup.started:.1f} s")
                    done = step + 1
                    setup.throughput.add(setup.schedule.batch_size(step) * config.data.sequence_length)
                    if setup.due(done, config.log_every):
                        self._check_finite(checkpoints, done, metrics)
                        last = log.write(done, metrics | setup.throughput.measure(state.step) | setup.data.metrics())
                    if setup.validation and setup.due(done, config.validate_every):
                        last |= log.write(done, setup.validate(state))
                        setup.throughput.restart()
                    show(done, last)
                    # Several processes agree on it, which takes a message: not at every step.
                    ask = jax.process_count() == 1 or setup.due(done, config.log_every)
                    stop = ask and any_process(stopping())
                    if setup.due(done, config.checkpoint_every) or stop:
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
            setup.data.stop()
            if log is not None:
                log.close()
            if not lost:  # closing waits for the others
                checkpoints.close()
        finished = int(state.step) == config.schedule.steps
        if primary:
            self._finish(state, finished)
        return TrainResult(state, last | {"step": int(state.step), "stopped": not finished}, self.directory)

    def _restore(self, checkpoints: Checkpoints) -> TrainState:
        """The newest state that verifies and is finite, the data's position with it.

        Newer ones are set aside, and it is said.
        """
        restored, passed_over = checkpoints.restore_newest(self.setup.abstract, self._not_finite)
        step = int(restored.state.step)
        try:
            self.setup.data.set_state(restored.data)
        except ConfigError as error:
            raise ConfigError(f"checkpoint {checkpoints.directory / str(step)}: {error}") from None
        for other, why in passed_over.items():
            aside = checkpoints.set_aside(other)
            self.console.print(f"the checkpoint of step {other} is passed over and now {aside}: {why}", soft_wrap=True)
        changes = self.config.changes(TrainConfig.from_json(self.directory / CONFIG)).values()
        changed = f" with another config ({'; '.join(changes)})" if changes else ""
        self.console.print(f"going on from the checkpoint of step {step}{changed}", soft_wrap=True)
        return restored.state

    def _save(self, checkpoints: Checkpoints, state: TrainState) -> None:
        """Saves a state that is finite. Raises TrainingError if it isn't: it would push a good one out."""
        if bad := self._not_finite(state):
            self._stop(checkpoints, int(state.step), bad)
        checkpoints.save(state, self.setup.data.get_state())

    def _not_finite(self, state: TrainState) -> str:
        return name_not_finite(state, self.setup.finite(state))

    def _check_finite(self, checkpoints: Checkpoints, done: int, metrics: dict[str, Any]) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(value := float(metrics[name])):
                self._stop(checkpoints, done, f"{name} is {value}")

    def _stop(self, checkpoints: Checkpoints, done: int, why: str) -> NoReturn:
        raise TrainingError(
            f"{why} at step {done}, which is not saved; the newest checkpoint is of step {checkpoints.latest()}: "
            "try a lower schedule.peak_learning_rate or a longer warm-up"
        )

    def _finish(self, state: TrainState, finished: bool) -> None:
        """Figure, sample and report; of a stopped run only the figure."""
        records = read_metrics(self.directory / METRICS)
        plot_metrics(self.directory / "metrics.png", records, str(self.directory))
        if not finished:
            return
        alone = jax.process_count() == 1  # others would have to take part in sampling
        sample = self.setup.sample(state) if self.config.sample_tokens and alone else ""
        (self.directory / "sample.txt").write_text(sample)
        (self.directory / "report.md").write_text(report(self.config, records, sample))
        if sample:
            self.console.rule("sample")
            self.console.print(sample, markup=False, highlight=False)
            self.console.rule()
