"""The parts of a run before its first step: model, jitted steps, placement, data; validated but not run."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.data import open_sources, train_iterator, validation_batches
from dsv3_jax.data.pipeline import holds_out
from dsv3_jax.inference.generate import generate, longest
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.model.transformer import DeepSeekV3, parameter_axes
from dsv3_jax.parallel.placement import Placement
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.diagnose import (
    first_in_backward,
    first_in_forward,
    make_forward_check,
    make_gradient_check,
)
from dsv3_jax.training.guard import all_finite
from dsv3_jax.training.initial import state_from
from dsv3_jax.training.losses import IGNORE, Loss, PretrainingLoss, SFTLoss, load_violations, mean_metrics
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import Schedule
from dsv3_jax.training.step import TrainState, init_state, make_eval_step, make_train_step
from dsv3_jax.training.throughput import Throughput


class Cut(NamedTuple):
    """Number of microbatches of a batch, and of its sequences with padding."""

    microbatches: int
    sequences: int


def cut_largest(sizes: Sequence[int], microbatches: int, unit: int) -> Cut:
    """Splits batches of `sizes` into microbatches such that one program serves all of them.

    A microbatch has about as many sequences as the smallest batch, or fewer if the largest batch requires it for
    `microbatches`, in multiples of `unit`. A batch takes as many as it needs, the last one padded.
    """
    pieces = max(microbatches, -(-max(sizes) // min(sizes)))
    size = -(-max(sizes) // (pieces * unit)) * unit
    pieces = -(-max(sizes) // size)
    return Cut(pieces, pieces * size)


def cut_evenly(sequences: int, least: int, unit: int) -> int:
    """Returns the smallest number of equal microbatches, at least `least`, each of a multiple of `unit` sequences.

    If that is impossible, microbatches have `unit` sequences, which must divide the batch.
    """
    most = sequences // unit
    return next((n for n in range(least, most) if most % n == 0), most)


class Setup:
    """The parts of a run. Raises ConfigError for problems that the run would encounter later.

    init: a state at step 0, from a typed key. abstract: its shapes, dtypes and shardings. data: the iterator of
    training batches. validation: batches as NumPy arrays. init, train_step, evaluate and finite are jitted.

    With `ahead`, in a job of one process, `train_step` is compiled in a thread from the moment that it and the data are
    known to be right, if all batches have one shape; and `init` before that, unless the run is to `resume` or starts
    from other weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        tokenizer_path: str | Path | None = None,
        console: Console | None = None,
        *,
        ahead: bool = False,
        resume: bool = False,
    ) -> None:
        self.started = time.perf_counter()
        if config.wandb_project is not None:
            try:
                importlib.import_module("wandb")
            except ImportError:
                project = config.wandb_project
                raise ConfigError(f"wandb_project is {project!r}, but it isn't installed: pip install wandb") from None
        self.config, self.tokenizer = config, tokenizer
        self.model = DeepSeekV3(config.model, config.runtime)
        self.sample_prompt, self.sample_tokens = self._sample_request()
        self.schedule = Schedule(config.schedule)
        loss = _loss(config, self.schedule)
        optimizer = make_optimizer(config.optimizer, self.schedule)
        ahead = ahead and jax.process_count() == 1
        self._optimizer, self._objective = optimizer, loss
        self.placement = Placement(config.mesh, config.runtime, parameter_axes(self.model))
        init = lambda key: init_state(self.model, optimizer, key)
        self.abstract, _ = self.placement.abstract(init, {})
        self.init = self.placement.jit_init(init)
        if ahead and not resume and config.init_from is None:
            self.init.check(jax.random.key(config.seed))
            self.init.compile_ahead()
        sizes = [stage.batch_size for stage in self.schedule.ramp]
        self.cut = None
        if len(sizes) > 1 and self.placement.sharding.size("layers") == 1:
            unit = self.placement.parts * config.runtime.interleave
            self.cut = cut_largest(sizes, config.microbatches, unit)
        microbatches = self.cut.microbatches if self.cut else config.microbatches
        self._microbatches = microbatches
        self.use_slack(config.runtime.dispatch_slack)
        self._checks = (
            self.placement.jit_evaluation(make_forward_check(self.model, loss)),
            self.placement.jit_evaluation(make_gradient_check(self.model, loss, microbatches)),
        )
        self.finite = self.placement.jit_evaluation(all_finite)
        ramp = f" (schedule's sizes are {', '.join(map(str, sizes))})" if len(sizes) > 1 else ""
        if self.cut:
            self._check(self.train_step.check, self.cut.sequences, f"the largest batch{ramp}", np.int32(sizes[0]))
        else:
            for stage in self.schedule.ramp:
                self._check(self.train_step.check, stage.batch_size, f"the batch from step {stage.start_step} on{ramp}")
        opened = open_sources(config.data, tokenizer, tokenizer_path, console)
        self.data = train_iterator(config.data, tokenizer, self.schedule.batch_size(0), opened=opened)
        self.validation = []
        if holds_out(opened):
            self.validation = validation_batches(
                config.data,
                tokenizer,
                config.schedule.batch_size,
                config.validation_batches,
                multiple_of=self.placement.parts,
                opened=opened,
            )
        one_program = self.cut is not None or len(sizes) == 1
        may_be_another = resume and self.placement.sharding.size("experts") > 1  # one with the run's `dispatch_slack`
        if ahead and one_program and not may_be_another:  # the rest is done meanwhile
            self.train_step.compile_ahead()
        if self.validation:
            size = len(self.validation[0]["tokens"])
            unit = self.placement.parts * config.runtime.interleave
            least = -(-size * microbatches // config.schedule.batch_size)
            pieces = cut_evenly(size, least, unit if size % unit == 0 else self.placement.parts)
            evaluate = make_eval_step(self.model, loss, microbatches=pieces)
            self.evaluate = self.placement.jit_evaluation(evaluate)
            # Elsewhere no size is wrong, and tracing it would slow down the lowering of the train step beside it.
            if self.placement.mesh.size * config.runtime.interleave > 1:
                self._check(self.evaluate.check, size, "validation")
        self.throughput = Throughput(config.model, config.data.sequence_length, self.placement.mesh.size)

    def first_state(self, *, check_hashes: bool = True) -> TrainState:
        """Returns the state at step 0: from the seed, or with the weights in the config. Raises CheckpointError.

        check_hashes: compare the files of these weights with their hashes.
        """
        config, key = self.config, jax.random.key(self.config.seed)
        if config.init_from is None:
            state: TrainState = self.init(key)
            return state
        return state_from(
            config.init_from,
            config.runtime,
            self.abstract,
            self._optimizer,
            key,
            optimizer_state=config.init_optimizer,
            check_hashes=check_hashes,
        )

    def use_slack(self, slack: float | None) -> None:
        """Makes the train step anew with another `runtime.dispatch_slack`, to be compiled when it is called."""
        self.dispatch_slack = slack
        model = self.model.clone(runtime=dataclasses.replace(self.config.runtime, dispatch_slack=slack))
        step = make_train_step(model, self._optimizer, self._objective, microbatches=self._microbatches)
        self.train_step = self.placement.jit_step(step, self.abstract)

    def _abstract_batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        names = _inputs(self.config.data.mask_documents)
        return self.placement.abstract_batch(names, size, self.config.data.sequence_length)

    def _check(self, trace: Callable[..., None], size: int, what: str, *more: Any) -> None:
        """Traces a step for a batch of `size`, so that errors are raised before the first step."""
        try:
            trace(self.abstract, self._abstract_batch(size), *more)
        except ValueError as error:
            raise ConfigError(f"{what}: {error}") from error

    def batch(self, step: int) -> tuple[Any, ...]:
        """Returns the batch for step `step`, from 0. Steps must be in order."""
        size = self.schedule.batch_size(step)
        if self.cut is None:
            rows = self.placement.rows(size)
            return (self._placed(rows, self.data.next_batch(size, rows), size),)
        rows = self.placement.rows(self.cut.sequences)
        # Padding repeats sequences, so that it is routed as evenly as they are.
        batch = self.data.next_batch(size, rows % size)
        batch["targets"] = np.where(rows[:, None] < size, batch["targets"], IGNORE)
        return self._placed(rows, batch, self.cut.sequences), np.int32(size)

    def _placed(self, rows: np.ndarray, batch: dict[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        taken = {name: batch[name] for name in _inputs(self.config.data.mask_documents)}
        return self.placement.batch(rows, taken, size)

    def validate(self, state: TrainState) -> dict[str, Any]:
        """Computes metrics over all validation batches, named `validation_...`."""
        size = len(self.validation[0]["tokens"])
        every = np.arange(size)
        parts = [self.evaluate(state, self._placed(every, batch, size)) for batch in self.validation]
        total = jax.tree.map(lambda *parts: sum(parts), *parts)
        metrics = mean_metrics(total.loss) | load_violations(total.load)
        return {f"validation_{k}": v for k, v in metrics.items()}

    def due(self, done: int, every: int) -> bool:
        """Whether something that happens every `every` steps happens after step `done`; always after the last one."""
        return done % every == 0 or done == self.config.schedule.steps

    def diagnose(self, state: TrainState, batch: tuple[Any, ...]) -> str:
        """Describes where numbers stop being finite in a skipped step. Compiles additional programs."""
        forward, gradient = self._checks
        if where := first_in_forward(forward(state, batch[0])):
            return f"the outputs of {where} are the first that aren't finite"
        if where := first_in_backward(gradient(state, *batch)):
            return f"all outputs are finite, the gradient of {where} is the first that isn't"
        return "with the next batch everything is finite"

    def _sample_request(self) -> tuple[list[int], int]:
        """Returns the prompt of the final sample, and the number of tokens to generate. Raises ConfigError."""
        prompt = [self.tokenizer.bos_id, *map(int, self.tokenizer.encode(self.config.sample_prompt))]
        room = longest(self.model) - len(prompt)
        if self.config.sample_tokens and room < 1:
            raise ConfigError(
                f"sample_prompt has {len(prompt)} tokens, which leaves no room of the {longest(self.model)} for a "
                "sample: shorten it, or set sample_tokens to 0"
            )
        return prompt, min(self.config.sample_tokens, room)

    def sample(self, state: TrainState) -> str:
        """Returns the continuation of the prompt."""
        new = generate(
            self.model,
            state.variables,
            [self.sample_prompt],
            self.sample_tokens,
            sampling=Sampling(temperature=0.7, top_p=0.95),
            key=jax.random.key(self.config.seed),
            end_ids=[self.tokenizer.eos_id],
        )[0]
        return str(self.tokenizer.decode([*self.sample_prompt, *new]))


def _loss(config: TrainConfig, schedule: Schedule) -> Loss:
    if config.objective == "sft":
        return SFTLoss(config.model, config.schedule.final_mtp_weight)
    return PretrainingLoss(config.model, schedule)


def _inputs(mask_documents: bool) -> tuple[str, ...]:
    """Returns the batch keys that the step reads: without document masks, only tokens and targets."""
    return ("tokens", "targets", "segments", "positions") if mask_documents else ("tokens", "targets")
