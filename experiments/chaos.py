"""Trains through kill -9, SIGTERM, SIGSTOP, full disks and damaged checkpoints, and compares with an undisturbed run.

python -m experiments.chaos --rounds 100 --seed 0 --workers 1 --out runs/chaos

A round is one life of a training process: it is started with the same command (`--auto-resume`), disturbed at a random
moment (while it starts, between steps, or inside a save), and what it has reached is recorded. Rounds follow each other
until a run is finished; its last checkpoint must then hold the bits of the undisturbed run's, its log the same losses.
Workers take runs side by side, each in a directory of its own. A full disk is a small file system where one may be
mounted; elsewhere the kernel refuses every write of the process to a file (RLIMIT_FSIZE 0). Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import multiprocessing
import os
import queue
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import dsv3_jax.training.trainer  # noqa: F401  # imported once: each life is a fork of this process
from dsv3_jax import cli
from dsv3_jax.checkpoint.files import CheckpointError
from dsv3_jax.checkpoint.runs import complete_steps, step_hashes

STEPS, INTERVAL = 240, 40
MOST_LIVES = 60
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
PLAN = [(d, m) for d in DISTURBANCES for m in MOMENTS]
"""Each of them as often; when exactly is drawn."""


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
    """A forked process that trains in a directory. Its output waits in a pipe, for which a disk may be full."""

    def __init__(self, directory: Path, source: Path) -> None:
        self.directory = directory
        self._reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            _train(directory, source)
        os.close(writer)

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

    def said(self) -> str:
        """All that it wrote, once it has ended."""
        os.set_blocking(self._reader, False)
        text = b""
        with os.fdopen(self._reader, "rb", buffering=0) as reader:
            while part := reader.read(1 << 20):
                text += part
        return text.decode(errors="replace")


def _train(directory: Path, source: Path) -> None:
    code = 1
    try:
        cli.main(["train", "--run-dir", str(directory), "--data.source", str(source), *CONFIG, "--auto-resume"])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class SmallDisk:
    """A small file system of the run's own, which others fill."""

    words = f"a file system of {DISK_MB} MB, filled again and again"

    @contextlib.contextmanager
    def at(self, folder: Path) -> Iterator[None]:
        """Mounts it on a folder."""
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", folder], check=True)

    def fill(self, life: Life) -> None:
        """Writes until it is full. The process may have deleted something since the last time."""
        with contextlib.suppress(OSError), _filler(life).open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self, life: Life) -> None:
        """Makes room again."""
        _filler(life).unlink(missing_ok=True)


def _filler(life: Life) -> Path:
    return life.directory.parent / "filler"


class NoWrites:
    """Any folder; from some moment on the kernel refuses a process's writes to files."""

    words = "every write to a file refused (RLIMIT_FSIZE 0)"

    @contextlib.contextmanager
    def at(self, folder: Path) -> Iterator[None]:
        """Makes the folder."""
        folder.mkdir()
        yield

    def fill(self, life: Life) -> None:
        """Refuses the writes of a process. Python ignores the signal that would come with it."""
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def free(self, life: Life) -> None:
        """The limit ends with the process."""


def choose_disk(kind: str) -> SmallDisk | NoWrites:
    """The kind that is asked for; of "auto", mounting where that is permitted."""
    if kind == "auto":
        with tempfile.TemporaryDirectory() as folder:
            try:
                with SmallDisk().at(Path(folder) / "disk"):
                    kind = "mount"
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"no file system can be mounted ({error}): writes are refused by a limit instead", flush=True)
    return SmallDisk() if kind == "mount" else NoWrites()


@dataclasses.dataclass
class Work:
    """All that a worker knows. numbers: how many rounds have begun. ends: when no further run begins."""

    out: Path
    source: Path
    expected: dict[str, str]
    disk: SmallDisk | NoWrites
    seed: int
    rounds: int
    numbers: Any
    results: Any
    ends: float


