"""`experiments.load_server` reports what it is there to find."""

import asyncio
import functools
import itertools
import types

import httpx2

from experiments import load_server
from tests.serving.scripted import ScriptedEngine
from tests.serving.test_server import Served


def test_what_is_left_at_the_end_is_reported(monkeypatch):
    """Texts that run, pages that are held, programs that were compiled; malformed requests all get a 4xx."""
    stats, programs = ScriptedEngine.stats, itertools.count(0, 5)
    grown = lambda self: types.SimpleNamespace(**vars(stats(self)) | {"programs": next(programs)})
    monkeypatch.setattr(ScriptedEngine, "stats", grown)
    monkeypatch.setattr(ScriptedEngine, "max_length", 2048)
    served = Served()
    transport = httpx2.ASGITransport(app=served.server.app)
    monkeypatch.setattr(httpx2, "AsyncClient", functools.partial(httpx2.AsyncClient, transport=transport))
    result = asyncio.run(load_server.load("http://127.0.0.1:8000", clients=3, seconds=0.2, chat=True, key=None))
    assert result["malformed"] == len(load_server.BAD) == 32
    assert result["answers"]["200"] > 0
    assert result["problems"] == [
        "num_requests_running is 1 at the end",
        "num_requests_waiting is 2 at the end",
        "kv_cache_usage_perc is 0.25 at the end",
        "5 programs were compiled",
    ]
