"""Every figure of an experiment's report follows from its JSON, which is committed beside it."""

import importlib
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs/results"
MODULES = ("attention_variants", "balance", "context_extension", "moe_vs_dense", "mtp", "recipe")


@pytest.mark.parametrize("name", MODULES)
def test_a_report_follows_from_its_json(name):
    module = importlib.import_module(f"experiments.{name}")
    file = RESULTS / f"{module.NAME}.json"
    if not file.exists():
        pytest.skip(f"{name} hasn't been run")
    results = json.loads(file.read_text())
    assert module.render(results) == file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").stat().st_size > 1000