def main() -> None:
    """Runs the rounds, and writes chaos.md and chaos.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="at least; a run that has begun is finished")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side; about one per core")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further run begins")
    parser.add_argument("--disk", choices=("auto", "mount", "limit"), default="auto", help="how a disk gets full")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    arguments = parser.parse_args()
    out, rng = arguments.out.absolute(), random.Random(arguments.seed)
    shutil.rmtree(out, ignore_errors=True)
    source = out / "text"
    source.mkdir(parents=True)
    lines = [" ".join(str(rng.randrange(100)) for _ in range(40)) for _ in range(2000)]
    (source / "numbers.txt").write_text("\n".join(lines))
    disk, began = choose_disk(arguments.disk), time.monotonic()
    undisturbed = out / "undisturbed"
    life = Life(undisturbed, source)
    if code := life.wait(600):
        raise SystemExit(f"the undisturbed run ended with {code}: {life.said()}")
    expected = outcome(undisturbed)
    print(f"undisturbed run: {time.monotonic() - began:.0f} s; disk full: {disk.words}", flush=True)
    many = multiprocessing.get_context("fork")
    work = Work(out, source, expected, disk, arguments.seed, arguments.rounds, many.Value("i", 0), many.Queue(), 0)
    work.ends = began + arguments.seconds
    workers = [many.Process(target=take_runs, args=(work,)) for _ in range(arguments.workers)]
    for worker in workers:
        worker.start()
    rounds: list[Round] = []
    runs: list[list[str]] = []
    while (working := any(w.is_alive() for w in workers)) or not work.results.empty():
        with contextlib.suppress(queue.Empty):
            these, different = work.results.get(timeout=1 if working else 0)
            rounds += these
            runs.append(different)
            write(out, arguments, disk, rounds, runs, time.monotonic() - began)
    failed = [w.exitcode for w in workers if w.exitcode]
    bad = [r for r in rounds if r.wrong] + [r for r in runs if r]
    print(f"{len(rounds)} rounds, {len(runs)} runs, {len(bad)} wrong, in {time.monotonic() - began:.0f} s")
    sys.exit(1 if bad or failed or not runs else 0)


def take_runs(work: Work) -> None:
    """Lets runs live from their first round to their last step, until enough rounds have begun."""
    while work.numbers.value < work.rounds and time.monotonic() < work.ends:
        records: list[Round] = []
        folder = Path(tempfile.mkdtemp(prefix="run", dir=work.out)) / "disk"
        with work.disk.at(folder):
            finished = False
            while not finished:
                with work.numbers.get_lock():
                    number = work.numbers.value
                    work.numbers.value += 1
                records.append(record := Round(*PLAN[number % len(PLAN)]))
                rng = random.Random(f"{work.seed} {number}")
                finished = disturbed(record, work, folder / "run", work.out / f"round{number}.txt", rng)
                print(number, dataclasses.asdict(record), flush=True)
                if len(records) == MOST_LIVES and not finished:
                    record.wrong = record.wrong or f"the run isn't finished after {MOST_LIVES} lives"
                    break
            different = differences(work.expected, outcome(folder / "run")) if finished else ["not finished"]
            print(f"run finished: {different or 'the same bits'}", flush=True)
        work.results.put((records, different))


def disturbed(record: Round, work: Work, directory: Path, output: Path, rng: random.Random) -> bool:
    """Lets a life begin and disturbs it. Returns whether it finished the run."""
    before, damaged, log = newest(directory), None, which_log(directory)
    life, disk = Life(directory, work.source), work.disk
    code = await_moment(life, record.moment, rng)
    if code is None and record.disturbance == "SIGTERM":
        os.kill(life.pid, signal.SIGTERM)
        code = life.wait(300)
    elif code is None and record.disturbance == "disk full":
        while code is None:
            disk.fill(life)
            code = life.wait(0.05)
    elif code is None:
        if "SIGSTOP" in record.disturbance:
            os.kill(life.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.2, 2))
            os.kill(life.pid, signal.SIGCONT)
            code = life.wait(rng.uniform(0, 2))
        if code is None:
            os.kill(life.pid, signal.SIGKILL)
            code = life.wait(60)
    disk.free(life)
    record.ended = str(code)
    record.complete = newest(directory)
    if which_log(directory) != log:  # else it took no step
        record.reached, record.writing = max([0, *logged(directory)]), bool(unfinished(directory))
        record.lost = max(record.reached - record.complete, 0)
    output.write_text(said := life.said())
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
    """Steps of the complete checkpoints, ascending. A damaged one isn't, which the next life sets aside."""
    checkpoints = directory / "checkpoints"
    return [s for s in complete_steps(checkpoints) if undamaged(checkpoints / str(s))] if checkpoints.is_dir() else []


def undamaged(step: Path) -> bool:
    """Whether all files of a checkpoint are as they were written."""
    try:
        hashes = step_hashes(step)
        hashes.check(hashes.expected)
    except (OSError, CheckpointError):
        return False
    return bool(hashes.expected)


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
    if (pid := os.fork()) == 0:  # this process never starts a backend
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
    os.waitpid(pid, 0)
    return result


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of what isn't equal."""
    return sorted(k for k in expected | found if expected.get(k) != found.get(k))


def write(
    out: Path,
    arguments: argparse.Namespace,
    disk: SmallDisk | NoWrites,
    rounds: list[Round],
    runs: list[list[str]],
    seconds: float,
) -> None:
    """Writes the table."""
    (out / "chaos.json").write_text(json.dumps({"rounds": [dataclasses.asdict(r) for r in rounds], "runs": runs}))
    rows = ""
    for disturbance, moment in PLAN:
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

{datetime.date.today()}, {os.cpu_count()} CPU cores, Python {sys.version.split()[0]}, jax {jax.__version__},
orbax-checkpoint {ocp.__version__}, commit {_commit()}; {seconds / 60:.0f} minutes.

```
python -m experiments.chaos --rounds {arguments.rounds} --seed {arguments.seed} --workers {arguments.workers}
```

{len(rounds)} rounds, {len(runs)} runs of {STEPS} steps, a checkpoint every {INTERVAL} steps. Each round is a life
of the process, always started with the same command line, and disturbed while it starts, between two steps, or inside a
save. The last checkpoint (every array and the data's position) and the loss of every step are those of the undisturbed
run, bit for bit: **{same} runs**. "Disk full" is {disk.words}.

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
