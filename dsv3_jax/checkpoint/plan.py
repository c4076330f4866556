"""The plan of a conversion to orbax, made and checked from headers alone."""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np
from rich.table import Table

from dsv3_jax.checkpoint import names
from dsv3_jax.checkpoint.hf import HFCheckpoint
from dsv3_jax.checkpoint.jobs import Unit
from dsv3_jax.checkpoint.layout import FP8, Region, region_shape
from dsv3_jax.checkpoint.names import SCALE, Leaf
from dsv3_jax.checkpoint.store import CASTS, ArraySpec, Store, Target, leaf_arrays, scale_array
from dsv3_jax.quantization.fp8 import BLOCK


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a unit: stack entries of the leaves of one kind, or of their scale grids."""

    leaves: tuple[Leaf, ...]
    arrays: tuple[ArraySpec, ...]
    stack: Region
    names: tuple[str, ...]
    is_scale: bool


class ConversionPlan:
    """Reads and writes of a conversion to orbax: arrays, and units that together read every tensor exactly once."""

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
            self.units.append(Unit(key, nbytes, Piece(leaves, tuple(arrays), box, taken, is_scale)))

    def stored_dtype(self, leaf: Leaf) -> np.dtype:
        """Returns the dtype of the leaf's array in the store."""
        if leaf.kind.float32:
            return np.dtype(np.float32)
        if self.dtype in CASTS:
            cast: np.dtype = CASTS[self.dtype]
            return cast
        return FP8 if self.dtype == "fp8" and leaf.kind.fp8 else self.source.dtype(leaf)

    def tensor_names(self) -> list[str]:
        """Lists every tensor of the source that the plan reads: those of units, and copies that are only compared."""
        taken = list(self.source.copies)
        files = self.source.files.tensors
        for unit in self.units:
            piece: Piece = unit.what
            taken += [n + SCALE for n in piece.names if n + SCALE in files] if piece.is_scale else piece.names
        if self.dtype in CASTS:  # read with their weights, and not kept
            taken += [n + SCALE for n in taken if n + SCALE in files]
        return taken

    def given_back(self) -> dict[str, tuple[str, str]]:
        """Lists every tensor that an export of the result restores, with its name and dtype in the source.

        New scales have the name that they would have in the source, and float32.
        """
        files, old_names = self.source.files.tensors, names.tensor_shapes(self.source.config, self.source.layers)
        scaled = {n for unit in self.units if unit.what.is_scale for n in unit.what.names}
        found = {}
        for old, new in zip(old_names, names.tensor_shapes(self.source.config), strict=True):
            found[new] = (old, files[old].dtype)
            if old in scaled:
                kept = files.get(old + SCALE)
                found[new + SCALE] = (old + SCALE, kept.dtype if kept else "F32")
        return found

    @property
    def elements(self) -> int:
        """Counts the numbers in the tensors that the plan reads, scales included."""
        return sum(math.prod(self.source.files.tensors[n].shape) for n in self.tensor_names())

    @property
    def nbytes(self) -> int:
        """Counts the bytes of the arrays that the plan writes."""
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.arrays)

    def _check(self) -> None:
        """Checks that each tensor of the chosen layers is read once, and each number of each array written once."""
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
        """The plan as a table: one row per array, and the totals."""
        tensors = len(self.tensor_names())
        title = (
            f"{self.source.directory}: {tensors:,} tensors, {self.elements:,} numbers "
            f"-> {len(self.arrays)} arrays, {self.nbytes:,} bytes, {len(self.units):,} units"
        )
        table = Table(title=title, title_justify="left")
        for column in ("array", "shape", "dtype", "bytes", "tensors"):
            table.add_column(column, overflow="fold")
        for unit_arrays in self.arrays:
            count = next(len(u.what.leaves[0].names) for u in self.units if unit_arrays in u.what.arrays)
            nbytes = math.prod(unit_arrays.shape) * unit_arrays.dtype.itemsize
            shape = " x ".join(map(str, unit_arrays.shape))
            table.add_row("/".join(unit_arrays.path), shape, unit_arrays.dtype.name, f"{nbytes:,}", f"{count:,}")
        for copy, original in self.source.copies.items():
            table.add_row(f"({copy})", f"= {original}", "", "", "1")
        return table


class PlannedStore(Store):
    """The store that a plan would write, without its numbers, for which an export can be planned."""

    def __init__(self, plan: ConversionPlan) -> None:
        self.directory, self.fields, self.block = plan.source.directory, plan.source.fields, plan.block
        self._describe(plan.source.config)
        self.manifest = {"dtype": plan.dtype, "tensors": {n: [t, None] for n, (_, t) in plan.given_back().items()}}
        self._dtypes = {spec.path: spec.dtype for spec in plan.arrays}

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._dtypes[leaf.path]
