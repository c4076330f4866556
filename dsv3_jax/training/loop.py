"""The training loop: progress, metrics, validation, checkpoints, rollback, and clean stopping."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from rich.console import Console

from dsv3_jax.checkpoint.runs import CHECKPOINTS
from dsv3_jax.config import ConfigError
from dsv3_jax.model.auto import choices
from dsv3_jax.parallel.dispatch import SLACKS
from dsv3_jax.parallel.placement import any_process
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig, traced_steps
from dsv3_jax.training.directory import CONFIG, METRICS, replace_file, write_config
from dsv3_jax.training.figure import draw_runs
from dsv3_jax.training.guard import Guard, TrainingError, name_not_finite, stop_on_signal, watchdog
from dsv3_jax.training.metrics import MetricsLog, read_metrics
from dsv3_jax.training.report import progress, report
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.step import TrainState
from dsv3_jax.training.throughput import Clock
from dsv3_jax.training.trace import Trace

_HEARTBEAT_SECONDS = 10
_Show = Callable[[int, dict[str, Any]], None]


class TrainResult(NamedTuple):
    """The result of a run. metrics: the last value of each metric."""

    state: TrainState
    metrics: dict[str, Any]
    directory: Path


class Loop:
    """One call of `train`, in a locked directory."""

    def __init__(self, setup: Setup, directory: Path, console: Console, clock: Clock) -> None:
        self.setup, self.config, self.clock = setup, setup.config, clock
        self.directory, self.console = directory, console
        self.primary = jax.process_index() == 0
        model = self.config.model
        share = model.num_experts_per_tok / model.n_routed_experts if model.n_routed_experts else 1.0
        self.guard = Guard(self.config.guard, share, self._event, self.config.schedule.warmup_steps)
        self.last: dict[str, Any] = {}
        self._heard = 0.0
        self.taken = 0  # steps, also those that a rollback discards

    def run(self, resume: bool, tokenizer_path: str | Path | None, check_hashes: bool) -> TrainResult:
        """Takes the remaining steps, and saves a checkpoint of the last one; see `train`."""
        config, lost = self.config, False
        self.log: MetricsLog | None = None
        self.checkpoints = Checkpoints(
            self.directory / CHECKPOINTS,
            config.keep_checkpoints,
            keep_every=config.keep_every,
            check_hashes=check_hashes,
        )
        try:
            with self.clock.spent_on("start"):
                state = self._begin(resume, tokenizer_path, check_hashes)
            first, steps = int(state.step), config.schedule.steps
            with stop_on_signal() as stopping, progress(self.console, first, steps, config.log_every) as show:
                state = self._steps(state, stopping, show)
            with self.clock.spent_on("checkpoints"):
                self.checkpoints.wait()
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            lost, why = True, " ".join(str(error).split())[:300]
            raise TrainingError(
                f"process {jax.process_index()} of {jax.process_count()} lost the others ({why}); the newest "
                f"checkpoint is of step {self.checkpoints.latest()}: start all of them again with --resume"
            ) from None
        finally:
            self.setup.data.stop()
            if self.log is not None:
                self.log.close()
            if not lost:  # closing waits for the others
                self.checkpoints.close()
        self._say_summary()
        finished = int(state.step) == config.schedule.steps
        if not self.taken:  # it was at its end already
            self._recall()
        self._finish(state, finished)
        return TrainResult(state, self.last | {"step": int(state.step), "stopped": not finished}, self.directory)

    def _begin(self, resume: bool, tokenizer_path: str | Path | None, check_hashes: bool) -> TrainState:
        """Returns the initial state, saved or restored."""
        config, setup = self.config, self.setup
        if resume:
            state = self._restore()
            if self.primary:
                write_config(self.directory, config, tokenizer_path)
        else:
            state = setup.first_state(check_hashes=check_hashes)
            if config.init_from:
                self.console.print(f"starting from the weights of {config.init_from}", soft_wrap=True)
            self._save(state)  # that there always is one; it is written beside the compilation of the step
        with jax.set_mesh(setup.placement.mesh):
            line = choices(config.runtime, config.model, config.data.sequence_length, training=True)
            self.console.print(line, soft_wrap=True)
        return state

    def _open_log(self, first: int) -> None:
        """Opens the log when there is a checkpoint: without one, a directory with metrics isn't begun in again."""
        with self.clock.spent_on("checkpoints"):
            self.checkpoints.wait()  # a disk without room for the first is noticed now
        directory = self.directory if self.primary else None
        self.log = MetricsLog(directory, first_step=first, wandb_project=self.config.wandb_project)

    def _steps(self, state: TrainState, stopping: Callable[[], bool], show: _Show) -> TrainState:
        """Takes steps until the end of the schedule or a request to stop, and saves the state."""
        config, setup, clock = self.config, self.setup, self.clock
        done = first = int(state.step)
        trace = Trace(traced_steps(config.trace_steps), self.directory / "traces")
        with watchdog(config.guard.hang_seconds) as alive, trace:
            while done < config.schedule.steps:
                trace.before(done + 1)
                with clock.spent_on("data"):
                    batch = setup.batch(done)
                if self.log is None:  # the first, which a run that goes back may take again
                    with clock.spent_on("compilation"):
                        state, metrics = setup.train_step(state, *batch)
                        jax.block_until_ready(metrics)
                    self._open_log(first)
                    self.console.print(f"first step after {time.perf_counter() - setup.started:.1f} s")
                else:
                    state, metrics = setup.train_step(state, *batch)
                setup.throughput.add(setup.schedule.batch_size(done) * config.data.sequence_length)
                done, self.taken = done + 1, self.taken + 1
                trace.after(done, state)
                self.guard.watch(done, metrics)
                self._stop_if_stuck(state, batch, done)
                self._record(state, done, metrics)
                show(done, self.last)
                stop = self._asked_to_stop(stopping, done)
                if setup.due(done, config.checkpoint_every) or stop:
                    with clock.spent_on("checkpoints"):
                        self.guard.settle()
                        self._stop_if_stuck(state, batch, done)
                        self._save(state)
                if stop:
                    break
                if self.guard.off_course:
                    state = self._roll_back(done)
                    done = int(state.step)
                alive()
        return state

    def _stop_if_stuck(self, state: TrainState, batch: tuple[Any, ...], done: int) -> None:
        """Raises TrainingError if too many steps in a row were skipped."""
        if self.guard.stuck:
            where = self.setup.diagnose(state, batch)
            skipped = f"{self.guard.skipped_in_a_row} steps in a row had a loss or gradient that isn't finite"
            self._stop(done, f"{skipped} and were skipped; {where}")

    def _record(self, state: TrainState, done: int, metrics: dict[str, Any]) -> None:
        """Writes metrics, validates, and writes the heartbeat, each when due."""
        assert self.log is not None
        config, setup = self.config, self.setup
        if setup.due(done, config.log_every):
            extra = setup.throughput.measure(state.step) | self.clock.metrics() | setup.data.metrics()
            self.guard.settle()  # or skips of the last steps would be missing
            self.last = self.log.write(done, metrics | extra | {"skipped": self.guard.skipped})
            self._choose_slack(done)
        if setup.validation and setup.due(done, config.validate_every):
            with self.clock.spent_on("validation"), setup.throughput.paused(state.step):
                self.last |= self.log.write(done, setup.validate(state))
        if time.monotonic() - self._heard > _HEARTBEAT_SECONDS:
            self._heard = time.monotonic()
            sign = {"step": done, "time": time.time(), "process": os.getpid(), "host": socket.gethostname()}
            replace_file(self.directory / f"heartbeat-{jax.process_index()}.json", json.dumps(sign).encode())

    def _choose_slack(self, done: int) -> None:
        """Makes the buffers of dispatch larger, if tokens are often sent in several rounds. After the warm-up, since
        routing is uneven while the model learns to balance; each size once, since the step is compiled anew.
        """
        chosen, needed = self.setup.dispatch_slack or SLACKS[0], self.last.get("dispatch_slack_needed", 0.0)
        free = self.config.runtime.dispatch_slack is None and done >= self.config.schedule.warmup_steps
        if free and needed > chosen and self.last["dispatch_in_rounds"] > 0.1:
            self._event(done, f"dispatch_slack is {needed:g} from here on: tokens were sent in several rounds")
            self.setup.use_slack(needed)
            self.setup.throughput.restart()

    def _asked_to_stop(self, stopping: Callable[[], bool], done: int) -> bool:
        """Whether any process of the job received a signal, so that all stop after the same step."""
        if jax.process_count() == 1:
            return stopping()
        # Ctrl-C takes a message: not at every step.
        return self.setup.due(done, self.config.log_every) and any_process(stopping())

    def _restore(self) -> TrainState:
        """Restores the newest valid and finite state, with its position in the data.

        Newer checkpoints are set aside, with a message.
        """
        checkpoints = self.checkpoints
        restored, passed_over = checkpoints.restore_newest(self.setup.abstract, self._not_finite)
        step = int(restored.state.step)
        try:
            self.setup.data.set_state(restored.data)
        except ConfigError as error:
            raise ConfigError(f"checkpoint {checkpoints.directory / str(step)}: {error}") from None
        self.guard.set_state(restored.run.get("guard", {}))
        slack = restored.run.get("dispatch_slack")
        if self.config.runtime.dispatch_slack is None and slack != self.setup.dispatch_slack:
            self.setup.use_slack(slack)
        checkpoints.pass_over(passed_over, lambda line: self.console.print(line, soft_wrap=True))
        changes = self.config.changes(TrainConfig.from_json(self.directory / CONFIG)).values()
        changed = f" with another config ({'; '.join(changes)})" if changes else ""
        self.console.print(f"going on from the checkpoint of step {step}{changed}", soft_wrap=True)
        return restored.state

    def _roll_back(self, done: int) -> TrainState:
        """Restores the newest good checkpoint. The data continues after the spike."""
        good, limit = self.checkpoints.good, self.config.guard.max_rollbacks
        if good is None or self.guard.rollbacks >= limit:
            self._stop(done, f"the loss spikes after {self.guard.rollbacks} rollbacks (guard.max_rollbacks is {limit})")
        with self.clock.spent_on("rollback"):
            self.checkpoints.wait()
            for step in self.checkpoints.steps():
                if step > good:
                    self.checkpoints.set_aside(step)
            state = self.checkpoints.restore(self.setup.abstract, good).state
            self.guard.rolled_back()
        assert self.log is not None
        self.log.rewind(good)
        self._event(good, f"rolled back from step {done}, on with the data that follows it")
        self.setup.throughput.restart()
        return state

    def _save(self, state: TrainState) -> None:
        """Saves a state. Raises TrainingError if it isn't finite, since it would displace a good one."""
        if bad := self._not_finite(state):
            self._stop(int(state.step), f"{bad} at step {int(state.step)}, which is not saved")
        run = {"guard": self.guard.state(), "dispatch_slack": self.setup.dispatch_slack}
        self.checkpoints.save(state, self.setup.data.get_state(), run, good=self.guard.well)

    def _not_finite(self, state: TrainState) -> str:
        return name_not_finite(state, self.setup.finite(state))

    def _event(self, step: int, what: str) -> None:
        self.console.print(f"step {step}: {what}", soft_wrap=True)
        if self.log is not None:
            self.log.event(step, what)

    def _stop(self, done: int, why: str) -> NoReturn:
        raise TrainingError(
            f"{why}; stopped at step {done}, the newest checkpoint is of step {self.checkpoints.latest()}: "
            "try a lower schedule.peak_learning_rate or a longer warm-up"
        )

    def _say_summary(self) -> None:
        last, guard = self.last, self.guard
        parts = [f"{self.taken} steps in {self.clock.wall:,.0f} s", str(self.clock)]
        parts += [f"{last['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in last else []
        parts += [f"MFU {last['mfu']:.1%}"] if "mfu" in last else []
        parts += [f"{guard.skipped} skipped"] if guard.skipped else []
        parts += [f"{guard.rollbacks} rollbacks"] if guard.rollbacks else []
        self.console.print("; ".join([*parts, f"newest checkpoint: step {self.checkpoints.latest()}"]), soft_wrap=True)

    def _recall(self) -> None:
        """Takes the last metrics from the log of the run before."""
        metrics = self.directory / METRICS
        for record in read_metrics(metrics) if metrics.exists() else []:
            self.last |= {name: value for name, value in record.items() if name not in ("step", "event")}

    def _finish(self, state: TrainState, finished: bool) -> None:
        """Writes figure, sample and report; for a stopped run only the figure. All processes sample together."""
        metrics = self.directory / METRICS
        records = read_metrics(metrics) if self.primary and metrics.exists() else []
        if self.primary:
            (self.directory / "metrics.png").write_bytes(draw_runs({str(self.directory): records}))
        if not finished:
            return
        sample = self.setup.sample(state) if self.config.sample_tokens else ""
        if not self.primary:
            return
        (self.directory / "sample.txt").write_text(sample)
        (self.directory / "report.md").write_text(report(self.config, records, sample))
        if sample:
            self.console.rule("sample")
            self.console.print(sample, markup=False, highlight=False)
            self.console.rule()
