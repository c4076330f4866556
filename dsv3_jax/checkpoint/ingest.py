"""Conversion from Hugging Face's layout to orbax: reads, hashes, casts and writes every unit of a plan."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console

from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.files import INDEX, CheckpointError
from dsv3_jax.checkpoint.hashes import FileHashes, hash_files
from dsv3_jax.checkpoint.hf import HFCheckpoint, converted_fields
from dsv3_jax.checkpoint.jobs import JOURNAL, Unit, check_target, open_workspace, run_units
from dsv3_jax.checkpoint.layout import FP8, Region, from_file_axes, quantise_matrix, region_shape, tensor_box
from dsv3_jax.checkpoint.names import SCALE
from dsv3_jax.checkpoint.plan import ConversionPlan, Piece
from dsv3_jax.checkpoint.store import (
    ARRAY_METADATA,
    CASTS,
    FORMAT,
    MANIFEST,
    Store,
    array_directory,
    create_array,
    shard_file,
    write_orbax_metadata,
)
from dsv3_jax.checkpoint.verify import verify_store
from dsv3_jax.integrity import hash_file, seal
from dsv3_jax.json_input import is_type


def import_hf(
    plan: ConversionPlan, target: Path, *, verify: bool = False, workers: int = 4, console: Console | None = None
) -> None:
    """Writes the checkpoint of `plan` to a new directory `target`. Raises as `convert_command`."""
    source = plan.source
    check_target(target)
    source.check_scales()
    source.check_copies()
    with open_workspace(target, _identity(plan), plan.nbytes) as workspace:
        directory = workspace.directory
        stores = {spec.path: create_array(directory, spec) for spec in plan.arrays}

        def work(unit: Unit) -> dict[str, Any]:
            return _write_piece(plan, unit.what, stores, directory)

        run_units(
            workspace,
            plan.units,
            work,
            lambda _, result: _intact(directory, result),
            title=f"converting {source.directory.name}",
            workers=workers,
            console=console,
        )
        _write_description(plan, directory, workspace.done)
        if verify:
            verify_store(source, Store(directory), workers=workers, console=console)
        workspace.finish()


def _write_piece(
    plan: ConversionPlan, piece: Piece, stores: dict[names.TreePath, Any], directory: Path
) -> dict[str, Any]:
    """Writes a unit; returns {"tensors": hashes of what was read, "files": hashes of what was written}."""
    source, hashes, written = plan.source, {}, []
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
            written.append(shard_file(spec.path, (s.start // n for s, n in zip(region, spec.shard, strict=True))))
    files = {name: hash_file(directory / name) for name in written if (directory / name).exists()}  # zeros have none
    return {"tensors": hashes, "files": files}


def _intact(directory: Path, result: Any) -> bool:
    """Whether the files of a unit that was done before an interruption are unchanged."""
    if not is_type(result, dict[str, Any]) or not is_type(result.get("files"), dict[str, tuple[int, str]]):
        return False
    expected = {name: (size, digest) for name, (size, digest) in result["files"].items()}
    try:
        FileHashes(directory, expected, JOURNAL).check(expected)
    except (OSError, CheckpointError):
        return False
    return is_type(result.get("tensors"), dict[str, str])


def _quantise(plan: ConversionPlan, name: str) -> tuple[np.ndarray, np.ndarray]:
    assert plan.block is not None
    return quantise_matrix(plan.source.files.array(name), plan.block, power_of_two=plan.source.power_of_two)


def _from_quantised(piece: Piece, i: int, region: Region, made: dict[str, np.ndarray]) -> np.ndarray:
    """Builds a shard of an array from tensors quantised on the way."""
    leaf, spec = piece.leaves[i], piece.arrays[i]
    if piece.is_scale:
        return np.stack([made[n] for n in piece.names]).reshape(region_shape(region))
    box = tensor_box(leaf, region[spec.stack :])
    cut = np.stack([made[n].reshape(*leaf.tensor_out, *leaf.tensor_in)[box] for n in piece.names])
    return from_file_axes(leaf, cut.reshape(*region_shape(region[: spec.stack]), *region_shape(box)))


def _hash_tensor(source: HFCheckpoint, name: str) -> str:
    """Hashes the bytes of a tensor in its file, releasing mapped pages on the way."""
    digest, data = xxhash.xxh3_128(), _bytes(source.files.array(name))
    for start in range(0, len(data), 64 << 20):
        digest.update(data[start : start + (64 << 20)])
        if len(data) > 64 << 20:
            source.files.release(name)
    return digest.hexdigest()


def _bytes(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _identity(plan: ConversionPlan) -> dict[str, Any]:
    """Returns the identity of a conversion, to recognise an interrupted one."""
    files = {i.file for i in plan.source.files.tensors.values()}
    stats = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    layers = dataclasses.astuple(plan.source.layers)
    source = [str(plan.source.directory.resolve()), stats, plan.source.fields]
    return {"format": FORMAT, "source": source, "dtype": plan.dtype, "layers": layers}


def _write_description(plan: ConversionPlan, directory: Path, done: dict[str, Any]) -> None:
    """Writes config.json, orbax's metadata, the small files of the source, and the manifest."""
    source = plan.source
    results = [done[unit.key] for unit in plan.units]
    hashes = {n: h for result in results for n, h in result["tensors"].items()}
    tensors = {new: [dtype, hashes.get(source.copies.get(old, old))] for new, (old, dtype) in plan.given_back().items()}
    cast = CASTS[plan.dtype].name if plan.dtype in CASTS else None
    fields = converted_fields(source.fields, source.config, cast, plan.block)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    write_orbax_metadata(directory, plan.arrays)
    for file in sorted(source.directory.iterdir()):
        small = file.is_file() and file.suffix != ".safetensors" and file.stat().st_size < 64 << 20
        if small and file.name not in ("config.json", INDEX, MANIFEST):
            shutil.copyfile(file, directory / file.name)
    described = [f.name for f in directory.iterdir() if f.is_file() and f.name not in (JOURNAL, MANIFEST)]
    described += [f"{array_directory(spec.path)}/{ARRAY_METADATA}" for spec in plan.arrays]
    files = {n: h for result in results for n, h in result["files"].items()} | hash_files(directory, described)
    manifest = {
        "format": FORMAT,
        "hash": "xxh3_128",
        "dtype": plan.dtype,
        "block": plan.block,
        "source_layers": dataclasses.asdict(source.layers),
        "tensors": dict(sorted(tensors.items())),
        "files": dict(sorted(files.items())),
    }
    (directory / MANIFEST).write_text(json.dumps(seal(manifest), indent=1))
