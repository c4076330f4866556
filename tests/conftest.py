"""Tests run on the CPU whatever else the machine has, with eight virtual devices for the parallel ones."""

import atexit
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # to compile for TPUs in several workers at once
if (libtpu := pathlib.Path(sys.prefix, "tpu/libtpu/libtpu.so")).exists():  # where the Makefile puts it
    os.environ.setdefault("TPU_LIBRARY_PATH", str(libtpu))
# Compiling dominates these tests: at level 0 it takes half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

# The same small programs are compiled by many tests, and by the processes that some start: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled = tempfile.mkdtemp(prefix="dsv3_jax_tests_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("repeatable")


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
