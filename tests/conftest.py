"""Tests run on the CPU whatever else the machine has, with eight virtual devices for the parallel ones.

Random numbers repeat from run to run. `pytest --seed N` gives others, to hypothesis too; a failure shows the seed.
"""

import atexit
import collections
import gc
import os
import pathlib
import re
import shutil
import sys
import tempfile
import zlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # to compile for TPUs in several workers at once
if (libtpu := pathlib.Path(sys.prefix, "tpu/libtpu/libtpu.so")).exists():  # where the Makefile puts it
    os.environ.setdefault("TPU_LIBRARY_PATH", str(libtpu))
# Compiling dominates these tests: at level 0 it takes half the time. On a busy machine of two cores, eight devices may
# wait for each other longer than XLA's 40 seconds, at which it ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=300 --xla_cpu_collective_timeout_seconds=300",
)

# The same small programs are compiled by many tests, and by the processes that some start: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled = tempfile.mkdtemp(prefix="dsv3_jax_tests_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

# Texts that tests train on are prepared there, once for all.
if "DSV3_TESTS_CACHE" not in os.environ:
    os.environ["DSV3_TESTS_CACHE"] = os.environ["XDG_CACHE_HOME"] = prepared = tempfile.mkdtemp(prefix="dsv3_jax_data_")
    atexit.register(shutil.rmtree, prepared, ignore_errors=True)

import hypothesis
import jax
import numpy as np
import pytest

_seed = 0
_generators: collections.Counter[str] = collections.Counter()


def new_rng() -> np.random.Generator:
    """A generator of the session's seed and the running test's name. Each call in a test gives another."""
    test = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0]  # without the phase
    _generators[test] += 1
    return np.random.default_rng([_seed, zlib.crc32(test.encode()), _generators[test]])


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the random numbers that tests draw, 0 by default")


@pytest.hookimpl(tryfirst=True)  # before hypothesis looks at its own option
def pytest_configure(config):
    global _seed
    _seed = config.getoption("--seed")
    hypothesis.settings.register_profile(
        "tests", deadline=None, max_examples=30, print_blob=True, database=None, derandomize=not _seed
    )
    hypothesis.settings.load_profile("tests")
    if _seed:
        config.option.hypothesis_seed = _seed


def pytest_make_parametrize_id(val):
    """Names cases by the changes that they make, {"n_group": 7} as n_group=7, and by the beginning of long texts."""
    if isinstance(val, dict):
        val = ",".join(f"{k}={v}" if isinstance(v, str | int | float) else str(k) for k, v in val.items()) or "default"
    elif not isinstance(val, str) or len(val) <= 40:
        return None  # pytest's own
    return re.sub(r"[^\w=.,:/+-]+", " ", val, flags=re.ASCII).strip()[:40]


def pytest_collection_finish():
    """Spares the garbage collector what lives on: tracing makes so many objects that it takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_report_header():
    return f"random numbers: --seed {_seed}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    if report.failed:
        report.sections.append(("Random numbers", f"of --seed {_seed}"))
    return report


@pytest.fixture
def x64():
    """Double precision, for finite differences."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def exact_matmul():
    """Full float32 products: what the references compute with."""
    with jax.default_matmul_precision("highest"):
        yield
