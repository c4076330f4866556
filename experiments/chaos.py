"""Trains through kill -9, SIGTERM, SIGSTOP, full disks and damaged checkpoints, and compares with an undisturbed run.

python -m experiments.chaos --rounds 100 --seed 0 --out runs/chaos

A round is one life of a training process: it is started with the same command (`--auto-resume`), disturbed at a random
moment (while it starts, between steps, or inside a save), and what it has reached is recorded. Rounds follow each other
until a run is finished; its last checkpoint must then hold the bits of the undisturbed run's, its log the same losses.
Needs the right to mount a small file system. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

import dsv3_jax.training.trainer  # noqa: F401  # imported once: each life is a fork of this process
from dsv3_jax import cli
from dsv3_jax.checkpoint.runs import complete_steps

STEPS, INTERVAL = 240, 40
DISK_MB = 24
CONFIG = [
    *("--model.hidden-size", "16", "--model.intermediate-size", "16", "--model.moe-intermediate-size", "8"),
    *("--model.num-hidden-layers", "2", "--model.n-routed-experts", "4", "--model.num-experts-per-tok", "2"),
    *("--model.n-group", "2", "--model.topk-group", "1", "--model.q-lora-rank", "8", "--model.kv-lora-rank", "8"),
    *("--model.num-nextn-predict-layers", "0", "--data.sequence-length", "16", "--data.validation-fraction", "0"),
    *("--schedule.batch-size", "4", "--schedule.steps", str(STEPS), "--checkpoint-every", str(INTERVAL)),
    *("--log-every", "1", "--sample-tokens", "0"),
]
DISTURBANCES = ("kill -9", "SIGTERM", "SIGSTOP, SIGCONT, kill -9", "disk full", "kill -9, newest checkpoint damaged")
MOMENTS = ("start", "step", "save")


@dataclasses.dataclass
class Round:
    """A life and its end. lost: steps that the next one takes again; writing: it died as a save was under way."""

    disturbance: str
    moment: str
    reached: int = 0
    ended: str = ""
    complete: int = -1
    damaged: int | None = None
    lost: int = 0
    writing: bool = False
    wrong: str = ""


class Life:
    """A forked process that trains in a directory."""

    def __init__(self, directory: Path, output: Path, source: Path) -> None:
        self.directory, self.output = directory, output
        self.pid = os.fork()
        if self.pid == 0:
            _train(directory, output, source)

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, seconds: float) -> int | None:
        """As `poll`, after at most some seconds."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < end:
            time.sleep(0.005)
        return code


