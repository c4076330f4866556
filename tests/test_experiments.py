"""Every figure of an experiment's report follows from its JSON, which is committed beside it."""

import importlib
import json
from pathlib import Path

import pytest

from experiments.small_run import result_name

RESULTS = Path(__file__).parents[1] / "docs/results"
MODULES = ("attention_variants", "balance", "context_extension", "moe_vs_dense", "mtp", "recipe")


@pytest.mark.parametrize("size", ["cpu", "gpu"])
@pytest.mark.parametrize("name", MODULES)
def test_a_report_follows_from_its_json(name, size):
    module = importlib.import_module(f"experiments.{name}")
    file = RESULTS / f"{result_name(module.NAME, size)}.json"
    if not file.exists():
        pytest.skip(f"{name} hasn't been run on a {size.upper()}")
    results = json.loads(file.read_text())
    assert module.render(results) == file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").stat().st_size > 1000
