"""Training as one call: `train` validates the run, locks its directory, and runs the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console

from dsv3_jax.config import ConfigError
from dsv3_jax.data import load_tokenizer
from dsv3_jax.data.pipeline import prepared_tokenizer
from dsv3_jax.parallel.placement import all_processes_here, any_process
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.directory import check_config, check_directory, kept_tokenizer, locked, write_config
from dsv3_jax.training.guard import TrainingError as TrainingError
from dsv3_jax.training.initial import check_source
from dsv3_jax.training.loop import Loop
from dsv3_jax.training.loop import TrainResult as TrainResult
from dsv3_jax.training.mirror import working_copy
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.throughput import Clock


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
        `metrics.png`, `sample.txt` and `report.md` are written there. By default a new one in `runs/`, named by date
        and time. A URL, such as gs://bucket/run, is trained in a working copy, the `directory` of the result.
      resume: continue the run in `directory` from its newest finite checkpoint; on a CPU to the same bits.
      check_hashes: compare the files of the checkpoint that the run continues or starts from with their hashes.

    Returns:
      The state, the last metrics and the directory. The metric `stopped` is true if Ctrl-C or SIGTERM ended the run
      early; the state is saved then.

    Raises:
      OSError: a file couldn't be written, or a URL be read or written.
      ConfigError: `directory` contains another run or is locked by another process, there is nothing to resume, or the
        config has a problem that the run would encounter later (a batch of the ramp, validation, the sample).
      CheckpointError: a checkpoint couldn't be written or read.
      TrainingError: too many steps in a row had a non-finite loss or gradient, the state isn't finite, or the loss
        keeps spiking. No such state is saved as good.
    """
    console = console or Console(quiet=jax.process_index() != 0)
    with working_copy(directory or f"runs/{datetime.datetime.now():%Y-%m-%d-%H%M%S}", console) as here:
        return _train(config, here, resume, check_hashes, console)


def _train(config: TrainConfig, directory: Path, resume: bool, check_hashes: bool, console: Console) -> TrainResult:
    clock = Clock()
    check_config(config)
    check_directory(config, directory, resume=resume)
    tokenizer_path: str | Path | None = prepared_tokenizer(config.data)
    if resume:
        tokenizer_path = kept_tokenizer(directory, tokenizer_path)
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens: "
            "the model's must be at least as large"
        )
    if config.init_from is not None and not resume:
        check_source(config.init_from, config.model, tokenizer, optimizer_state=config.init_optimizer)
    # A preset's are those of another tokenizer.
    model = dataclasses.replace(config.model, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    config = dataclasses.replace(config, model=model)
    with clock.spent_on("start"):
        # A failure to read the data leaves no directory.
        setup = Setup(config, tokenizer, tokenizer_path, console, ahead=True, resume=resume)
    all_processes_here()  # before one of them puts something into the directory that the others look at

    def begin() -> None:
        check_directory(config, directory, resume=resume)  # again: another job may have been faster
        if not resume:  # before all else: a directory without it is taken for somebody else's
            write_config(directory, config, tokenizer_path)

    with _held_by_one(directory, console, begin):
        return Loop(setup, directory, console, clock).run(resume, tokenizer_path, check_hashes)


@contextlib.contextmanager
def _held_by_one(directory: Path, console: Console, begin: Callable[[], None]) -> Iterator[None]:
    """Locks the run's directory in the first process of the job, which then calls `begin`.

    The others don't read the directory again, since the first may have written to it by then.
    """
    with contextlib.ExitStack() as stack:
        refused = None
        if jax.process_index() == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if warning := stack.enter_context(locked(directory)):
                    console.print(f"warning: {warning}")
                begin()
            except (ConfigError, OSError) as error:
                refused = error
        if any_process(refused is not None):
            raise refused or ConfigError(f"{directory} can't be used: process 0 says why")
        yield
