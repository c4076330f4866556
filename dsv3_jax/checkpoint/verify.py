"""Verification of a converted checkpoint against its source, tensor by tensor and bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from rich.console import Console

from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.jobs import in_parallel, show_progress
from dsv3_jax.checkpoint.layout import FP8, quantise_matrix
from dsv3_jax.checkpoint.names import SCALE
from dsv3_jax.checkpoint.store import Store


def verify_store(source: HFCheckpoint, store: Store, *, workers: int, console: Console | None = None) -> None:
    """Rebuilds every tensor from the store and compares it with the source's, cast to the store's dtype.

    Raises CheckpointError naming the first tensor that differs.
    """
    pairs = zip(names.tensor_shapes(source.config, source.layers), names.tensor_shapes(store.config), strict=True)

    def check(pair: tuple[str, str]) -> None:
        old, new = pair
        fp8 = source.files.array(old).dtype == FP8
        if store.is_fp8(new) and not fp8:
            assert store.block is not None
            values, scales = quantise_matrix(source.files.array(old), store.block, power_of_two=store.power_of_two)
            same = _equal(store.matrix(new), values) and _equal(store.scales(new), scales)
        else:
            per_entry = math.prod(store.tensor_out(new)[1:])
            same = all(
                _equal(got, source.matrix(old, slice(rows.start * per_entry, rows.stop * per_entry), got.dtype))
                for rows in store.bands(new)
                for got in [store.matrix(new, rows)]
            )
            if store.is_fp8(new):
                same = same and _equal(store.scales(new), source.files.array(old + SCALE))
        if not same:
            raise CheckpointError(f"{old} differs after the conversion to {store.directory}: the copy must not be used")

    _check_all(list(pairs), lambda pair: source.files.tensors[pair[0]].nbytes, check, workers, console)


def verify_files(store: Store, files: HFCheckpoint, *, workers: int, console: Console | None = None) -> None:
    """Compares every tensor of an exported directory with the store's, cast to the file's dtype. Raises as above."""

    def check(name: str) -> None:
        written = files.files.array(name)
        if written.dtype == FP8 and not store.is_fp8(name):
            assert files.block is not None
            values, scales = quantise_matrix(store.matrix(name), files.block, power_of_two=store.power_of_two)
            same = _equal(written, values) and _equal(files.files.array(name + SCALE), scales)
        else:
            per_entry = math.prod(store.tensor_out(name)[1:])
            same = all(
                _equal(
                    store.matrix(name, rows, written.dtype),
                    written[rows.start * per_entry : rows.stop * per_entry],
                )
                for rows in store.bands(name)
            )
            if written.dtype == FP8:
                same = same and _equal(store.scales(name), files.files.array(name + SCALE))
        files.files.release(name)
        if not same:
            raise CheckpointError(f"{name} differs after the export of {store.directory}: the copy must not be used")

    every = list(names.tensor_shapes(store.config))
    _check_all(every, lambda name: files.files.tensors[name].nbytes, check, workers, console)


def _check_all[T](
    items: list[T], size: Callable[[T], int], check: Callable[[T], None], workers: int, console: Console | None
) -> None:
    with show_progress(console) as progress:
        bar = progress.add_task("verifying", total=sum(map(size, items)))

        def do(item: T) -> None:
            check(item)
            progress.advance(bar, size(item))

        in_parallel(do, items, workers)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Compares bit for bit, whatever the dtypes."""
    if a.dtype.itemsize != b.dtype.itemsize:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(np.ascontiguousarray(a).view(bits), np.ascontiguousarray(b).view(bits))
