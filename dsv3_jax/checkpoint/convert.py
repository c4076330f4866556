"""Conversion between the two layouts, streamed: memory holds what the workers hold (`python -m dsv3_jax convert`)."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
import xxhash
from rich.console import Console
from rich.table import Table

from dsv3_jax.checkpoint import names, runs
from dsv3_jax.checkpoint.export import export_hf
from dsv3_jax.checkpoint.files import INDEX, CheckpointError
from dsv3_jax.checkpoint.hf import HFCheckpoint, converted_fields
from dsv3_jax.checkpoint.jobs import Unit, check_target, keep_freed_memory, open_workspace, run_units
from dsv3_jax.checkpoint.layout import FP8, Region, from_file_axes, quantise_matrix, region_shape, tensor_box
from dsv3_jax.checkpoint.names import SCALE, Leaf
from dsv3_jax.checkpoint.store import (
    CASTS,
    FORMAT,
    MANIFEST,
    ArraySpec,
    Store,
    Variables,
    create_array,
    leaf_arrays,
    scale_array,
    write_orbax_metadata,
)
from dsv3_jax.checkpoint.verify import verify_store
from dsv3_jax.config import Runtime
from dsv3_jax.quantization.fp8 import BLOCK

Target = Literal["keep", "fp8", "bf16", "float32"]


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    """Convert a checkpoint: a Hugging Face directory to orbax, or back. An interrupted conversion continues."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Directory of a checkpoint in either layout or of a training run; or a Hub id as deepseek-ai/DeepSeek-V3."""
    dst: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DST")] = None
    """Directory to be made. It appears when everything is in it; until then the work is in DST.incomplete."""
    dtype: Target = "keep"
    """keep: every tensor as it is stored. fp8: matrices in FP8 blocks, those that already are untouched. Or a cast."""
    mtp: bool = True
    """With the modules of multi-token prediction."""
    layers: str | None = None
    """Only these layers, numbered as in the source: 0-3,60 (MTP modules have the numbers after the last layer)."""
    verify: bool = False
    """Read everything back and compare it with the source, bit for bit, before DST appears."""
    workers: int = 4
    """How many tensors are worked on at once; each takes up to a few times 64 MB."""
    dry_run: bool = False
    """Only check names, shapes and dtypes, and print the plan. The source's files may end after their headers."""


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
        if args.layers is not None or not args.mtp or args.dry_run:
            raise CheckpointError(
                f"{source} holds the model's own arrays: --layers, --no-mtp and --dry-run need a Hugging Face directory"
            )
        assert args.dst is not None
        store = Store(source) if converted else _run(source)
        export_hf(store, args.dst, dtype=args.dtype, verify=args.verify, workers=args.workers, console=console)
    else:
        checkpoint = HFCheckpoint(source, layers=args.layers, mtp=args.mtp, headers_only=args.dry_run)
        plan = Plan(checkpoint, args.dtype)
        if args.dry_run:
            Console().print(plan.table())
            return
        assert args.dst is not None
        import_hf(plan, args.dst, verify=args.verify, workers=args.workers, console=console)
    console.print(f"done: {args.dst}")


