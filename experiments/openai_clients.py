"""The `openai` package against a running server: texts, chats, streams, tools, schemas, cancellation, SIGTERM.

    python -m dsv3_jax serve CHECKPOINT --chat-template FILE --port 8000 & SERVER=$!
    python experiments/openai_clients.py http://127.0.0.1:8000 --stop $SERVER

Needs Python with `openai` alone, in an environment of its own. Prints one line per check, and stops at the first that
fails. With --stop, the server gets SIGTERM under load at the end: what runs must finish whole, what is new get a 503.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import threading
import time
import urllib.request
from typing import Any

import openai

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "take", "description": "Takes some.", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "How many?"}]
TOKENS = 150  # of a text that runs at SIGTERM: seconds on a CPU, within the server's `--grace-seconds`


def running(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return float(re.search(r"^vllm:num_requests_running\{.*\} (.*)$", text, re.M)[1])


def check(client: openai.OpenAI, model: str, url: str) -> None:
    complete = lambda **how: client.completions.create(model=model, **how)
    chat = lambda **how: client.chat.completions.create(model=model, messages=USER, **how)

    whole = complete(prompt="def ", max_tokens=24, temperature=0, logprobs=2)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.token_logprobs) <= 24
    streamed = [
        *complete(prompt="def ", max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True})
    ]
    assert "".join(c.choices[0].text for c in streamed if c.choices) == whole.choices[0].text
    assert streamed[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": streamed[-1].usage.prompt_tokens_details}
    )
    print("completion, and the same streamed:", repr(whole.choices[0].text))

    many = complete(prompt=["def ", "import ", "x"], n=2, max_tokens=8, seed=1, temperature=1)
    assert [c.index for c in many.choices] == list(range(6))
    again = complete(prompt=["def ", "import ", "x"], n=2, max_tokens=8, seed=1, temperature=1)
    assert [c.text for c in again.choices] == [c.text for c in many.choices]
    assert many.choices[0].text != many.choices[1].text
    print("three prompts, two texts of each, repeated by their seed")

    answer = chat(max_completion_tokens=20, temperature=0)
    parts = [*chat(max_completion_tokens=20, temperature=0, stream=True)]
    assert "".join(p.choices[0].delta.content or "" for p in parts) == answer.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"
    print("chat, and the same streamed:", repr(answer.choices[0].message.content))

    for seed in range(3):
        form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
        said = json.loads(chat(response_format=form, max_completion_tokens=200, seed=seed).choices[0].message.content)
        assert set(said) == {"kind", "count"}, said
        assert said["kind"] in "ab", said
        assert 0 <= said["count"] <= 99, said
    print("JSON by its schema:", said)

    called = chat(tools=[TOOL], tool_choice="required", max_completion_tokens=400, seed=2).choices[0]
    (call, *_) = called.message.tool_calls
    assert (called.finish_reason, call.function.name) == ("tool_calls", "take")
    assert set(json.loads(call.function.arguments)) == {"kind", "count"}
    pieces = chat(tools=[TOOL], tool_choice="required", max_completion_tokens=400, seed=2, stream=True)
    deltas = [d for p in pieces for d in p.choices[0].delta.tool_calls or [] if d.index == 0]
    assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments
    print("tool call, and the same streamed:", call.function.arguments)

    stream = complete(prompt="def ", max_tokens=1500, temperature=1, stream=True)
    next(iter(stream))
    assert running(url) == 1
    stream.close()
    until = time.monotonic() + 20
    while running(url) and time.monotonic() < until:
        time.sleep(0.2)
    assert running(url) == 0
    print("a stream that is closed ends its text")

    for error, how in (
        (openai.BadRequestError, {"prompt": "a", "max_tokens": 10**9}),
        (openai.BadRequestError, {"prompt": "a", "temperature": -1}),
        (openai.NotFoundError, {"prompt": "a", "extra_body": {"model": "other"}}),
    ):
        try:
            complete(**how)
            raise AssertionError(how)
        except error as raised:
            print("refused:", raised.body["message"])


def stop(client: openai.OpenAI, model: str, url: str, server: int) -> None:
    """Sends SIGTERM while texts are being generated."""
    results: list[Any] = []
    begun = [threading.Event() for _ in range(24)]

    def use(i: int) -> None:
        stream = client.completions.create(
            model=model, prompt="x" * (i + 1), max_tokens=TOKENS, stream=True, seed=i, temperature=1,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )  # fmt: skip
        pieces = []
        for piece in stream:
            pieces.append(piece)
            begun[i].set()
        results.append(pieces)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    assert all(event.wait(60) for event in begun)
    run = running(url)
    assert run == 24, f"{run:g} of 24 texts run when the server is to get SIGTERM"
    os.kill(server, signal.SIGTERM)
    refused = None
    until = time.monotonic() + 2  # the signal may arrive after the next request
    while refused is None and time.monotonic() < until:
        try:
            client.with_options(max_retries=0).completions.create(model=model, prompt="a", max_tokens=1)
        except openai.InternalServerError as error:
            refused = error
    assert refused is not None, "requests after SIGTERM were taken"
    assert refused.status_code == 503, refused
    print("after SIGTERM, with 24 texts running:", refused.body["message"])
    for thread in threads:
        thread.join()
    assert len(results) == 24
    assert all(r[-1].usage.completion_tokens == TOKENS and r[-2].choices[0].finish_reason == "length" for r in results)
    print("24 texts that ran finished")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(server, 0)
        except ProcessLookupError:
            print("the server has ended")
            return
        time.sleep(0.2)
    raise AssertionError("the server still runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--stop", type=int, metavar="PID", help="process of the server, which gets SIGTERM at the end")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="none", timeout=120)
    (model,) = [m.id for m in client.models.list()]
    check(client, model, args.url)
    if args.stop:
        stop(client, model, args.url, args.stop)


if __name__ == "__main__":
    main()
