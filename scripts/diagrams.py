"""Draws docs/diagrams.md from the code: `python -m scripts.diagrams`; a test compares the two.

Imports, rules and pipeline ticks are computed. Of the two flowcharts the arrows are written here, and every name in
them is looked up in the code.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.rules import LOGICAL, RULES

ROOT = Path(__file__).parents[1]

Edge = tuple[str, str]

BATCH = """
documents --> tokens: a tokenizer
tokens --> data.packing.PackedSequences: documents end to end
data.packing.PackedSequences --> data.pipeline.train_iterator: rows of tokens, targets, segments, positions
data.pipeline.train_iterator --> training.losses.model_inputs: a batch (B, T)
training.losses.model_inputs --> model.transformer.DeepSeekV3: tokens, the tokens ahead of them, positions
model.transformer.DeepSeekV3 --> model.block.Block: embeddings (B, T, D)
model.block.Block --> model.block.Block: L times
model.block.Block --> model.logits.Logits: hidden states (B, T, D)
model.block.Block --> model.mtp.MTPModule: hidden states
model.mtp.MTPModule --> model.logits.Logits: hidden states of each depth
model.block.Block --> model.router.RouterStats: routing of each sparse layer
model.logits.Logits --> training.losses.PretrainingLoss: cross entropies
model.router.RouterStats --> training.losses.PretrainingLoss: balance
training.losses.PretrainingLoss --> training.losses.StepSums: sums over the pieces of the batch
training.losses.StepSums --> training.optimizer.make_optimizer: gradients, float32
training.losses.StepSums --> training.step.update_bias: load of each expert
training.optimizer.make_optimizer --> training.step.TrainState: parameters
training.step.update_bias --> training.step.TrainState: router bias
"""

DISPATCH = """
model.router.select_experts --> parallel.dispatch.DispatchSizes: ids and weights (N, K)
parallel.dispatch.DispatchSizes --> parallel.dispatch.Hop: buffers of fixed sizes
parallel.dispatch.Hop --> parallel.dispatch.Send.dispatch: over `node`, once to each node that holds an expert
parallel.dispatch.Send.dispatch --> parallel.dispatch.Send.dispatch: over `expert`, once to each device of that node
parallel.dispatch.Send.dispatch --> model.moe.experts_grouped: tokens, sorted by expert
model.moe.experts_grouped --> parallel.dispatch.Send.combine: sums over a device's experts
parallel.dispatch.Send.combine --> parallel.dispatch.Send.combine: over `expert`, a node's sums added up
parallel.dispatch.Send.combine --> model.moe.MoE: over `node`, each token's sum
"""


def flowchart(text: str) -> Iterator[str]:
    """Lines of a mermaid flowchart, from lines `A --> B: label`."""
    yield "flowchart TD"
    numbers: dict[str, str] = {}
    for line in text.strip().splitlines():
        ends, label = line.split(": ", 1)
        for name in ends.split(" --> "):
            if name not in numbers:
                numbers[name] = f"n{len(numbers)}"
                yield f'    {numbers[name]}["{name if "." not in name else _found(name)}"]'
        start, end = (numbers[name] for name in ends.split(" --> "))
        yield f'    {start} -->|"{label}"| {end}'


def _found(name: str) -> str:
    """The last names of `package.module.name`; raises AttributeError or ImportError if there is no such thing."""
    package, module, *names = name.split(".")
    found = importlib.import_module(f"dsv3_jax.{package}.{module}")
    for part in names:
        found = getattr(found, part)
    return f"{'.'.join(names)}<br>{package}/{module}.py"


def imports() -> Iterator[str]:
    """Lines of a mermaid flowchart: which package imports which, without arrows that follow from others."""
    yield "flowchart TD"
    edges = set(_import_edges())
    for start, end in sorted(edges):
        if not _reaches({e for e in edges if e != (start, end)}, start, end):
            yield f"    {start} --> {end}"


def _import_edges() -> Iterator[Edge]:
    for path in sorted((ROOT / "dsv3_jax").rglob("*.py")):
        package = path.relative_to(ROOT / "dsv3_jax").with_suffix("").parts[0]
        if package.startswith("__"):
            continue
        for node in ast.parse(path.read_text()).body:  # what is imported on import, and not later by a function
            name = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            other = name.split(".")[1] if name.startswith("dsv3_jax.") else name.split(".")[0]
            if other != package and (name.startswith("dsv3_jax.") or other == "pallas_kernels"):
                yield package, other


def _reaches(edges: set[Edge], start: str, end: str) -> bool:
    return any(b == end or _reaches(edges, b, end) for a, b in edges if a == start)


def rules() -> Iterator[str]:
    """A markdown table: the mesh axes that cut each logical axis, preset by preset."""
    presets = {name: preset for name, preset in RULES.items() if name != "single"}
    yield f"| | {' | '.join(f'`{name}`' for name in presets)} |"
    yield "|---" * (len(presets) + 1) + "|"
    for logical in LOGICAL:
        cuts = (" x ".join(sorted(getattr(preset, logical), key=AXES.index)) for preset in presets.values())
        yield f"| `{logical}` | {' | '.join(cuts)} |"


def ticks(stages: int, microbatches: int) -> Iterator[str]:
    """A markdown table of 1F1B: F and B of a microbatch, by stage and tick, as `parallel.pipeline` counts them."""
    count = microbatches + 2 * (stages - 1)
    yield "| stage | " + " | ".join(map(str, range(count))) + " |"
    yield "|---" * (count + 1) + "|"
    for s in range(stages):
        cells = [""] * count
        for m in range(microbatches):
            if s < stages - 1:  # the last stage's forward pass is part of its backward pass
                cells[m + s] += f"F{m} "
            cells[m + 2 * (stages - 1) - s] += f"B{m} "
        yield f"| {s} | " + " | ".join(cell.strip() for cell in cells) + " |"


def document() -> str:
    """The text of docs/diagrams.md."""
    fenced = lambda lines: "```mermaid\n" + "\n".join(lines) + "\n```"
    table = lambda lines: "\n".join(lines)
    return f"""# Diagrams

Drawn from the code by `scripts/diagrams.py`; a test compares.

## The life of a batch

{fenced(flowchart(BATCH))}

## Imports between packages

An arrow that follows from others is left out; so are imports inside functions.

{fenced(imports())}

## Mesh and rules

The mesh axes that cut each logical axis of parameters and activations, outermost first (`parallel/rules.py`).

{table(rules())}

## Dispatch in two hops

With experts over `node` and `expert`; with one of the two axes, there is one hop (`parallel/dispatch.py`).

{fenced(flowchart(DISPATCH))}

## Ticks of the pipeline

1F1B, four stages and six microbatches: F is a forward pass, B a backward pass, which computes the forward pass again
(`parallel/pipeline.py`).

{table(ticks(4, 6))}
"""


if __name__ == "__main__":
    (ROOT / "docs" / "diagrams.md").write_text(document())
