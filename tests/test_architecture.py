"""Imports point one way between packages and make no cycle; the pinned requirements fall into pyproject's ranges."""

import ast
import collections
import graphlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"json_input"},
    {"integrity"},
    {"config"},
    {"runtime"},
    {"parallel", "quantization", "data"},
    {"model"},
    {"checkpoint"},
    {"accounting"},
    {"inference"},
    {"training", "serving"},
    {"planning", "post_training"},
    {"compilation_cache"},
    {"cli", "__init__"},
    {"__main__"},
)
"""Packages and modules of `dsv3_jax`, from the lowest layer up: each imports only from layers below its own."""
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path):
    """Modules that a file imports, wherever the statement stands: in a function and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


DOORS = {"dsv3_jax.config": {"dsv3_jax.checkpoint", "dsv3_jax.checkpoint.hf_config"}}
"""Imports inside methods that are only another name for what stands higher: ModelConfig.from_hf and to_hf."""


def modules():
    for package in ("dsv3_jax", "pallas_kernels"):
        yield from sorted((ROOT / package).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    for name in set(imports(path)) - DOORS.get(module_name(path), set()):
        assert name.split(".")[0] not in ("torch", "transformers", "tests", "experiments"), name
        if parts[0] == "pallas_kernels":
            assert not name.startswith("dsv3_jax"), name
        elif name.startswith("dsv3_jax.") and (other := name.split(".")[1]) != parts[1] and other in LAYER:
            assert LAYER[other] < LAYER[parts[1]], f"{path} imports {name}, which isn't in a layer below"


def test_every_package_has_a_layer():
    assert {p.stem for p in (ROOT / "dsv3_jax").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} <= set(
        LAYER
    )


def test_no_module_imports_itself_by_way_of_others():
    paths = {module_name(p): p for p in modules()}
    graph = {
        name: (set(imports(path)) & set(paths)) - {name} - DOORS.get(name, set())
        for name, path in paths.items()
        if path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_docstrings_open_with_a_verb_or_a_noun():
    """A field's or argument's help begins with its own words, not with a relative clause."""
    for folder in ("dsv3_jax", "pallas_kernels", "experiments", "scripts", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = re.findall(r'^ *r?"""(?:What|Of|Whose)\b.*', path.read_text(), re.MULTILINE)
            assert not found, f"{path}: {found[0].strip()}"


def test_the_current_mesh_is_asked_for_in_one_place():
    found = [p for p in (ROOT / "dsv3_jax").rglob("*.py") if "get_abstract_mesh" in p.read_text()]
    assert found == [ROOT / "dsv3_jax/parallel/sharding.py"]


def test_choices_are_stated_once():
    """Two places that take the same choices share an alias of their Literal."""
    stated = collections.Counter(
        choices for path in modules() for choices in re.findall(r"Literal\[([^\]]*,[^\]]*)\]", path.read_text())
    )
    assert not {choices for choices, times in stated.items() if times > 1}


def test_requirements_are_pinned_within_the_ranges():
    text = (ROOT / "requirements.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    version = lambda v: tuple(map(int, v.split(".")))
    for name, least in (re.match(r"([\w-]+)>=([\d.]+)", r).groups() for r in ranges):
        assert version(pinned[name]) >= version(least), name
