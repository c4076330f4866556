"""One process of a job under test: the small run on four devices, through the command line's own entry."""

import sys
import time

from dsv3_jax import cli

directory, *options = sys.argv[1:]
if "--pause" in options:
    options.remove("--pause")
    from dsv3_jax.training.setup import Setup

    batch = Setup.batch

    def slow(self, step):
        if step > 4 and step % 2:
            time.sleep(2)
        return batch(self, step)

    Setup.batch = slow

if "--die-in-save" in options:  # of step 6: the first process is still at its files when the second one ends
    options.remove("--die-in-save")
    import os
    import signal

    import jax

    from dsv3_jax.training import checkpoints

    finalize, save = checkpoints._HashedPath.finalize, checkpoints.Checkpoints.save

    async def slow_finalize(self):
        if "6" in self.get().parts[-1].split("."):
            time.sleep(600)
        await finalize(self)

    def fatal_save(self, state, *arguments, **keywords):
        save(self, state, *arguments, **keywords)
        if int(state.step) == 6 and jax.process_index() == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints._HashedPath.finalize, checkpoints.Checkpoints.save = slow_finalize, fatal_save

SMALL = {
    **{"model.hidden-size": 16, "model.intermediate-size": 16, "model.moe-intermediate-size": 8},
    **{"model.num-hidden-layers": 2, "model.n-routed-experts": 8, "model.num-experts-per-tok": 2},
    **{"model.n-group": 4, "model.topk-group": 2, "model.q-lora-rank": 8, "model.kv-lora-rank": 8},
    **{"data.sequence-length": 16, "schedule.batch-size": 8, "schedule.steps": 8, "schedule.warmup-steps": 2},
    **{"log-every": 2, "validate-every": 4, "validation-batches": 1, "checkpoint-every": 2, "sample-tokens": 4},
    **{"runtime.sharding": "fsdp_ep", "mesh.fsdp": 2, "mesh.expert": 2},
}
arguments = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
cli.main(["train", "--run-dir", directory, *arguments, *options])
