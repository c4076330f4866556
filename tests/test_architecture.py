"""Imports point one way, and the pinned requirements fall into pyproject's ranges."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOW = {"model", "parallel", "quantization", "checkpoint", "data"}
HIGH = {"training", "inference", "rl", "planning"}
TOP = {"cli", "__main__", "__init__"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules():
    for package in ("dsv3_jax", "pallas_kernels"):
        yield from sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        assert name.split(".")[0] not in ("torch", "transformers", "tests", "experiments"), name
        if parts[0] == "pallas_kernels":
            assert not name.startswith("dsv3_jax"), name
        elif name.startswith("dsv3_jax.") and parts[1] not in TOP:
            other = name.split(".")[1]
            assert other not in TOP, name
            if parts[1] in LOW:
                assert other not in HIGH, f"{path} is below {name}"
            if parts[1] == "config":  # inside from_hf and to_hf: at the top it would go round in a circle
                assert name == "dsv3_jax.checkpoint", f"config imports {name}"


def test_requirements_are_pinned_within_the_ranges():
    text = (ROOT / "requirements.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    ranges = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    version = lambda v: tuple(map(int, v.split(".")))
    for name, least in (re.match(r"([\w-]+)>=([\d.]+)", r).groups() for r in ranges):
        assert version(pinned[name]) >= version(least), name
