"""The package as users get it: a wheel in an empty environment, and an import that costs next to nothing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_an_import_loads_nothing_heavy():
    """Hence it takes less than `import jax`, whatever the machine does; each name is loaded on first use."""
    code = "import sys, dsv3_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "flax", "orbax", "grain", "tyro", "matplotlib"} & set(done.stdout.split())


def test_the_lock_file_has_the_pinned_versions_with_hashes():
    pins = r"^([\w.-]+(?:\[\w+\])?==[^\s;]+)"
    pinned = {pin.lower() for pin in re.findall(pins, (ROOT / "requirements.txt").read_text(), re.MULTILINE)}
    locked = (ROOT / "requirements.lock").read_text().lower()
    versions = {normal(pin) for pin in re.findall(pins, locked, re.MULTILINE)}
    assert {normal(pin) for pin in pinned} - versions == set()
    assert len(re.findall(r"^[\w.-]+==[^\n]*\\\n +--hash=sha256:", locked, re.MULTILINE)) == len(versions)


def normal(pin):
    return re.sub(r"[-_.]+", "-", pin)


@pytest.mark.parametrize("way", ["installed", "module"])
def test_a_refusal_ends_the_process_while_a_thread_is_at_work(way):
    """As one does that compiles the train step of a run which is then refused."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["dsv3-jax"].split(":")
    installed = f"import {module}, sys; sys.argv = ['dsv3-jax', 'fly']; sys.exit({module}.{function}())"
    as_module = "import runpy, sys; sys.argv = ['', 'fly']; runpy.run_module('dsv3_jax', run_name='__main__')"
    thread = "import concurrent.futures as c, time; c.ThreadPoolExecutor(1).submit(time.sleep, 100)"
    code = f"{thread}; {installed if way == 'installed' else as_module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown command 'fly'")


@pytest.mark.slow  # needs a package index
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    for name in ("dsv3_jax", "pallas_kernels"):  # a copy: setuptools builds in the sources' folder
        shutil.copytree(ROOT / name, tmp_path / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "source")
    (wheel,) = tmp_path.glob("dsv3_jax-*.whl")
    run(sys.executable, "-m", "venv", "env")
    run("env/bin/python", "-m", "pip", "install", "--quiet", wheel)
    assert str(tmp_path) in run("env/bin/python", "-c", "import dsv3_jax; print(dsv3_jax.__file__)")
    assert "--schedule.steps" in run("env/bin/dsv3-jax", "train", "--help")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    example = "\n".join(blocks).replace("steps=200", "steps=3")
    assert example.count("steps=3") == 1
    (tmp_path / "example.py").write_text(example + '\nassert metrics["loss"] < 5.6\n')
    run("env/bin/python", "example.py")
    assert len(list((tmp_path / "runs").glob("*/report.md"))) == 1
