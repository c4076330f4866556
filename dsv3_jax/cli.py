"""The command line: `python -m dsv3_jax COMMAND`. A command's heavy imports happen when it is chosen."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import tyro

from dsv3_jax.config import PRESETS, ConfigError, ModelConfig, Yarn

_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Runs one command. Exits with 0, with 2 after one clear line about what was wrong, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": _train, "prepare": _prepare, "generate": _generate, "serve": _serve, "convert": _convert}
    commands |= {"info": _info, "plan": _plan, "report": _report}
    commands |= {"sft": functools.partial(_train, command="sft"), "grpo": _grpo}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] not in commands:
        _fail(f"unknown command {arguments[0]!r}: the commands are {', '.join(commands)}")
    _quiet_failed_writes()
    try:
        commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_ours(error):
            raise  # a defect: its traceback is what helps
        _fail(" ".join(str(error).split()))


def process() -> None:
    """Runs one command in a process of its own, which ends at once if the command failed.

    Otherwise the interpreter would first wait for threads, such as one that compiles the train step of a refused run;
    and threads of a failed write would print their tracebacks after the line that says what happened.
    """
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise


@functools.cache
def _quiet_failed_writes() -> None:
    """Silences tracebacks of a failed write in other threads, since the main thread reports it in one line.

    These are the metrics thread, and tensorstore's threads, which report to an event loop that orbax has closed.
    """
    report, unraisable = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else report(error)
    closed = "Event loop is closed"
    sys.unraisablehook = lambda error: None if str(error.exc_value) == closed else unraisable(error)


_USAGE = """\
usage: python -m dsv3_jax COMMAND [OPTIONS]

  train      train a model; by default a small one, on this machine's CPU
  sft        fine-tune a model on chats
  grpo       reinforcement learning with rewards by rule
  prepare    tokenise texts to disk for training
  generate   continue a text, or chat, with a trained or converted model
  serve      serve a model with an OpenAI-compatible API
  convert    convert a Hugging Face checkpoint to orbax, or back, without loss
  info       print parameters and cache size of a configuration
  plan       estimate memory, time and cost of training or serving
  report     compare training runs on one page

python -m dsv3_jax COMMAND --help lists the options of a command."""


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.startswith("dsv3_jax.")


def _parse(kind: Any, command: str, arguments: list[str], default: Any = None) -> Any:
    prog, description = f"python -m dsv3_jax {command}", kind.__doc__
    how = {} if default is None else {"default": default}
    # A field that is a dataclass or None, as rope_scaling, stays one of options and isn't made a subcommand.
    how["config"] = (tyro.conf.AvoidSubcommands,)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=prog, description=description, args=arguments, **how)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        _fail(_one_line(said.getvalue()))


def _one_line(box: str) -> str:
    """Joins a framed message of several lines into one, without the frame and the hint about --help."""
    lines = [re.sub(r"[\u2500-\u257f]", " ", line).strip() for line in box.splitlines()]
    return " ".join(" ".join(line for line in lines if line and "--help" not in line).split())


# train ---------------------------------------------------------------------------------------------------


def _train(arguments: list[str], command: str = "train") -> None:
    from dsv3_jax.checkpoint.remote import as_url
    from dsv3_jax.parallel.processes import Processes, join
    from dsv3_jax.training.mirror import working_copy

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = lambda message: _fail(message)  # type: ignore[method-assign]
    first.add_argument("--preset")
    first.add_argument("--run-dir", "--run_dir", type=Path)
    first.add_argument("--resume", action=argparse.BooleanOptionalAction)
    first.add_argument("--auto-resume", "--auto_resume", action=argparse.BooleanOptionalAction)
    first.add_argument("--init-from", "--init_from")
    first.add_argument("--processes.coordinator", dest="coordinator")
    first.add_argument("--processes.count", dest="count", type=int)
    first.add_argument("--processes.index", dest="index", type=int)
    known = first.parse_known_args(arguments)[0]
    known.help = bool({"-h", "--help"} & set(arguments))
    preset = known.preset or "tiny"
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: the presets are {', '.join(PRESETS)}")
    processes = Processes(known.coordinator, known.count, known.index)
    join(processes)  # before JAX is asked for its devices
    threading.Thread(target=_start_devices, daemon=True).start()  # while the rest is imported
    known.run_dir = known.run_dir or Path("runs") / ("sft" if command == "sft" else preset)
    with contextlib.nullcontext(known.run_dir) if known.help else working_copy(known.run_dir) as directory:
        result = _train_in(directory, known, arguments, command)
    shown = as_url(known.run_dir) or str(known.run_dir)
    if result["stopped"]:
        again = ["python", "-m", "dsv3_jax", command, "--run-dir", shown, "--resume"]
        for name, value in dataclasses.asdict(processes).items():
            again += [] if value is None else [f"--processes.{name}", str(value)]
        print(f"stopped and saved at step {result['step']}; continue with: {shlex.join(again)}")
        sys.exit(_INTERRUPTED)
    print(f"done: {shown}/report.md")


def _start_devices() -> None:
    """Initialises JAX's backends. An error is raised again where they are used."""
    import jax

    with contextlib.suppress(RuntimeError):
        jax.devices()


