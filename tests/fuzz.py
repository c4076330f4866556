"""Input of others, damaged at random for as long as is asked.

python -m tests.fuzz --seconds 1800 --workers 2 --seed 1 --out runs/fuzz

The seconds are those of all parts together, shared as PARTS says; workers are processes side by side. A case is a file
or a request that was good and then changed. It is read, or refused by one of the errors that this project names, in one
line; in 30 seconds at most; with at most twice the input and 500 MB of memory more than before. Anything else ends its
part, whose log stays in the folder. Needs no network.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  # before jax: the CPU, and hypothesis' profile

# isort: split
import hypothesis
import hypothesis.strategies as st
import jax
import pyarrow as pa
import pyarrow.parquet as pq

from dsv3_jax.data import PrepareOptions, load_tokenizer, prepare
from dsv3_jax.data.shards import INDEX, Prepared
from dsv3_jax.integrity import SEAL, seal
from dsv3_jax.training.checkpoints import Checkpoints, _write_hashes
from dsv3_jax.training.config import TrainConfig
from tests.checkpoint import test_family, test_fuzz, test_headers
from tests.checkpoint.test_fuzz import changes, one_line_or_none
from tests.serving.test_server import SCHEMA, TOOL, USER, Served
from tests.training.test_checkpoints import save, state_of

HANG_SECONDS = 30
TOKENIZERS = Path(__file__).parent / "golden/tokenizers"


@dataclasses.dataclass(frozen=True)
class Part:
    """make: puts good input into a folder. cases: strategy of changes. check: applies one to the input and reads it."""

    minutes: float
    make: Callable[[Path], Any]
    cases: st.SearchStrategy[Any]
    check: Callable[[Any, Any], None]


@st.composite
def damages(draw: Any) -> tuple[float, Callable[[bytes], bytes]]:
    """Which of several files, and a change of its content: of its JSON where it is some, and of bytes."""
    which, (apply, spoil) = draw(st.floats(0, 1, exclude_max=True)), draw(changes())
    cuts = draw(
        st.lists(
            st.tuples(st.sampled_from(["drop", "repeat", "zero", "insert"]), st.integers(0, 2**31), st.integers(1, 64)),
            max_size=2,
        )
    )

    def damage(content: bytes) -> bytes:
        with contextlib.suppress(ValueError):
            content = json.dumps(apply(json.loads(content))).encode()
        for how, where, size in cuts:
            at = where % (len(content) + 1)
            part = {"drop": b"", "repeat": content[at : at + size] * 2, "zero": bytes(size)}.get(
                how, random.Random(where).randbytes(size)
            )
            content = content[:at] + part + content[at if how == "insert" else at + size :]
        return spoil(content) if content else content

    return which, damage


def with_damage(
    files: list[Path], case: Any, read: Callable[[], object], after: Callable[[], object] = lambda: 0
) -> None:
    """Damages one of the files, calls `after`, reads, and puts the file back."""
    which, damage = case
    file = files[int(which * len(files))]
    good = file.read_bytes()
    try:
        file.write_bytes(bad := damage(good))
        after()
        one_line_or_none(read, 2 * len(bad))
    except BaseException:
        print(f"{file.name} was {bad!r}")
        raise
    finally:
        file.write_bytes(good)


# config -----------------------------------------------------------------------------------------------------


def make_config(folder: Path) -> Path:
    test_family.write_random_checkpoint(folder / "hf", test_family.TINY, block=(16, 16))
    return folder


def check_config(folder: Path, case: Any) -> None:
    fields, (apply, spoil) = case
    test_family.check_config(fields, folder / "hf")
    run = folder / "config.json"
    whole = apply(json.loads(json.dumps(dataclasses.asdict(TrainConfig.preset("tiny", "cpu")))))
    run.write_bytes(spoil(json.dumps(whole).encode()))
    one_line_or_none(lambda: TrainConfig.from_json(run), 2 * run.stat().st_size)


# orbax ------------------------------------------------------------------------------------------------------


def make_orbax(folder: Path) -> Path:
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    save(checkpoints, 7)
    checkpoints.close()
    return folder / "checkpoints/7"


def check_orbax(step: Path, case: Any) -> None:
    """The hashes are made anew, as by somebody who means harm: they don't protect orbax and tensorstore then."""
    files = sorted(f for f in step.rglob("*") if f.is_file() and f.name != "hashes.json")

    def read() -> None:
        checkpoints = Checkpoints(step.parent, keep=1)
        try:
            checkpoints.restore_newest(state_of(0))
        finally:
            checkpoints.close()

    with_damage(files, case, read, after=lambda: _write_hashes(step))


# tokenizers -------------------------------------------------------------------------------------------------


def make_tokenizers(folder: Path) -> Path:
    shutil.copytree(TOKENIZERS, folder / "tokenizers")
    return folder / "tokenizers"


