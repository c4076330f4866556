"""Many clients of a running server at once, with random disconnects, and requests that are no requests.

    python -m dsv3_jax serve CHECKPOINT --port 8000 &
    python -m experiments.load_server http://127.0.0.1:8000 --clients 200 --seconds 60

Each client sends one request after another: completions and chats, streamed or whole, greedy or sampled, of many
lengths; three in ten go away on the way. Allowed answers are 200, and 429 above the server's limit. Then requests that
are malformed, each of which must get a 4xx with a message. At the end nothing may run and no page be held, and the
server must have compiled no program since the start. Exits with 1 if anything else was seen; prints one JSON object.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import tyro

BAD: list[tuple[str, str | bytes]] = [
    ("/v1/completions", b""),
    ("/v1/completions", b"{"),
    ("/v1/completions", b"\xff\xfe{}"),
    ("/v1/completions", b'{"prompt": "a"} {}'),
    ("/v1/completions", "[" * 200_000),
    ("/v1/completions", '{"prompt": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001),
    ("/v1/completions", json.dumps({"prompt": "a" * 2_000_000})),
    ("/v1/completions", json.dumps({"prompt": [1] * 500_000})),
    ("/v1/completions", json.dumps({"prompt": []})),
    ("/v1/completions", json.dumps({"prompt": [[]]})),
    ("/v1/completions", json.dumps({"prompt": [-1]})),
    ("/v1/completions", json.dumps({"prompt": [10**30]})),
    ("/v1/completions", json.dumps({"prompt": [1, "a"]})),
    ("/v1/completions", json.dumps({"prompt": {"a": 1}})),
    ("/v1/completions", '{"prompt": "a", "temperature": NaN}'),
    ("/v1/completions", '{"prompt": "a", "temperature": Infinity}'),
    ("/v1/completions", '{"prompt": "a", "temperature": 1e999}'),
    ("/v1/completions", json.dumps({"prompt": "a", "temperature": -1})),
    ("/v1/completions", json.dumps({"prompt": "a", "temperature": "hot"})),
    ("/v1/completions", json.dumps({"prompt": "a", "top_p": 2})),
    ("/v1/completions", json.dumps({"prompt": "a", "max_tokens": -1})),
    ("/v1/completions", json.dumps({"prompt": "a", "max_tokens": 10**12})),
    ("/v1/completions", json.dumps({"prompt": "a", "n": 10**9})),
    ("/v1/completions", json.dumps({"prompt": "a", "logprobs": 10**6})),
    ("/v1/completions", json.dumps({"prompt": "a", "logit_bias": {"x": 1}})),
    ("/v1/completions", json.dumps({"prompt": "a", "stop": [""]})),
    ("/v1/completions", json.dumps({"prompt": "a", "stop_token_ids": [10**9]})),
    ("/v1/chat/completions", json.dumps({"messages": []})),
    ("/v1/chat/completions", json.dumps({"messages": "hello"})),
    ("/v1/chat/completions", json.dumps({"messages": [{"role": 1, "content": None}]})),
    ("/tokenize", json.dumps({})),
    ("/detokenize", json.dumps({"tokens": [10**9]})),
]


async def metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    names = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[:1] not in "#"}
    return {name.removeprefix("vllm:"): value for name, value in names.items()}


def some_request(rng: random.Random, chat: bool) -> tuple[str, dict[str, Any]]:
    words = " ".join(
        rng.choice(["def", "return", "import", "the", "of", "x = 1", "\n"]) for _ in range(rng.randint(1, 60))
    )
    body: dict[str, Any] = {"max_tokens": rng.choice([1, 8, 32, 64]), "stream": rng.random() < 0.7}
    body |= rng.choice(
        [{"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"temperature": 0.7, "seed": 3}, {"n": 2}]
    )
    if chat and rng.random() < 0.3:
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}
    return "/v1/completions", body | {"prompt": words}


async def use(
    client: httpx2.AsyncClient,
    rng: random.Random,
    until: float,
    chat: bool,
    seen: collections.Counter,
    times: list[float],
) -> None:
    """One client: requests until it is time to go."""
    while time.monotonic() < until:
        path, body = some_request(rng, chat)
        leaves = rng.random() < 0.3
        begin = time.monotonic()
        try:
            async with asyncio.timeout(rng.uniform(0, 2) if leaves else 300):
                async with client.stream("POST", path, json=body) as answer:
                    pieces = [piece async for piece in answer.aiter_bytes()]
            seen[str(answer.status_code)] += 1
            if answer.status_code == 200:
                times.append(time.monotonic() - begin)
                if b'"error"' in b"".join(pieces):
                    seen["error in a stream"] += 1
            elif answer.status_code == 429:
                await asyncio.sleep(rng.uniform(0.1, 1))
        except TimeoutError:
            seen["left" if leaves else "no answer in 300 s"] += 1
        except httpx2.HTTPError as error:
            seen[f"broken: {type(error).__name__}"] += 1


async def refuse(client: httpx2.AsyncClient) -> list[str]:
    """Those of the malformed requests that didn't get a 4xx with a message."""
    wrong = []
    for path, content in BAD:
        answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
        said = answer.json().get("error", {}).get("message") if 400 <= answer.status_code < 500 else None
        if not said:
            wrong.append(f"{path} {content[:60]!r}: {answer.status_code} {answer.text[:100]}")
    return wrong


async def load(url: str, clients: int, seconds: float, chat: bool, key: str | None) -> dict[str, Any]:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    seen, times = collections.Counter[str](), list[float]()
    async with httpx2.AsyncClient(base_url=url, timeout=300, limits=limits, headers=headers) as client:
        before, began = await metrics(client), time.monotonic()
        until = began + seconds
        await asyncio.gather(*(use(client, random.Random(i), until, chat, seen, times) for i in range(clients)))
        took = time.monotonic() - began
        wrong = await refuse(client)
        await asyncio.sleep(2)
        after = await metrics(client)
    change = lambda name: after[name] - before[name]
    problems = [f"{count} x {kind}" for kind, count in seen.items() if kind not in ("200", "429", "left")] + wrong
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if after[name]:
            problems.append(f"{name} is {after[name]:g} at the end")
    if programs := change("dsv3_jax:programs"):
        problems.append(f"{programs:g} programs were compiled")
    return {
        "clients": clients, "seconds": took, "answers": dict(seen), "malformed": len(BAD),
        "median_seconds": statistics.median(times) if times else None, "longest_seconds": max(times, default=None),
        "tokens_per_second": change("generation_tokens_total") / took, "preemptions": change("num_preemptions_total"),
        "problems": problems,
    }  # fmt: skip


def main(
    url: tyro.conf.Positional[str], clients: int = 200, seconds: float = 60, chat: bool = False, key: str | None = None,
    out: Path | None = None,
) -> None:  # fmt: skip
    """Loads a server.

    Args:
      url: of the server.
      clients: how many at once.
      seconds: how long they begin new requests.
      chat: whether the model has a chat template.
      key: the server's API key.
      out: file for the result.
    """
    result = asyncio.run(load(url, clients, seconds, chat, key))
    print(text := json.dumps(result, indent=1))
    if out:
        out.write_text(text + "\n")
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
