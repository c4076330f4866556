"""Streaming conversion between the two layouts, in bounded memory: `python -m dsv3_jax convert`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsv3_jax.checkpoint import runs
from dsv3_jax.checkpoint.export import describe_export, export_hf
from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.ingest import import_hf
from dsv3_jax.checkpoint.jobs import keep_freed_memory
from dsv3_jax.checkpoint.plan import ConversionPlan, PlannedStore
from dsv3_jax.checkpoint.remote import as_url, fetched
from dsv3_jax.checkpoint.run_tokenizer import run_tokenizer
from dsv3_jax.checkpoint.store import MANIFEST, Store, Target, Variables
from dsv3_jax.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    """Convert a checkpoint from Hugging Face to orbax, or back. Rerunning it continues an interrupted conversion."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Directory of a checkpoint in either layout or of a training run, or its URL; or a Hub id, such as
    deepseek-ai/DeepSeek-V3.
    """
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None
    """Directory to create. It appears when it is complete; until then the work is in DST.incomplete."""
    dtype: Target = "keep"
    """keep: every tensor as stored. fp8: matrices in FP8 blocks, unless they already are. Otherwise a cast."""
    mtp: bool = True
    """Include the multi-token prediction modules."""
    layers: str | None = None
    """Convert only these layers, numbered as in the source, such as 0-3,60 (MTP modules come after the last layer)."""
    verify: bool = False
    """Read everything back and compare it with the source bit for bit before DST appears."""
    check_hashes: bool = True
    """Compare the files of a converted checkpoint or run with their hashes while reading; --verify always does."""
    workers: int = 4
    """Number of tensors processed at a time; each takes up to a few times 32 MB."""
    dry_run: bool = False
    """Only check names, shapes and dtypes and print the plan. Files may be truncated after their headers."""


def convert_command(args: ConvertArgs, console: Console | None = None) -> None:
    """Runs `python -m dsv3_jax convert`.

    Raises:
      CheckpointError, ConfigError, FileNotFoundError: the source is damaged or incomplete.
      FileExistsError, OSError: the destination exists, or can't be written.
    """
    console = console or Console(stderr=True)
    if args.workers < 1:
        raise CheckpointError(f"workers is {args.workers}: it must be at least 1")
    if args.dst is None and not args.dry_run:
        raise CheckpointError("there is no destination: give one after the source, or --dry-run")
    keep_freed_memory()
    source = _local(args.src)
    converted = (source / MANIFEST).exists()
    if converted or (source / runs.CHECKPOINTS).is_dir():
        if args.layers is not None or not args.mtp:
            raise CheckpointError(
                f"{source} holds the model's own arrays: --layers and --no-mtp need a Hugging Face directory"
            )
        check = args.check_hashes or args.verify
        store = Store(source, check_hashes=check) if converted else _run(source, check)
        if args.dry_run:
            print(f"{source} -> {describe_export(store, args.dtype)}")
            return
        assert args.dst is not None
        export_hf(store, args.dst, dtype=args.dtype, verify=args.verify, workers=args.workers, console=console)
    else:
        checkpoint = HFCheckpoint(source, layers=args.layers, mtp=args.mtp, headers_only=args.dry_run)
        plan = ConversionPlan(checkpoint, args.dtype)
        if args.dry_run:
            Console().print(plan.table())
            print(f"and back -> {describe_export(PlannedStore(plan))}")
            return
        assert args.dst is not None
        import_hf(plan, args.dst, verify=args.verify, workers=args.workers, console=console)
    console.print(f"done: {args.dst}")


def _run(directory: Path, check_hashes: bool) -> Variables:
    """Opens the newest checkpoint of a training run."""
    config, variables = runs.read_run(directory, Runtime(), check_hashes=check_hashes)
    newest = directory / runs.CHECKPOINTS / str(runs.complete_steps(directory / runs.CHECKPOINTS)[-1])
    version = f"{newest.resolve()} {newest.stat().st_mtime_ns}"
    tokenizer = run_tokenizer(directory)
    # What a preset's ids were for is another tokenizer.
    config = dataclasses.replace(config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    return Variables(config, variables, directory, version, tokenizer)


def _local(source: str) -> Path:
    """Returns the directory of a source. A Hub id is downloaded first, resuming an interrupted download."""
    if as_url(source):
        return fetched(source)
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"])
        )
    except Exception as error:  # the client raises many kinds, with long texts
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{source} is no directory here, and couldn't be downloaded as a Hub repository: {reason}"
        ) from None


if __name__ == "__main__":
    convert_command(tyro.cli(ConvertArgs))
