"""Memory, FLOPs, bytes and collectives of a compiled program, as reported by the compiler."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig


@dataclasses.dataclass(frozen=True)
class Costs:
    """XLA's cost analysis of the program of one device: FLOPs (elementwise ones included) and bytes accessed."""

    flops: float
    bytes: float

    def plus(self, other: Costs, times: float) -> Costs:
        return Costs(self.flops + times * other.flops, self.bytes + times * other.bytes)


def costs(compiled: Any) -> Costs:
    """Reads a `jax.stages.Compiled`. The body of a loop counts once, whatever its trip count."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return Costs(float(analysis["flops"]), float(analysis["bytes accessed"]))


def device_bytes(compiled: Any) -> int:
    """Peak bytes per device: arguments, results that alias none of them, temporaries, the program."""
    m = compiled.memory_analysis()
    arguments: int = m.argument_size_in_bytes
    results: int = m.output_size_in_bytes - m.alias_size_in_bytes
    temporaries: int = m.temp_size_in_bytes
    program: int = m.generated_code_size_in_bytes
    return arguments + results + temporaries + program


def costs_of_all_layers(compile_with: Callable[[ModelConfig], Any], config: ModelConfig) -> Costs:
    """Costs of a program with scanned layers, in which each layer is counted.

    The compiler counts the body of a loop once, and removes loops that run once. Three programs with at most one layer
    of each kind are therefore compiled, whose differences are the costs of one layer of each kind and of the rest.

    Args:
      compile_with: compiles the program of a configuration.
    """
    if not (config.num_dense_layers and config.num_moe_layers):
        kind = config.num_moe_layers > 0
        raise ConfigError(
            f"needs layers of both kinds to tell them apart, but has no {'dense' if kind else 'sparse'} ones"
        )

    def with_layers(dense: int, moe: int) -> Costs:
        layers = dataclasses.replace(config, num_hidden_layers=dense + moe, first_k_dense_replace=dense)
        return costs(compile_with(layers))

    both, only_dense, only_moe = with_layers(1, 1), with_layers(1, 0), with_layers(0, 1)
    dense, moe = both.plus(only_moe, -1), both.plus(only_dense, -1)
    return both.plus(dense, config.num_dense_layers - 1).plus(moe, config.num_moe_layers - 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    kind: as in HLO, such as "all-gather". bytes: of its result on one device. axes: the mesh axes that it runs along,
    where the program still names them, else (). times: how often it runs, where the compiler knows, in one call.
    where: the path of the operation in the traced function. dtypes: of its arrays. loops: nesting depth.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    times: int
    where: str
    dtypes: tuple[str, ...]
    loops: int


_KINDS = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)(?:e\w+)?\[([\d,]*)\]")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply)=%([\w.-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_WIDTHS = {"pred": 8}


def collectives(compiled: Any) -> list[Collective]:
    """The collective operations of a `jax.stages.Compiled`, those in loops and branches included."""
    instructions: dict[str, list[str]] = {}
    name = ""
    for line in compiled.as_text().splitlines():
        if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            name = "ENTRY" if header[1] else header[2]
        elif name:
            instructions.setdefault(name, []).append(line)

    found: list[Collective] = []

    def visit(computation: str, times: int, loops: int) -> None:
        for line in instructions.get(computation, ()):
            if match := _COLLECTIVE.search(line):
                axes = re.search(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}", line)
                where = re.search(r'op_name="([^"]*)"', line)
                named = tuple(re.findall(r"'(\w+)'", axes[1])) if axes else ()
                sizes = _bytes(match[1])  # of an operation's start, also of its operands
                total = max(sizes, default=0) if match[3] else sum(sizes)
                dtypes = tuple(dict.fromkeys(kind for kind, _ in _ARRAY.findall(match[1])))
                found.append(Collective(match[2], total, named, times, where[1] if where else "", dtypes, loops))
            for role, called, branches in _CALLED.findall(line):
                for one in [called] if called else re.findall(r"%([\w.-]+)", branches):
                    inside = role == "body"
                    visit(one, times * (_rounds(instructions, line) if inside else 1), loops + inside)

    visit("ENTRY", 1, 0)
    return found


def largest_arrays(compiled: Any, count: int = 10) -> list[tuple[int, str]]:
    """Bytes and types of the largest arrays of a `jax.stages.Compiled` on one device, parts of fusions left out."""
    found = {}
    for line in re.split(r"\n(?=\S)", compiled.as_text()):
        if re.match(r"%fused|%wrapped|%bitcast_fusion", line):
            continue
        for kind, dims in _ARRAY.findall(line):
            found[f"{kind}[{dims}]"] = _bytes(f"{kind}[{dims}]")[0]
    return sorted(((size, name) for name, size in found.items()), reverse=True)[:count]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """An asynchronous collective in a compiled program, and the matmuls scheduled while it is in flight.

    kind, bytes, where: as in `Collective`. products: their paths in the traced function.
    """

    kind: str
    bytes: int
    where: str
    products: tuple[str, ...]


_START = re.compile(rf"%([\w.-]+) = (.*?) ({_KINDS})-start\(")
_PRODUCT = re.compile(r'op_name="([^"]*(?:dot_general|ragged_dot)[^"]*)"')


def overlaps(compiled: Any) -> list[Overlap]:
    """Lists the asynchronous collectives of a `jax.stages.Compiled` and the matmuls that overlap with each."""
    found: list[Overlap] = []
    lines = compiled.as_text().splitlines()
    for i, line in enumerate(lines):
        if not (start := _START.search(line)):
            continue
        until = next(j for j in range(i + 1, len(lines)) if f"{start[3]}-done(%{start[1]})" in lines[j])
        products = tuple(m[1] for between in lines[i + 1 : until] if (m := _PRODUCT.search(between)))
        where = re.search(r'op_name="([^"]*)"', line)
        found.append(Overlap(start[3], max(_bytes(start[2]), default=0), where[1] if where else "", products))
    return found


def _bytes(types: str) -> list[int]:
    """Bytes of each array that an HLO type names."""

    def bits(kind: str) -> int:
        return _WIDTHS.get(kind) or int(re.sub(r"\D", "", kind))

    return [bits(k) * math.prod(int(n) for n in dims.split(",") if n) // 8 for k, dims in _ARRAY.findall(types)]


def _rounds(instructions: dict[str, list[str]], loop: str) -> int:
    """Trip count of a while loop, from the constant in its condition; 1 if there is none."""
    condition = re.search(r"condition=%([\w.-]+)", loop)
    lines = instructions.get(condition[1], []) if condition else []
    limits = [int(m[1]) for line in lines if (m := re.search(r"= s32\[\]\S* constant\((\d+)\)", line))]
    return limits[0] if len(limits) == 1 and any("direction=LT" in line for line in lines) else 1