def check_tokenizer(folder: Path, case: Any) -> None:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "expected.json")
    directory = files[int(case[0] * len(files))].parent

    def read() -> None:
        tokenizer = load_tokenizer(directory)
        for text in ("def f(x):\n    return 'grüße' ✓ 汉字 <s></s>", ""):
            ids = tokenizer.encode(text).tolist()
            assert isinstance(tokenizer.decode([*ids, tokenizer.eos_id, 10**6]), str)

    with_damage(files, case, read)


# datasets ---------------------------------------------------------------------------------------------------


def make_datasets(folder: Path) -> Path:
    texts = [f"text {i} " * (i % 7 + 1) for i in range(30)]
    lines = "".join(json.dumps({"text": t, "n": [1, {"a": None}]}) + "\n" for t in texts).encode()
    for name, content in {
        "text/a.txt": "\n".join(texts).encode(),
        "object/a.jsonl": json.dumps({"text": "a text", "n": [1, {"a": None}]}).encode(),  # JSON as a whole
        "lines/a.jsonl": lines,
        "gz/a.jsonl.gz": pa.compress(lines, codec="gzip", asbytes=True),
        "zst/a.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
    }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(content)
    for name, codec in (("parquet", "snappy"), ("plain", "none")):
        (folder / name).mkdir()
        pq.write_table(pa.table({"text": texts, "n": list(range(30))}), folder / name / "a.parquet", compression=codec)
    prepare([str(folder / "lines")], folder / "prepared", PrepareOptions(validation_fraction=0.2))
    return folder


def check_dataset(folder: Path, case: Any) -> None:
    made, prepared = folder / "made", folder / "prepared"
    files = sorted(f for f in folder.glob("*/*") if f.is_file())
    source = files[int(case[0] * len(files))]

    def read() -> None:
        if source.parent == prepared:
            read_prepared(prepared)
        else:
            prepare([str(source.parent)], made, PrepareOptions(validation_fraction=0))

    def seal_again() -> None:  # as somebody may who writes such files
        if source.name == INDEX:
            with contextlib.suppress(ValueError, AttributeError):
                fields = {k: v for k, v in json.loads(source.read_bytes()).items() if k != SEAL}
                source.write_text(json.dumps(seal(fields)))

    try:
        with_damage(files, case, read, after=seal_again)
    finally:
        for left in folder.glob("made*"):
            shutil.rmtree(left)


def read_prepared(directory: Path) -> None:
    prepared = Prepared.open(directory)
    for split in ("training", "validation"):
        data = prepared.split(split)
        for block in range(len(data.block_tokens)):
            shard, bounds = data.block(block)
            data.read(shard, list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)))


# requests ---------------------------------------------------------------------------------------------------

GENERATION = {
    **{"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 1, "n": 2, "stop": ["x"]},
    **{"presence_penalty": 0.1, "logit_bias": {"3": 1}, "stream": False, "stream_options": {"include_usage": True}},
    **{"stop_token_ids": [5], "ignore_eos": False, "response_format": {"type": "text"}, "guided_regex": None},
}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TALK = [{"role": "system", "content": [{"type": "text", "text": "Hi"}]}, USER]
REQUESTS = [
    ("/v1/completions", {"prompt": "ab", "logprobs": 2, "echo": True, **GENERATION}),
    ("/v1/completions", {"prompt": [[97], [98, 99]], "stream": True, "max_tokens": 3}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 20, "response_format": FORM}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 20, "structured_outputs": {"regex": "[a-z]{1,3}(x|y)*"}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 20, "guided_choice": ["yes", "no"]}),
    ("/v1/chat/completions", {"messages": TALK, "logprobs": True, "top_logprobs": 2, **GENERATION}),
    ("/v1/chat/completions", {"messages": TALK, "tools": [TOOL], "tool_choice": "required", "max_tokens": 30}),
    ("/v1/chat/completions", {"messages": [USER], "stream": True, "chat_template_kwargs": {"thinking": True}}),
    ("/tokenize", {"messages": TALK, "add_generation_prompt": True}),
    ("/tokenize", {"prompt": "ab", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [97, 98]}),
]


def check_request(served: Served, case: Any) -> None:
    (path, body), (apply, spoil) = case
    content = spoil(json.dumps(apply(json.loads(json.dumps(body)))).encode())

    def ask() -> None:
        answer = served.client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            message = answer.json()["error"]["message"]
            assert "\n" not in message
            assert len(message) < 1500

    one_line_or_none(ask, 2 * len(content))
    served.engine.requests.clear()
    assert not served.service.running


