"""docs/diagrams.md is what scripts/diagrams.py draws from the code: packages, rules, the pipeline's ticks."""

from pathlib import Path

import numpy as np

from dsv3_jax.parallel.pipeline import duration
from scripts import diagrams


def test_diagrams_are_up_to_date():
    drawn = (Path(__file__).parents[1] / "docs" / "diagrams.md").read_text()
    assert drawn == diagrams.document(), "run `python -m scripts.diagrams`"


def test_ticks_take_what_the_pipeline_says():
    """Every stage but the last does each forward and each backward pass once, and waits for what it needs."""
    stages, microbatches = 3, 5
    rows = [line.strip("| ").split(" | ") for line in diagrams.ticks(stages, microbatches)][2:]
    when = {(cell, int(row[0])): t for row in rows for t, cells in enumerate(row[1:]) for cell in cells.split()}
    assert len(when) == microbatches * (2 * stages - 1)
    for (cell, stage), tick in when.items():
        if cell.startswith("F") and stage:
            assert when[cell, stage - 1] < tick
        if cell.startswith("B") and stage < stages - 1:
            assert when[cell, stage + 1] < tick
    ticks = 1 + max(when.values())
    assert 4 * (ticks - (stages - 1)) == duration("1f1b", stages, microbatches)
    assert np.ptp(list(when.values())) == ticks - 1
