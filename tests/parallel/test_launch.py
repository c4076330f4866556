"""The command lines of the launch files, run as they are written: two processes on loopback, with a small model.

Stand-ins: `srun` and JobSet's controller are loops over two processes with the variables that those set; `python` is a
script that adds options of a small model and mesh to the command line, which must stand on a CPU.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dsv3_jax.checkpoint.runs import complete_steps

ROOT = Path(__file__).parents[2]
SMALL = {
    **{"model.hidden-size": 16, "model.intermediate-size": 16, "model.moe-intermediate-size": 8},
    **{"model.num-hidden-layers": 5, "model.n-routed-experts": 8, "model.num-experts-per-tok": 2},
    **{"model.n-group": 4, "model.topk-group": 2, "model.q-lora-rank": 8, "model.kv-lora-rank": 8},
    **{"model.num-attention-heads": 4, "model.vocab-size": 300, "model.num-nextn-predict-layers": 0},
    **{"data.sequence-length": 16, "schedule.batch-size": 16, "schedule.initial-batch-size": 16},
    **{"schedule.steps": 4, "schedule.warmup-steps": 1, "microbatches": 2, "validation-batches": 1},
    **{"checkpoint-every": 2, "runtime.dtype": "float32", "runtime.dispatch": "all_to_all"},
}
MESHES = {
    "slurm.sh": {"mesh.stage": 2, "mesh.data": 1, "mesh.node": 2, "mesh.expert": 2},
    "jobset.yaml": {"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2},
}

PYTHON = """#!/bin/sh
exec {python} -c '
import runpy, sys
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = {tpu}
sys.argv = sys.argv[1:]
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
' "$@" {options}
"""

SRUN = """#!/bin/sh
export SLURM_JOB_ID={job} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_LOCALID=0
SLURM_PROCID=1 "$@" > other.txt 2>&1 &
SLURM_PROCID=0 "$@"
first=$?
wait $! && exit $first
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def shared(tmp_path):
    """Files that all hosts see: texts and a tokenizer."""
    (tmp_path / "data").mkdir()
    texts = [" ".join(str(i * j % 97) for j in range(60)) for i in range(400)]
    for i, text in enumerate(texts):
        (tmp_path / f"data/{i}.txt").write_text(text)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel()
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=290, special_tokens=names))
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def run(shared, name, **variables):
    """Runs a launch file's command, and returns all that it wrote."""
    options = " ".join(f"--{k} {v}" for k, v in (SMALL | MESHES[name]).items())
    tpu = name == "jobset.yaml"
    for python in (shared / ".venv/bin/python", shared / "bin/python"):
        write_script(python, PYTHON.format(python=sys.executable, tpu=tpu, options=options))
    write_script(shared / "bin/srun", SRUN.format(job=os.getpid()))
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | variables
    environment["PATH"] = f"{shared / 'bin'}:{os.environ['PATH']}"
    text = (ROOT / "experiments/launch" / name).read_text()
    if tpu:
        script = re.search(r"args:\n *- \|\n(.*?)\n {14}volumes:", text, re.DOTALL)[1]
        (command,) = [["bash", "-c", re.sub(r"^ +", "", script, flags=re.MULTILINE).replace("/shared", str(shared))]]
        hosts = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_SKIP_MDS_QUERY": "1"}
        environment |= hosts | dict.fromkeys(
            ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"), ""
        )
        commands = [(command, {"TPU_WORKER_ID": str(i)}) for i in range(2)]
    else:
        commands = [(["bash", str(ROOT / "experiments/launch" / name)], {})]
    processes = [
        subprocess.Popen(
            c, cwd=shared, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for c, more in commands
    ]
    said = "\n".join(p.communicate(timeout=550)[0] for p in processes)
    assert [p.returncode for p in processes] == [0] * len(processes), said[-5000:]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm.sh", "jobset.yaml"])
def test_the_command_starts_and_goes_on(shared, name):
    directory = shared / "runs/v3-671b"
    variables = {"RUN_DIR": directory, "DATA": shared / "data", "TOKENIZER": shared / "tokenizer.json"}
    variables = {k: str(v) for k, v in variables.items()}
    assert shlex.quote(str(shared)) == str(shared)
    run(shared, name, **variables)
    assert complete_steps(directory / "checkpoints") == [2, 4]
    said = run(shared, name, **variables)  # as after a requeue
    assert "going on from the checkpoint of step 4" in said