def _train(directory: Path, output: Path, source: Path) -> None:
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        cli.main(["train", "--run-dir", str(directory), "--data.source", str(source), *CONFIG, "--auto-resume"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Runs the rounds, and writes chaos.md and chaos.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    arguments = parser.parse_args()
    out, rng = arguments.out.absolute(), random.Random(arguments.seed)
    shutil.rmtree(out, ignore_errors=True)
    (out / "disk").mkdir(parents=True)
    source = out / "text"
    source.mkdir()
    lines = [" ".join(str(rng.randrange(100)) for _ in range(40)) for _ in range(2000)]
    (source / "numbers.txt").write_text("\n".join(lines))
    began, rounds, runs = time.monotonic(), [], []
    undisturbed = out / "undisturbed"
    life = Life(undisturbed, out / "undisturbed.txt", source)
    if code := life.wait(600):
        raise SystemExit(f"the undisturbed run ended with {code}: {(out / 'undisturbed.txt').read_text()}")
    expected = outcome(undisturbed)
    print(f"undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
    disk = out / "disk"
    while len(rounds) < arguments.rounds:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", disk], check=True)
        try:
            directory = disk / "run"
            while True:
                plan = [(d, m) for d in DISTURBANCES for m in MOMENTS]
                record = Round(*plan[len(rounds) % len(plan)])  # each of them as often; when exactly is drawn
                finished = disturbed(record, directory, out / f"round{len(rounds)}.txt", source, rng)
                rounds.append(record)
                print(len(rounds), dataclasses.asdict(record), flush=True)
                if finished:
                    break
            runs.append(differences(expected, outcome(directory)))
            print(f"run {len(runs)}: {runs[-1] or 'the same bits'}", flush=True)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
        write(out, arguments, rounds, runs, time.monotonic() - began)
    bad = [r for r in rounds if r.wrong] + [r for r in runs if r]
    sys.exit(1 if bad else 0)


def disturbed(record: Round, directory: Path, output: Path, source: Path, rng: random.Random) -> bool:
    """Lets a life begin and disturbs it. Returns whether it finished the run."""
    before, damaged, log = newest(directory), None, which_log(directory)
    life, filler = Life(directory, output, source), directory.parent / "filler"
    code = await_moment(life, record.moment, rng)
    if code is None and record.disturbance == "SIGTERM":
        os.kill(life.pid, signal.SIGTERM)
        code = life.wait(300)
    elif code is None and record.disturbance == "disk full":
        while code is None:  # others write and delete: full again and again
            fill(filler)
            code = life.wait(0.05)
        filler.unlink(missing_ok=True)
    elif code is None:
        if "SIGSTOP" in record.disturbance:
            os.kill(life.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.2, 2))
            os.kill(life.pid, signal.SIGCONT)
            code = life.wait(rng.uniform(0, 2))
        if code is None:
            os.kill(life.pid, signal.SIGKILL)
            code = life.wait(60)
    filler.unlink(missing_ok=True)
    record.ended = str(code)
    record.complete = newest(directory)
    if which_log(directory) != log:  # else it took no step
        record.reached, record.writing = max([0, *logged(directory)]), bool(unfinished(directory))
        record.lost = max(record.reached - record.complete, 0)
    said = output.read_text(errors="replace")
    expected = {0, -signal.SIGKILL}
    expected |= {130, -signal.SIGTERM} if record.disturbance == "SIGTERM" else set()
    expected |= {2} if record.disturbance == "disk full" else set()
    if code not in expected or "Traceback" in said:
        record.wrong = f"ended with {code}: {said[-600:]}"
    if record.complete < before:
        record.wrong = f"checkpoint {before} is gone, {record.complete} is left"
    if code == 130 and record.lost:
        record.wrong = "SIGTERM lost steps"
    if code != 0 and "damaged" in record.disturbance and len(steps := complete(directory)) > 1:
        record.damaged = damaged = steps[-1]
        damage(directory / "checkpoints" / str(damaged), rng)
        record.lost = max(record.reached - steps[-2], 0)
    # A write goes on beside the steps that follow it.
    allowed = INTERVAL * (1 + (damaged is not None) + record.writing)
    if record.lost > allowed:
        record.wrong = f"lost {record.lost} steps of {allowed}"
    return code == 0


def await_moment(life: Life, moment: str, rng: random.Random) -> int | None:
    """Waits for a random moment of the kind; the exit code if the life ends before it."""
    if moment == "start":
        return life.wait(rng.uniform(0, 8))
    first = max([0, *logged(life.directory)])
    count = rng.randint(1, INTERVAL * 2) if moment == "step" else rng.randint(0, 2)
    saves: set[str] = set()
    deadline = time.monotonic() + 300
    while (code := life.poll()) is None and time.monotonic() < deadline:
        if moment == "step" and max([0, *logged(life.directory)]) >= first + count:
            break
        saves |= unfinished(life.directory)
        if len(saves) > count:
            break
        time.sleep(0.002)
    return code if code is not None else life.wait(rng.uniform(0, 0.15))


def fill(filler: Path) -> None:
    """Writes until the disk is full."""
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def damage(step: Path, rng: random.Random) -> None:
    """Flips a bit, cuts off, or deletes one file of a checkpoint."""
    files = [f for f in sorted(step.rglob("*")) if f.is_file() and f.stat().st_size and f.name[0] != "_"]
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    match rng.randrange(3):
        case 0:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        case 1:
            file.write_bytes(content[: rng.randrange(len(content))])
        case 2:
            file.unlink()


def complete(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return complete_steps(directory / "checkpoints") if (directory / "checkpoints").is_dir() else []


def newest(directory: Path) -> int:
    """The newest complete step, or -1."""
    return max([-1, *complete(directory)])


def unfinished(directory: Path) -> set[str]:
    """Names of checkpoints that are being written."""
    return {p.name for p in (directory / "checkpoints").glob("*tmp*")}


def which_log(directory: Path) -> int | None:
    """The log's file: a life that begins to take steps writes a new one."""
    with contextlib.suppress(FileNotFoundError):
        return (directory / "metrics.jsonl").stat().st_ino
    return None


def logged(directory: Path) -> dict[int, str]:
    """By step what the log says of its loss; the last line may be half written."""
    losses = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (directory / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if "loss" in record:
                    losses[record["step"]] = repr(record["loss"])
    return losses


def outcome(directory: Path) -> dict[str, str]:
    """A hash of each array of the last checkpoint's state, the data's position, and each step's loss."""
    reader, writer = os.pipe()
    if os.fork() == 0:  # this process never starts a backend
        try:
            step = directory / "checkpoints" / str(newest(directory))
            with ocp.PyTreeCheckpointer() as checkpointer:
                state = checkpointer.restore(step / "state")
            leaves = jax.tree_util.tree_leaves_with_path(state)
            found = {jax.tree_util.keystr(p): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for p, x in leaves}
            found |= {"data": (step / "data/metadata").read_text(), "step": step.name}
            with os.fdopen(writer, "w") as pipe:
                json.dump(found | {f"loss of step {s}": loss for s, loss in logged(directory).items()}, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result: dict[str, str] = json.load(pipe)
    os.wait()
    return result


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of what isn't equal."""
    return sorted(k for k in expected | found if expected.get(k) != found.get(k))


def write(out: Path, arguments: argparse.Namespace, rounds: list[Round], runs: list[list[str]], seconds: float) -> None:
    """Writes the table."""
    (out / "chaos.json").write_text(json.dumps({"rounds": [dataclasses.asdict(r) for r in rounds], "runs": runs}))
    rows = ""
    for disturbance in DISTURBANCES:
        for moment in MOMENTS:
            these = [r for r in rounds if (r.disturbance, r.moment) == (disturbance, moment)]
            lost = [r.lost for r in these]
            ended = collections.Counter(r.ended for r in these)
            rows += (
                f"| {disturbance} | {moment} | {len(these)} | {', '.join(f'{c} x {e}' for e, c in ended.items())} "
                f"| {max(lost, default=0)} | {sum(r.writing for r in these)} | {sum(bool(r.wrong) for r in these)} |\n"
            )
    intact = [r for r in rounds if r.damaged is None]
    whole = max((r.lost for r in intact if not r.writing), default=0)
    beside = max((r.lost for r in intact if r.writing), default=0)
    same = f"{sum(not r for r in runs)} of {len(runs)}"
    text = f"""# Chaos: a run that is disturbed at random moments

{datetime.date.today()}, {os.cpu_count()} shared CPU cores, Python {sys.version.split()[0]}, jax {jax.__version__},
orbax-checkpoint {ocp.__version__}, commit {_commit()}; {seconds / 60:.0f} minutes.

```
python -m experiments.chaos --rounds {arguments.rounds} --seed {arguments.seed}
```

{len(rounds)} rounds, {len(runs)} runs of {STEPS} steps, a checkpoint every {INTERVAL} steps. Each round is a life
of the process, always started with the same command line, and disturbed while it starts, between two steps, or inside a
save. The last checkpoint (every array and the data's position) and the loss of every step are those of the undisturbed
run, bit for bit: **{same} runs**.

Most steps that a round lost: **{whole}** where no checkpoint was being written. A write goes on beside the steps that
follow it; a death amid one also loses the interval before it (at most {beside} steps here). A damaged newest
checkpoint costs the interval before it too.

| disturbance | moment | rounds | exit codes (negative: signal) | most steps lost | in a write | wrong |
|---|---|---|---|---|---|---|
{rows}"""
    (out / "chaos.md").write_text(text)


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
