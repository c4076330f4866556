"""Measures what asynchronous checkpoints add to the time of training steps.

python -m experiments.bench_save --blocks 4 --sequences 32

Steps of `v3-mini`, reduced, in blocks of 20: every second block begins with the look for numbers that aren't
finite, and a save, whose writing goes on beside the steps of the block and is waited for at its end. The kinds take
turns, so that both meet the same machine. Processor time is reported besides: on a CPU all cores compute, so that what
a save takes of them, steps wait for; other programs change it less than they change time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax

from dsv3_jax.data import load_tokenizer
from dsv3_jax.training.checkpoints import Checkpoints
from dsv3_jax.training.config import TrainConfig
from dsv3_jax.training.guard import name_not_finite
from dsv3_jax.training.setup import Setup

INTERVAL = 20


def main() -> None:
    """Prints a table of the blocks' times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="of each kind, at most")
    parser.add_argument("--sequences", type=int, default=32, help="of 128 tokens in a step")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="after which no further pair of blocks begins"
    )
    arguments = parser.parse_args()
    config = TrainConfig.preset("v3-mini", steps=2 * INTERVAL * (arguments.blocks + 1))
    model = dataclasses.replace(config.model, num_hidden_layers=4, n_routed_experts=16, num_nextn_predict_layers=0)
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, sequence_length=128),
        schedule=dataclasses.replace(config.schedule, batch_size=arguments.sequences),
        sample_tokens=0,
    )
    setup = Setup(config, load_tokenizer(None))
    state, done = setup.init(jax.random.key(0)), 0
    times: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=2)
        for block in range(2 * arguments.blocks + 1):
            saving, began, used = block % 2 == 0, time.perf_counter(), time.process_time()
            if not saving and block > 1 and began - started > arguments.seconds:
                break
            if saving:
                assert not name_not_finite(state, setup.finite(state))
                checkpoints.save(state, setup.data.get_state())
            for _ in range(INTERVAL):
                state, _ = setup.train_step(state, *setup.batch(done))
                done += 1
            jax.block_until_ready(state)
            if saving:
                checkpoints.wait()
            if block:  # the first one compiles
                times[saving].append(time.perf_counter() - began)
                processor[saving].append(time.process_time() - used)
                kind = "saving" if saving else "not saving"
                seconds = f"{times[saving][-1]:.2f} s, {processor[saving][-1]:.2f} s of processors"
                print(f"block {block}: {kind}, {seconds}", flush=True)
        checkpoints.close()
    setup.data.stop()
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.router, state.opt_state)))
    plain = statistics.median(times[False])
    tokens = config.schedule.batch_size * config.data.sequence_length
    print(f"{datetime.date.today()}, {os.cpu_count()} CPU cores, jax {jax.__version__}, {tokens:,} tokens in a step")
    print(f"state {size / 1e6:.1f} MB, step {plain / INTERVAL * 1e3:.1f} ms (median of {len(times[False])} blocks)")
    for what, these in (("time", times), ("processor time", processor)):
        median = statistics.median(these[True]) / statistics.median(these[False]) - 1
        least = min(these[True]) / min(these[False]) - 1
        print(f"saving every {INTERVAL} steps adds {median:+.2%} to the median of {what}, {least:+.2%} to the least")


if __name__ == "__main__":
    main()
