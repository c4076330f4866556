"""Measures the data path: preparing against the tokenizer alone, memory, start-up, random access.

python -m experiments.bench_data [rate] [memory] [start] [kills] --scale 1.0

`rate` compares `prepare` with `tokenizers.encode_batch` on the same text and cores. `memory` prepares a generated JSONL
of 5 GB that holds one document of 500 MB. `start` opens a generated corpus of 2 billion tokens. `kills` ends `prepare`
with SIGKILL at ten random moments, goes on each time, and compares the bytes with those of a run that nothing stopped.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_jax.data.sources import find_files


def main() -> None:
    """Runs what was asked for, and prints lines of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["rate", "memory", "start", "kills"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes")
    parser.add_argument("--directory", type=Path, default=None, help="where to work; a temporary one by default")
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        for name in arguments.what:
            {"rate": rate, "memory": memory, "start": start, "kills": kills}[name](Path(folder), arguments.scale)


def rate(folder: Path, scale: float) -> None:
    """Times `prepare` and the tokenizer alone, in turn, three times each."""
    texts = corpus()
    tokenizer = train_tokenizer(texts, folder / "tokenizer.json")
    repeated = [text for _ in range(max(int(6 * scale), 1)) for text in texts]
    source = folder / "rate.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in repeated))
    size = sum(len(text.encode()) for text in repeated)
    alone, whole = [], []
    for i in range(3):
        began = time.perf_counter()
        for j in range(0, len(repeated), 256):
            tokenizer.encode_batch(repeated[j : j + 256], add_special_tokens=False)
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        prepare(source, folder / f"rate{i}", "--tokenizer", str(folder / "tokenizer.json"))
        whole.append(time.perf_counter() - began)
    print(f"text: {size / 1e6:.0f} MB; encode_batch alone: {size / min(alone) / 1e6:.2f} MB/s, best of 3")
    share = min(alone) / min(whole)
    print(f"prepare, its start included: {size / min(whole) / 1e6:.2f} MB/s, {share:.0%} of encode_batch")


def memory(folder: Path, scale: float) -> None:
    """Prepares a JSONL of 5 GB with a document of 500 MB among the others, as bytes."""
    source, rng = folder / "memory.jsonl", np.random.default_rng(0)
    lines = [" ".join(f"word{n}" for n in rng.integers(0, 9999, 500)) for _ in range(200)]
    block = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    total, long = int(5e9 * scale), int(5e8 * scale)
    with source.open("w") as file:
        while file.tell() < (total - long) // 2:
            file.write(block)
        file.write('{"text": "')
        for _ in range(long // len(lines[0])):
            file.write(lines[0] + "\\n")
        file.write('"}\n')
        while file.tell() < total:
            file.write(block)
    began = time.perf_counter()
    peak = prepare(source, folder / "memory")
    seconds = time.perf_counter() - began
    print(
        f"JSONL of {total / 1e9:.1f} GB with a document of {long / 1e6:.0f} MB: peak of all processes together "
        f"{peak / 1e9:.2f} GB, {seconds:.0f} s, {total / seconds / 1e6:.0f} MB/s (bytes as tokens)"
    )
    source.unlink()


def start(folder: Path, scale: float) -> None:
    """Opens 2 billion generated tokens in a new process: first batch, memory, random access."""
    destination = generate(folder / "start", int(2e9 * scale))
    subprocess.run([sys.executable, "-c", _START, str(destination)], check=True)


_START = """
import os, sys, time
from dsv3_jax.data import DataConfig, load_tokenizer, train_iterator
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

tokenizer = load_tokenizer()
before, began = resident(), time.perf_counter()
config = DataConfig(source=sys.argv[1], sequence_length=4096, validation_fraction=0)
it = train_iterator(config, tokenizer, 16)
next(it)
print(f"{it._rows.sources[0].parents[0]._documents.tokens:,} tokens: first batch of 16 x 4096 after "
      f"{time.perf_counter() - began:.2f} s")
for name, packing in (("concatenate", config.packing), ("best_fit", "best_fit")):
    if packing == "best_fit":
        import dataclasses
        began = time.perf_counter()
        it.stop()
        it = train_iterator(dataclasses.replace(config, packing=packing), tokenizer, 16)
        print(f"best_fit: start {time.perf_counter() - began:.1f} s", end="; ")
        rows = [it._rows.sources[0][i] for i in range(500)]
        print(f"{sum(int((r['segments'] > 0).sum()) for r in rows) / len(rows) / 4096:.2%} of a sequence filled")
    source = it._rows.sources[0]
    cpu, began = time.process_time(), time.perf_counter()
    for i in range(2000):
        source[i]
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    print(f"{name}: random access {2000 * 4096 / seconds / 1e6:.1f} million tokens/s in one thread, "
          f"{2000 * 4096 / cpu / 1e6:.1f} million per second of CPU")
print(f"resident memory grew by {(resident() - before) / 1e6:.0f} MB")
it.stop()
"""


def kills(folder: Path, scale: float) -> None:
    """Kills `prepare` of JSONL (plain, gzip), parquet and a long text at ten moments of a run's time."""
    source, rng = folder / "kills", np.random.default_rng()
    source.mkdir()
    texts = corpus()
    lines = [json.dumps({"text": text}) + "\n" for _ in range(max(int(4 * scale), 1)) for text in texts]
    (source / "a.jsonl").write_text("".join(lines))
    with gzip.open(source / "b.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(lines)
    pq.write_table(pa.table({"text": texts}), source / "c.parquet", row_group_size=200)
    (source / "d.txt").write_text("".join(texts) * 2)
    options = ["--shard-tokens", "2000000", "--deduplicate", "--workers", "2"]
    began = time.perf_counter()
    prepare(source, folder / "straight", *options)
    seconds = time.perf_counter() - began
    command = [sys.executable, "-m", "dsv3_jax", "prepare", str(source), str(folder / "killed"), *options]
    same, finished, killed = True, 0, 0
    while killed <= 10:
        moment = rng.uniform(0, seconds) if killed < 10 else None
        if (folder / "killed").exists():
            same, finished = same and contents(folder / "killed") == contents(folder / "straight"), finished + 1
            shutil.rmtree(folder / "killed")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            process.wait(moment)
            killed += moment is None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            progress = folder / "killed.partial" / "progress.json"
            parts = json.loads(progress.read_text())["parts"] if progress.exists() else 0
            print(f"killed after {moment:.1f} s, when {parts} parts were whole")
    same = same and contents(folder / "killed") == contents(folder / "straight")
    print(
        f"prepare of {sum(p.stat().st_size for p in source.iterdir()) / 1e6:.0f} MB, {seconds:.1f} s without a stop; "
        f"finished {finished + 1} times: {'the same bytes' if same else 'OTHER BYTES'}"
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Each file's bytes by its name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def generate(directory: Path, tokens: int) -> Path:
    """Prepared data of the byte tokenizer with documents of about a thousand random tokens."""
    from dsv3_jax.data.byte_tokenizer import ByteTokenizer
    from dsv3_jax.data.shards import FORMAT, ShardWriter
    from dsv3_jax.data.tokenizer import identity
    from dsv3_jax.integrity import seal

    directory.mkdir()
    rng, shards = np.random.default_rng(0), []
    pool = rng.integers(0, 256, 1 << 22).astype(np.uint16)
    while (done := sum(shard["tokens"] for shard in shards)) < tokens:
        writer = ShardWriter(directory / f"training-{len(shards):05d}.array_record", np.dtype("uint16"))
        while writer.tokens < min(2**27, tokens - done):
            for length in (1 + rng.exponential(1000, 4096).astype(int)).tolist():
                at = length * 7919 % (len(pool) - length)
                writer.add(pool[at : at + length])
        shards.append(writer.close())
    index = {
        **{"format": FORMAT, "dtype": "uint16", "chat": False, "training": shards, "validation": []},
        **{"tokenizer": {"identity": identity(ByteTokenizer()), "bytes": True}, "options": {"validation_fraction": 0}},
    }
    (directory / "index.json").write_text(json.dumps(seal(index)))
    return directory


def corpus() -> list[str]:
    """The standard library's texts."""
    (file,) = find_files(["stdlib"], "text")
    return [str(record.data) for record in file.records(0, 0)]


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """A byte-level BPE of 32,768 tokens, made of those texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=32768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer


def resident(process: int) -> int:
    """The resident memory of a process and those that it started, in bytes."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        started = [
            int(child)
            for thread in Path(f"/proc/{process}/task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, started))


def prepare(source: Path, destination: Path, *options: str) -> int:
    """Runs the command. Returns the peak of the resident memory of all of its processes together, in bytes."""
    command = [sys.executable, "-m", "dsv3_jax", "prepare", str(source), str(destination), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"prepare ended with {status}")
    return peak


if __name__ == "__main__":
    main()