def _train_in(run_dir: Path, known: argparse.Namespace, arguments: list[str], command: str) -> dict[str, Any]:
    """Trains in `run_dir`, which is the working copy if `--run-dir` is a URL. Returns the last metrics."""
    import jax

    from dsv3_jax.compilation_cache import keep_compiled_programs
    from dsv3_jax.parallel.processes import last_words
    from dsv3_jax.training.config import SFTArgs, TrainArgs, TrainConfig
    from dsv3_jax.training.directory import CONFIG, has_begun
    from dsv3_jax.training.initial import with_model_of
    from dsv3_jax.training.trainer import train

    preset, kind = known.preset or "tiny", TrainArgs
    config = TrainConfig.preset(preset, jax.default_backend())
    if command == "sft":
        kind, config = SFTArgs, config.fine_tuning()
    resume = known.resume or (known.auto_resume and has_begun(run_dir))
    if command == "sft" and not (known.init_from or resume or known.help):
        raise ConfigError("sft needs --init-from: a run, a converted checkpoint or a Hugging Face directory")
    if known.init_from and not resume:
        config = with_model_of(known.init_from, config)
    if any(argument.replace("_", "-").startswith("--model.rope-scaling.") for argument in arguments):
        config = dataclasses.replace(config, model=_with_yarn(config.model))
    default = kind(config, preset=preset, run_dir=known.run_dir)
    if resume and (run_dir / CONFIG).exists():
        own = TrainConfig.from_json(run_dir / CONFIG)
        if known.preset and not known.init_from:  # whose model it is then
            differences = _parse(kind, command, arguments, default).config.differences(own)
            if others := [line for line in differences if line.startswith("model.")]:
                raise ConfigError(f"{run_dir} holds a run of another model than --preset {preset}: {'; '.join(others)}")
        default = dataclasses.replace(default, config=own)
    chosen = _parse(kind, command, arguments, default)
    print(keep_compiled_programs())
    with last_words(), _explained(chosen.config):
        return train(chosen.config, run_dir, resume=bool(resume), check_hashes=chosen.check_hashes).metrics


@contextlib.contextmanager
def _explained(config: Any) -> Iterator[None]:
    """Reports for a run out of device memory what is large, and which option reduces it."""
    import jax

    from dsv3_jax.planning.out_of_memory import is_out_of_memory, out_of_memory
    from dsv3_jax.training.guard import TrainingError

    try:
        yield
    except (jax.errors.JaxRuntimeError, TrainingError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory(config)) from error


def _with_yarn(model: ModelConfig) -> ModelConfig:
    """Returns the model with a YaRN config whose fields can be set by options; the factor is yet to be given."""
    if model.rope_scaling is not None:
        return model
    yarn = Yarn(1.0, model.max_position_embeddings, mscale=1.0, mscale_all_dim=1.0)
    return dataclasses.replace(model, rope_scaling=yarn)


# grpo ----------------------------------------------------------------------------------------------------


def _grpo(arguments: list[str]) -> None:
    from dsv3_jax.compilation_cache import keep_compiled_programs
    from dsv3_jax.post_training.command import GRPOArgs, grpo_command

    args = _parse(GRPOArgs, "grpo", arguments)
    print(keep_compiled_programs())
    grpo_command(args)


# prepare -------------------------------------------------------------------------------------------------


def _prepare(arguments: list[str]) -> None:
    from dsv3_jax.data.command import PrepareArgs, prepare_command

    def chat_template(tokenizer: str | None) -> Any:
        from dsv3_jax.serving.chat import chat_template_beside

        if tokenizer is None:
            raise ConfigError("--chat needs --tokenizer, with a chat template beside it")
        chat_template_beside(Path(tokenizer))  # what is wrong is said before anything is read
        return functools.partial(chat_template_beside, Path(tokenizer))

    prepare_command(_parse(PrepareArgs, "prepare", arguments), chat_template)


# generate ------------------------------------------------------------------------------------------------


def _generate(arguments: list[str]) -> None:
    from dsv3_jax.compilation_cache import keep_compiled_programs
    from dsv3_jax.serving.generate_command import GenerateArgs, generate_command

    keep_compiled_programs()
    generate_command(_parse(GenerateArgs, "generate", arguments))


# serve ---------------------------------------------------------------------------------------------------


def _serve(arguments: list[str]) -> None:
    from dsv3_jax.compilation_cache import keep_compiled_programs
    from dsv3_jax.serving.command import ServeArgs, serve_command

    keep_compiled_programs()
    serve_command(_parse(ServeArgs, "serve", arguments))


# info ----------------------------------------------------------------------------------------------------


def _info(arguments: list[str]) -> None:
    from dsv3_jax.planning.info import InfoArgs, info_command

    info_command(_parse(InfoArgs, "info", arguments))


# convert and plan ----------------------------------------------------------------------------------------


def _convert(arguments: list[str]) -> None:
    from dsv3_jax.checkpoint.convert import ConvertArgs, convert_command

    convert_command(_parse(ConvertArgs, "convert", arguments))


def _plan(arguments: list[str]) -> None:
    from dsv3_jax.planning.options import PlanArgs
    from dsv3_jax.planning.plan import plan_command

    plan_command(_parse(PlanArgs, "plan", arguments))


# report --------------------------------------------------------------------------------------------------


def _report(arguments: list[str]) -> None:
    from dsv3_jax.training.run_page import ReportArgs, report_command

    report_command(_parse(ReportArgs, "report", arguments))
