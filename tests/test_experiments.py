"""Every figure of an experiment's report follows from its JSON, which is committed beside it; how chaos observes."""

import importlib
import json
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.training.checkpoints import Checkpoints
from experiments import bench_kernels, bench_serving, bench_step, chaos
from experiments.small_run import result_name
from tests.training.test_checkpoints import save

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


def test_chaos_counts_no_damaged_checkpoint_as_complete(tmp_path):
    """Else its loss would be held against the next life, which sets it aside."""
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep=2)
    save(checkpoints, 40)
    save(checkpoints, 80)
    checkpoints.close()
    assert chaos.complete(tmp_path / "run") == [40, 80]
    for seed in range(20):
        run = tmp_path / str(seed)
        shutil.copytree(tmp_path / "run", run)
        chaos.damage(run / "checkpoints/80", random.Random(seed))
        assert chaos.complete(run) == [40], seed


def test_what_a_benchmark_does_not_have_is_said_before_it_writes(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no size 'huge': there are"):
        bench_step.main(tmp_path / "steps", sizes="huge")
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--out", str(tmp_path / "kernels"), "--only", "sorts"])
    with pytest.raises(SystemExit, match="no group 'sorts': there are"):
        bench_kernels.main()
    assert not list(tmp_path.iterdir())


def test_a_trace_shares_a_run_out_among_its_operations():
    """Idle time belongs to the operation before it; of two at once each has the time until the other starts."""
    events = [(5e9, 6e9, True), (0, 1e9, False), (2e9, 9e9, True), (12e9, 13e9, False), (12.5e9, 14e9, True)]
    assert bench_serving.shares(events) == (11.5, 2.5)


def test_a_trace_tells_a_named_scope_from_the_rest():
    """The scope has nearly all of the work: of the loop, whose turns the profiler sees one by one, and of the rest."""

    @jax.jit
    def program(x):
        with jax.named_scope("attend"):
            x = jax.lax.fori_loop(0, 40, lambda _, x: jnp.tanh(x @ x), x)
        return jnp.sin(x)

    x = jnp.ones((256, 256)) / 256
    marked = bench_serving.operations(program.lower(x).compile().as_text(), "/attend/")
    runs = bench_serving.traced(lambda: program(x), "jit_program", marked, calls=4)
    assert len(runs) == 3
    assert all(attend > 5 * rest > 0 for attend, rest in runs)
