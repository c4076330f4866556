"""Runs at URLs: what is there at each moment can be gone on with, and two processes don't train there at once."""

import contextlib
import json
import shutil
import threading
import time

import pytest
from rich.console import Console

from dsv3_jax.checkpoint.remote import OWNER, Remote, cached, complete_steps_of
from dsv3_jax.config import ConfigError
from dsv3_jax.training import mirror
from dsv3_jax.training.directory import has_begun
from dsv3_jax.training.mirror import Mirror, working_copy
from tests.checkpoint import unsteady


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Seconds become milliseconds, and this machine has an empty cache."""
    for name, seconds in (("COPY", 0.05), ("BEAT", 0.05), ("WAIT", 0.5), ("_POLL", 0.01)):
        monkeypatch.setattr(mirror, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(mirror, "_LAST_TRIES", 1)
    unsteady.allow()
    machine(tmp_path, monkeypatch, "first")


@pytest.fixture
def url(tmp_path):
    return f"unsteady:/{tmp_path}/bucket/run"


def machine(tmp_path, monkeypatch, name):
    """From here on this is another machine, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


def save(here, step, content="as computed"):
    """Makes a step like training: metrics, then a checkpoint that appears whole, while the one two before goes."""
    (here / "config.json").write_text("the config")
    folder, unfinished = here / "checkpoints", here / f"checkpoints/{step}.tmp"
    shutil.rmtree(folder / str(step), ignore_errors=True)  # of before a rollback
    if step:
        with (here / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": step}) + "\n")
    for name in ("state/d/a", "state/d/b", "run/metadata"):
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_text('{"good": true}' if name == "run/metadata" else f"{name} of {step} {content}")
    (unfinished / "hashes.json").write_text(json.dumps({"files": {"state/d/a": content, "state/d/b": step}}))
    unfinished.rename(folder / str(step))
    shutil.rmtree(folder / str(step - 2), ignore_errors=True)


def state(directory):
    """The files of a run by name, with their content, without what differs between machines."""
    return {
        str(p.relative_to(directory)): p.read_text()
        for p in directory.rglob("*")
        if p.is_file() and p.name not in ("lock", OWNER)
    }


def check_whole(here):
    """Fails unless the directory is of no run yet, or one can go on from its newest checkpoint with nothing missing."""
    steps = complete_steps_of(state(here))
    if not has_begun(here):
        assert steps == []
        return None
    assert steps, "metrics without a checkpoint to go on from"
    for step in steps:
        files = json.loads((here / f"checkpoints/{step}/hashes.json").read_text())["files"]
        for name in ("state/d/a", "state/d/b"):
            assert (here / f"checkpoints/{step}/{name}").read_text() == f"{name} of {step} {files['state/d/a']}"
    lines = (here / "metrics.jsonl").read_text().splitlines() if (here / "metrics.jsonl").exists() else []
    assert [json.loads(line)["step"] for line in lines][: steps[-1]] == list(range(1, steps[-1] + 1))
    return steps[-1]


@contextlib.contextmanager
def by_hand(url, said=None):
    """A mirror whose threads don't run, so that a test decides when it copies."""
    there, here = Remote(url), cached("runs", url)
    here.mkdir(parents=True, exist_ok=True)
    copying = Mirror(there, here, (said if said is not None else []).append)
    copying._threads = []
    copying.open()
    yield copying


def test_a_local_directory_is_itself(tmp_path):
    with working_copy(tmp_path / "run") as here:
        assert here == tmp_path / "run"
        assert not here.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_at_another_machine(url, tmp_path, monkeypatch):
    with working_copy(url) as here:
        for step in range(4):
            save(here, step)
        (here / ".metrics.jsonl").write_text("unfinished")
        (here / "tensorboard").mkdir()
        (here / "tensorboard/events").write_text("events")
        expected = state(here)
    del expected[".metrics.jsonl"]
    assert state(tmp_path / "bucket/run") == expected
    machine(tmp_path, monkeypatch, "second")
    with working_copy(url) as other:
        assert other != here
        assert state(other) == expected
        assert check_whole(other) == 3
        save(other, 4)
    assert complete_steps_of(Remote(url).list()) == [3, 4]


def test_a_checkpoint_is_there_soon_after_it_is_complete(url, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "COPY_SECONDS", 1000.0)
    with working_copy(url) as here:
        save(here, 0)
        wait_for(lambda: complete_steps_of(Remote(url).list()) == [0])
        (here / "metrics.jsonl").write_text("not due")
        time.sleep(0.1)
        assert Remote(url).read("metrics.jsonl") is None
    assert Remote(url).read("metrics.jsonl") == b"not due"


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_any_moment(url, tmp_path, monkeypatch):
    """After each number of changes at the URL nothing more arrives there, as when the machine is lost."""
    reached = []
    for changes in range(1, 200):
        shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
        machine(tmp_path, monkeypatch, f"lost {changes}")
        unsteady.allow(changes)
        done, sure = False, None
        with contextlib.suppress(OSError), by_hand(url) as copying:
            for step, content in ((0, "x"), (1, "x"), (2, "x"), (3, "x"), (3, "after a rollback"), (4, "x")):
                if content != "x":
                    shutil.rmtree(copying.here / "checkpoints/3")
                    (copying.here / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
                    copying.copy()
                    assert complete_steps_of(copying.remote.list()) == [2]
                save(copying.here, step, content)
                copying.copy()
                sure = step
            copying._sign(ended=True)
            done = True
        unsteady.allow()
        machine(tmp_path, monkeypatch, f"next {changes}")
        monkeypatch.setattr(mirror, "WAIT_SECONDS", 0.0)
        with by_hand(url) as copying:
            newest = check_whole(copying.here)
            if newest is not None:
                before = [json.dumps({"step": step}) + "\n" for step in range(1, newest + 1)]
                (copying.here / "metrics.jsonl").write_text("".join(before))  # as `MetricsLog` does
            assert sure is None or newest is not None, "a checkpoint that had arrived is lost"
            reached.append(newest)
            for step in range(0 if newest is None else newest + 1, 6):
                save(copying.here, step)
            copying.copy()
            assert check_whole(tmp_path / "bucket/run") == 5
        if done:
            break
    assert done
    assert set(reached) == {None, 0, 1, 2, 3, 4}


def test_a_network_that_fails_for_a_while(url, capsys):
    said = Console(width=1000)
    with working_copy(url, said) as here:
        save(here, 0)
        wait_for(lambda: complete_steps_of(Remote(url).list()) == [0])
        unsteady.allow(0)
        save(here, 1)
        time.sleep(0.3)
        unsteady.allow()
        wait_for(lambda: complete_steps_of(Remote(url).list()) == [0, 1])
    lines = capsys.readouterr().out.splitlines()
    assert sum("the network is down; the run goes on in" in line for line in lines) == 1
    assert sum("can be written again" in line for line in lines) == 1


def lose_the_network(url, error=None):
    """Saves steps 0 and 1, of which 1 doesn't arrive."""
    with working_copy(url) as here:
        save(here, 0)
        wait_for(lambda: 0 in complete_steps_of(Remote(url).list()))
        unsteady.allow(0)
        save(here, 1)
        if error is not None:
            raise error


def test_what_couldnt_be_copied_is_kept_and_copied_later(url, tmp_path, capsys):
    with pytest.raises(OSError, match=r"the network is down; everything is in .*/run: the same command on this"):
        lose_the_network(url)
    unsteady.allow()
    assert complete_steps_of(Remote(url).list()) == [0]
    with working_copy(url) as here:  # at once: it is this machine's
        assert check_whole(here) == 1
    assert complete_steps_of(Remote(url).list()) == [0, 1]
    with pytest.raises(ZeroDivisionError):
        lose_the_network(url, ZeroDivisionError)
    assert "everything is in" in " ".join(capsys.readouterr().out.split())


def test_what_another_machine_has_gone_past_is_set_aside(url, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="the network is down"):
        lose_the_network(url)
    here = cached("runs", url)
    unsteady.allow()
    machine(tmp_path, monkeypatch, "second")
    with working_copy(url) as other:
        assert check_whole(other) == 0
    machine(tmp_path, monkeypatch, "first")
    with working_copy(url) as again:
        assert again == here
        assert check_whole(again) == 0
    (aside,) = (p for p in here.parent.iterdir() if p.name.startswith("run-"))
    assert check_whole(aside) == 1


def test_two_processes_of_one_machine(url):
    with working_copy(url), pytest.raises(ConfigError, match="is held by another process"), working_copy(url):
        pass


def test_two_machines(url, tmp_path, monkeypatch, capsys):
    with working_copy(url) as here:
        save(here, 0)
        machine(tmp_path, monkeypatch, "second")
        held = pytest.raises(ConfigError, match=r"^unsteady://.*/run is held by process \d+ on .*, which trains there")
        with held, working_copy(url):
            pass
    began = time.monotonic()
    with working_copy(url):
        assert time.monotonic() < began + 0.4, "one that has ended isn't waited for"
    assert "waiting" in capsys.readouterr().out


def test_a_run_that_was_taken_over_copies_nothing_more(url, capsys):
    def lose_it():
        with working_copy(url) as here:
            save(here, 0)
            wait_for(lambda: complete_steps_of(Remote(url).list()) == [0])
            Remote(url).write(OWNER, json.dumps({"session": "another", "process": 1, "host": "other"}).encode())
            wait_for(lambda: "taken over" in capsys.readouterr().out)
            save(here, 1)

    with pytest.raises(OSError, match="was taken over by process 1 on other: what this process did since is in"):
        lose_it()
    assert complete_steps_of(Remote(url).list()) == [0]
    assert check_whole(cached("runs", url)) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"time": 0}'])
def test_a_damaged_sign_of_life_is_of_nobody(url, content):
    Remote(url).write(OWNER, content)
    began = time.monotonic()
    with working_copy(url) as here:
        save(here, 0)
    assert time.monotonic() < began + 0.4
    assert json.loads(Remote(url).read(OWNER))["ended"]


def test_a_checkpoint_that_is_deleted_while_it_is_copied(url, tmp_path, monkeypatch):
    put, begun = Remote.put, threading.Event()

    def slow(self, file, name):
        if not begun.is_set() and "/0/" in name:
            begun.set()
            shutil.rmtree(here / "checkpoints/0")
        put(self, file, name)

    monkeypatch.setattr(Remote, "put", slow)
    with by_hand(url) as copying:
        here = copying.here
        save(here, 0)
        copying.copy()
        assert begun.is_set()
        assert check_whole(tmp_path / "bucket/run") == 0


def test_checkpoints_that_training_keeps_stay(url, tmp_path, monkeypatch):
    """Those that another machine saved are removed when training removes them, and others not."""
    with working_copy(url) as here:
        for step in (0, 10, 20, 30):
            save(here, step)
    machine(tmp_path, monkeypatch, "second")
    with working_copy(url) as here:
        folder = here / "checkpoints"
        assert sorted(int(p.name) for p in folder.iterdir()) == [20, 30]  # it goes on from the newest
        save(here, 40)
        shutil.rmtree(folder / "20")
    assert complete_steps_of(Remote(url).list()) == [0, 10, 30, 40]
