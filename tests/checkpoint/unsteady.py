"""A stand-in for an object store that outlives the process and may stop to take anything: `unsteady://PATH`.

Its objects are files, and appear whole, as on object stores. After `allow(n)` n more changes succeed.
"""

import os
import threading

import fsspec
from fsspec.implementations.local import LocalFileSystem

_lock = threading.Lock()
_left: float = float("inf")


def allow(changes: float = float("inf")) -> None:
    global _left
    _left = changes


def _change() -> None:
    global _left
    with _lock:
        if _left < 1:
            raise ConnectionError("the network is down")
        _left -= 1


class Unsteady(LocalFileSystem):
    protocol = "unsteady"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + os.fspath(path).removeprefix("unsteady://").strip("/")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        _change()
        path = self._strip_protocol(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.part", "wb") as file:
            file.write(value)
        os.replace(f"{path}.part", path)

    def put_file(self, lpath, rpath, **kwargs):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def rm(self, path, recursive=False, maxdepth=None):
        """Removes files one by one, as object stores do, in an order that nothing should depend on."""
        path = self._strip_protocol(path)
        for file in sorted(self.find(path), reverse=True):
            _change()
            os.remove(file)


fsspec.register_implementation("unsteady", Unsteady, clobber=True)