def _run(directory: Path) -> Variables:
    """The newest checkpoint of a training run."""
    config, variables = runs.read_run(directory, Runtime(), None)
    newest = max((directory / runs.CHECKPOINTS).iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    return Variables(config, variables, directory, f"{newest.resolve()} {newest.stat().st_mtime_ns}")


def _local(source: str) -> Path:
    """The directory of a source; a Hub id is downloaded first (and resumes if that was interrupted)."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except Exception as error:  # the client raises many kinds, with long texts
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{source} is no directory here, and couldn't be downloaded as a Hub repository: {reason}"
        ) from None


# The plan ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A unit's part: stack entries of the leaves of one kind, or of their scale grids."""

    leaves: tuple[Leaf, ...]
    arrays: tuple[ArraySpec, ...]
    stack: Region
    names: tuple[str, ...]
    is_scale: bool


class Plan:
    """What a conversion to orbax reads and writes: arrays, and units that together take every tensor exactly once."""

    def __init__(self, source: HFCheckpoint, dtype: Target) -> None:
        self.source, self.dtype = source, dtype
        self.block = source.block
        if dtype == "fp8":
            self.block = self.block or BLOCK
        elif dtype in CASTS:
            self.block = None
        self.arrays: list[ArraySpec] = []
        self.units: list[Unit] = []
        kinds = collections.defaultdict(list)
        for leaf in source.leaves.values():
            kinds[leaf.names].append(leaf)
        for group in kinds.values():
            self._add(tuple(group))
        if not any(spec.dtype == FP8 for spec in self.arrays):
            self.block = None
        self._check()

    def _add(self, leaves: tuple[Leaf, ...]) -> None:
        stored = self.stored_dtype(leaves[0])
        self._add_units(leaves, leaf_arrays(leaves, stored), is_scale=False)
        if stored == FP8:
            assert self.block is not None
            quantised = self.source.dtype(leaves[0]) == FP8
            dtype = self.source.scale_dtype(leaves[0]) if quantised else np.dtype(np.float32)
            dtype = np.dtype(np.uint8) if dtype.itemsize == 1 else dtype
            self._add_units(leaves[:1], [scale_array(leaves[0], self.block, dtype)], is_scale=True)

    def _add_units(self, leaves: tuple[Leaf, ...], arrays: list[ArraySpec], *, is_scale: bool) -> None:
        self.arrays += arrays
        stack, steps = arrays[0].shape[: arrays[0].stack], arrays[0].shard[: arrays[0].stack]
        tensors = np.array(leaves[0].names, object).reshape(stack)
        for index in np.ndindex(*(-(-n // s) for n, s in zip(stack, steps, strict=True))):
            box = tuple(slice(i * s, min(n, (i + 1) * s)) for i, n, s in zip(index, stack, steps, strict=True))
            taken = tuple(tensors[box].ravel().tolist()) if stack else leaves[0].names
            files = self.source.files.tensors
            from_file = [n + SCALE if is_scale else n for n in taken]
            nbytes = sum(files[n].nbytes for n in from_file if n in files)
            key = ".".join(arrays[0].path) + "/" + ",".join(map(str, index))
            self.units.append(Unit(key, nbytes, _Piece(leaves, tuple(arrays), box, taken, is_scale)))

    def stored_dtype(self, leaf: Leaf) -> np.dtype:
        """Of the leaf's array in the store."""
        if leaf.kind.float32:
            return np.dtype(np.float32)
        if self.dtype in CASTS:
            return CASTS[self.dtype]
        return FP8 if self.dtype == "fp8" and leaf.kind.fp8 else self.source.dtype(leaf)

    def tensor_names(self) -> list[str]:
        """Every tensor of the source that the plan takes, once: from units, and copies that are only compared."""
        taken = list(self.source.copies)
        files = self.source.files.tensors
        for unit in self.units:
            piece: _Piece = unit.what
            taken += [n + SCALE for n in piece.names if n + SCALE in files] if piece.is_scale else piece.names
        if self.dtype in CASTS:  # read with their weights, and not kept
            taken += [n + SCALE for n in taken if n + SCALE in files]
        return taken

    @property
    def elements(self) -> int:
        """Numbers in the tensors that the plan takes, scales included."""
        return sum(math.prod(self.source.files.tensors[n].shape) for n in self.tensor_names())

    @property
    def nbytes(self) -> int:
        """Of the arrays that the plan writes."""
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.arrays)

    def _check(self) -> None:
        """Every tensor of the chosen layers is taken once; every number of every array is written once."""
        taken = self.tensor_names()
        chosen = {*self.source.layers.main, *self.source.layers.mtp, None}
        wanted = {n for n in self.source.files.tensors if names.layer_number(n) in chosen}
        if len(taken) != len(set(taken)) or set(taken) != wanted:
            odd = sorted(set(taken) ^ wanted)[:3] or [n for n, k in collections.Counter(taken).items() if k > 1][:3]
            raise AssertionError(f"the plan doesn't take every tensor exactly once: {odd}")
        written = sum(
            math.prod(region_shape(region))
            for unit in self.units
            for spec in unit.what.arrays
            for region in spec.shards(unit.what.stack)
        )
        assert written == sum(math.prod(spec.shape) for spec in self.arrays), "the plan leaves gaps or writes twice"

    def table(self) -> Table:
        """The plan for people: one row an array, and the totals."""
        tensors = len(self.tensor_names())
        title = (
            f"{self.source.directory}: {tensors:,} tensors, {self.elements:,} numbers "
            f"-> {len(self.arrays)} arrays, {self.nbytes:,} bytes, {len(self.units):,} units"
        )
        table = Table("array", "shape", "dtype", "bytes", "tensors", title=title, title_justify="left")
        for unit_arrays in self.arrays:
            count = next(len(u.what.leaves[0].names) for u in self.units if unit_arrays in u.what.arrays)
            nbytes = math.prod(unit_arrays.shape) * unit_arrays.dtype.itemsize
            shape = " x ".join(map(str, unit_arrays.shape))
            table.add_row("/".join(unit_arrays.path), shape, unit_arrays.dtype.name, f"{nbytes:,}", f"{count:,}")
        for copy, original in self.source.copies.items():
            table.add_row(f"({copy})", f"= {original}", "", "", "1")
        return table


# Hugging Face -> orbax -----------------------------------------------------------------------------------


def import_hf(
    plan: Plan, target: Path, *, verify: bool = False, workers: int = 4, console: Console | None = None
) -> None:
    """Writes the checkpoint of `plan` to the new directory `target`. Raises as `convert_command`."""
    source = plan.source
    check_target(target)
    source.check_scales()
    source.check_copies()
    with open_workspace(target, _identity(plan), plan.nbytes) as workspace:
        directory = workspace.directory
        stores = {spec.path: create_array(directory, spec) for spec in plan.arrays}

        def work(unit: Unit) -> dict[str, Any]:
            return _write_piece(plan, unit.what, stores)

        run_units(
            workspace, plan.units, work, title=f"converting {source.directory.name}", workers=workers, console=console
        )
        _write_description(plan, directory, workspace.done)
        if verify:
            verify_store(source, Store(directory), workers=workers, console=console)
        workspace.finish()


def _write_piece(plan: Plan, piece: _Piece, stores: dict[names.TreePath, Any]) -> dict[str, Any]:
    """Writes a unit; returns {"tensors": hashes of what was read, "shards": hashes of what was written}."""
    source, hashes, shards = plan.source, {}, {}
    quantise = plan.stored_dtype(piece.leaves[0]) == FP8 and source.dtype(piece.leaves[0]) != FP8
    taken = [name + SCALE if piece.is_scale else name for name in piece.names]
    taken = [name for name in taken if name in source.files.tensors]
    for name in taken:
        source.files.prefetch(name)
    for name in taken:
        hashes[name] = _hash_tensor(source, name)
    quantised = {n: _quantise(plan, n) for n in piece.names} if quantise else {}
    for i, spec in enumerate(piece.arrays):
        for region in spec.shards(piece.stack):
            if quantise:
                part = 1 if piece.is_scale else 0
                data = _from_quantised(piece, i, region, {n: q[part] for n, q in quantised.items()})
            elif piece.is_scale:
                data = np.stack([source.files.array(n + SCALE) for n in piece.names]).view(spec.dtype)
                data = data.reshape(region_shape(region))
            else:
                data = source.read(piece.leaves[i], region, spec.dtype)
            stores[spec.path][region].write(data, can_reference_source_data_indefinitely=True).result()
            place = ",".join(str(s.start // n) for s, n in zip(region, spec.shard, strict=True))
            shards[f"{'.'.join(spec.path)}/{place}"] = xxhash.xxh3_128_hexdigest(_bytes(data.transpose(spec.order)))
    return {"tensors": hashes, "shards": shards}


def _quantise(plan: Plan, name: str) -> tuple[np.ndarray, np.ndarray]:
    assert plan.block is not None
    return quantise_matrix(plan.source.files.array(name), plan.block)


def _from_quantised(piece: _Piece, i: int, region: Region, made: dict[str, np.ndarray]) -> np.ndarray:
    """A shard of an array out of tensors that were quantised on the way."""
    leaf, spec = piece.leaves[i], piece.arrays[i]
    if piece.is_scale:
        return np.stack([made[n] for n in piece.names]).reshape(region_shape(region))
    box = tensor_box(leaf, region[spec.stack :])
    cut = np.stack([made[n].reshape(*leaf.tensor_out, *leaf.tensor_in)[box] for n in piece.names])
    return from_file_axes(leaf, cut.reshape(*region_shape(region[: spec.stack]), *region_shape(box)))


def _hash_tensor(source: HFCheckpoint, name: str) -> str:
    """Of a tensor's bytes in its file. Memory is given back on the way: a mapped page counts as long as it is held."""
    digest, data = xxhash.xxh3_128(), _bytes(source.files.array(name))
    for start in range(0, len(data), 64 << 20):
        digest.update(data[start : start + (64 << 20)])
        if len(data) > 64 << 20:
            source.files.release(name)
    return digest.hexdigest()


def _bytes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _identity(plan: Plan) -> dict[str, Any]:
    """What makes two conversions the same one."""
    files = {i.file for i in plan.source.files.tensors.values()}
    stats = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    layers = dataclasses.astuple(plan.source.layers)
    source = [str(plan.source.directory.resolve()), stats, plan.source.fields]
    return {"format": FORMAT, "source": source, "dtype": plan.dtype, "layers": layers}


def _write_description(plan: Plan, directory: Path, done: dict[str, Any]) -> None:
    """config.json, the manifest, orbax's metadata, and the small files beside the source's weights."""
    source = plan.source
    renamed = dict(
        zip(names.tensor_shapes(source.config, source.layers), names.tensor_shapes(source.config), strict=True)
    )
    hashes = {n: h for key in done for n, h in done[key]["tensors"].items()}
    made = {n for u in plan.units if u.what.is_scale for n in u.what.names}  # scales of what was quantised on the way
    tensors = {}
    for old, new in renamed.items():
        info = source.files.tensors[old]
        tensors[new] = [info.dtype, hashes.get(old, hashes.get(source.copies.get(old, "")))]
        if old + SCALE in hashes:
            tensors[new + SCALE] = [source.files.tensors[old + SCALE].dtype, hashes[old + SCALE]]
        elif old in made:
            tensors[new + SCALE] = ["F32", None]
    manifest = {
        "format": FORMAT,
        "hash": "xxh3_128",
        "dtype": plan.dtype,
        "block": plan.block,
        "source_layers": dataclasses.asdict(source.layers),
        "tensors": dict(sorted(tensors.items())),
        "shards": dict(sorted((s, h) for key in done for s, h in done[key]["shards"].items())),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
    cast = CASTS[plan.dtype].name if plan.dtype in CASTS else None
    fields = converted_fields(source.fields, source.config, cast, plan.block)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    write_orbax_metadata(directory, plan.arrays)
    for file in sorted(source.directory.iterdir()):
        small = file.is_file() and file.suffix != ".safetensors" and file.stat().st_size < 64 << 20
        if small and file.name not in ("config.json", INDEX, MANIFEST):
            shutil.copyfile(file, directory / file.name)


if __name__ == "__main__":
    convert_command(tyro.cli(ConvertArgs))