PARTS = {
    "config": Part(4, make_config, st.tuples(test_family.fields(), changes()), check_config),
    "headers": Part(
        4,
        lambda folder: folder,
        st.one_of(
            st.tuples(st.just(test_headers.check_header), test_headers.headers()),
            st.tuples(st.just(test_headers.check_bytes), test_headers.bytes_changed),
        ),
        lambda folder, case: case[0](folder, case[1]),
    ),
    "converted": Part(
        4,
        test_fuzz.make_converted,
        st.tuples(st.sampled_from(list(test_fuzz.CHECKS)), changes()),
        lambda folder, case: test_fuzz.CHECKS[case[0]](folder, case[1]),
    ),
    "orbax": Part(5, make_orbax, damages(), check_orbax),
    "tokenizers": Part(4, make_tokenizers, damages(), check_tokenizer),
    "datasets": Part(5, make_datasets, damages(), check_dataset),
    "requests": Part(4, lambda _: Served(), st.tuples(st.sampled_from(REQUESTS), changes()), check_request),
}
"""minutes: of 30. `converted` is the index, the manifest and the arrays' descriptions of a converted checkpoint."""


def fuzz(name: str, folder: Path, seed: int, seconds: float = 0, most: int = 10**9) -> int:
    """Checks cases of a part until the time is over or there were so many. Returns how many there were."""
    part, count, failed = PARTS[name], 0, False
    folder.mkdir(parents=True)
    made, ends = part.make(folder), time.monotonic() + seconds

    def over() -> bool:
        return count >= most or bool(seconds and time.monotonic() > ends)

    def check(case: Any) -> None:
        nonlocal count, failed
        if over() and not failed:
            return
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
        try:
            part.check(made, case)
        except BaseException:
            failed = True
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        count += 1

    settings = hypothesis.settings(
        max_examples=min(most, 500), deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    for again in range(10**9):
        if over():
            break
        hypothesis.seed(seed * 10**6 + again)(settings(hypothesis.given(part.cases)(check)))()
    return count


def piece(name: str, folder: Path, seed: int, seconds: float) -> None:
    """A process of its own: what it says goes to a log, how it ended into a file."""
    folder.mkdir(parents=True)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        cases = fuzz(name, folder / "input", seed, seconds)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    (folder / "cases.json").write_text(json.dumps({"cases": cases, "peak": test_fuzz.resident_memory()}))


def end_of(log: Path) -> str:
    """The last lines of a log, each of moderate length; a folder may be gone with the machine that it was on."""
    lines = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else ["(there is no log)"]
    return "\n".join(line if len(line) < 600 else f"{line[:300]} ... {line[-300:]}" for line in lines)


def main() -> None:
    """Runs the parts, writes fuzz.md, and ends with 1 if one of them found something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800, help="of all parts and workers together")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    minutes = sum(PARTS[name].minutes for name in arguments.only)
    each = -(-arguments.workers // len(arguments.only))  # pieces of a part, so that every worker has one
    waiting = [(name, i) for i in range(each) for name in arguments.only]
    spawn, running, ended = multiprocessing.get_context("spawn"), [], collections.defaultdict(list)
    began = time.monotonic()
    while waiting or running:
        while waiting and len(running) < arguments.workers:
            name, i = waiting.pop(0)
            seconds = arguments.seconds * PARTS[name].minutes / minutes / each
            folder = out / f"{name}{i}"
            process = spawn.Process(target=piece, args=(name, folder, arguments.seed * 1000 + i, seconds))
            process.start()
            running.append((name, folder, process))
        time.sleep(0.2)
        for entry in [e for e in running if not e[2].is_alive()]:
            running.remove(entry)
            name, folder, process = entry
            ended[name].append((folder, process.exitcode))
            if process.exitcode:
                print(f"{name} ended with {process.exitcode}: {folder / 'log.txt'} ends so", flush=True)
                print(end_of(folder / "log.txt"), flush=True)
    lines = [
        *("# Damaged input", ""),
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, Python {sys.version.split()[0]}, jax {jax.__version__},",
        f"{time.monotonic() - began:.0f} s. A case must be read, or refused by a named error in one line, in",
        f"{HANG_SECONDS} seconds, with at most twice its input and 500 MB more memory than before. `found` counts the",
        "workers that met something else.",
        *("", "```"),
        f"python -m tests.fuzz --seconds {arguments.seconds:.0f} --workers {arguments.workers} --seed {arguments.seed}",
        *("```", "", "| part | seconds | cases | peak memory | found |", "|---|---:|---:|---:|---:|"),
    ]
    for name in arguments.only:
        good = [json.loads((folder / "cases.json").read_text()) for folder, code in ended[name] if not code]
        peak, found = max([g["peak"] for g in good], default=0), len(ended[name]) - len(good)
        seconds = arguments.seconds * PARTS[name].minutes / minutes
        lines.append(f"| {name} | {seconds:.0f} | {sum(g['cases'] for g in good):,} | {peak / 1e6:.0f} MB | {found} |")
    (out / "fuzz.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))
    sys.exit(any(code for pieces in ended.values() for _, code in pieces))


if __name__ == "__main__":
    main()
