"""Worker processes for one object, started without fork and without importing the caller's `__main__`.

multiprocessing would import the caller's script again, which would start a second training if it isn't guarded.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from dsv3_jax.config import ConfigError

_LENGTH = 8


class Workers:
    """`count` processes that call methods of `target`, pickled once for each; with 0 the calling thread does.

    Exceptions are raised by the returned future.
    """

    def __init__(self, count: int, target: object) -> None:
        self._target, self._processes = target, list[subprocess.Popen[bytes]]()
        self._mine = threading.local()
        self._threads = ThreadPoolExecutor(count, initializer=self._start) if count else None

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """Calls a method in a free process; calls start in order."""
        if self._threads is not None:
            return self._threads.submit(self._ask, method, arguments)
        future: Future[Any] = Future()
        future.set_result(getattr(self._target, method)(*arguments))
        return future

    def close(self) -> None:
        """Terminates the processes."""
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the caller alone
        )
        self._processes.append(process)
        self._mine.process = process
        with contextlib.suppress(OSError):  # if it has ended already, `_ask` says so
            send(process.stdin, self._target)

    def _ask(self, method: str, arguments: tuple[Any, ...]) -> Any:
        process = self._mine.process
        try:
            send(process.stdin, (method, arguments))
            result, error = receive(process.stdout)
        except (EOFError, OSError):
            raise ConfigError(
                f"a worker process ended early (exit status {process.wait()}): there may have been too little memory"
            ) from None
        if error is not None:
            raise error
        return result


def send(pipe: IO[bytes] | None, value: Any) -> None:
    """Writes a pickle, preceded by its length."""
    assert pipe is not None
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    pipe.write(len(data).to_bytes(_LENGTH, "little"))
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes] | None) -> Any:
    """Reads what `send` wrote. Raises EOFError if the other side has closed."""
    assert pipe is not None
    head = pipe.read(_LENGTH)
    size = int.from_bytes(head, "little")
    data = pipe.read(size)
    if len(head) < _LENGTH or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def _serve() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write between answers
    try:
        target = receive(requests)
        while True:
            method, arguments = receive(requests)
            try:
                answer: tuple[Any, Exception | None] = (getattr(target, method)(*arguments), None)
            except Exception as error:
                answer = (None, error)
            send(answers, answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


if __name__ == "__main__":
    _serve()
