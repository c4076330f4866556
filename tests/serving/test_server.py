"""The server's endpoints on an engine that writes what it is told to."""

import asyncio
import concurrent.futures
import json
import re

import pytest
from starlette.testclient import TestClient

from dsv3_jax.data import load_tokenizer
from dsv3_jax.inference.generation_config import GenerationConfig
from dsv3_jax.serving.chat import ChatTemplate
from dsv3_jax.serving.completions import Completion
from dsv3_jax.serving.protocol import CompletionRequest
from dsv3_jax.serving.server import Address, Server, bind
from dsv3_jax.serving.service import Limits, Service
from dsv3_jax.serving.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from tests.serving.scripted import ScriptedEngine

TEMPLATE = """{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% if thinking %}<think>{% endif %}{% endif %}"""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


class Served:
    """A server over a scripted engine, and a client of it."""

    def __init__(self, text="Hello wörld", *, template=TEMPLATE, limits=Limits(), address=Address(), **how):
        self.tokenizer = load_tokenizer("bytes")
        script = text if callable(text) else lambda prompt: [*text.encode(), 257]
        self.engine = ScriptedEngine(self.tokenizer, script, 257, **how)
        made = template and ChatTemplate(template, {"bos_token": "<bos>"}, "it")
        self.service = Service(
            self.engine,
            self.tokenizer,
            end_ids=[257],
            template=made,
            defaults=GenerationConfig(temperature=0.5, top_k=7),
            model_name="tiny",
            limits=limits,
        )
        self.server = Server(self.service, address)
        self.client = TestClient(self.server.app, raise_server_exceptions=False)

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def complete(self, **body):
        answer = self.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, content="Hi", **body):
        answer = self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chunks(self, path, **body):
        answer = self.post(path, stream=True, **body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture
def served():
    return Served()


def test_a_completion(served):
    answer = served.complete(prompt="ab", max_tokens=50)
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "Hello wörld", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 13,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    (request,) = served.engine.requests
    assert request.prompt == [256, 97, 98]
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 7)
    assert served.service.running == set()
    assert served.complete(prompt="ab")["choices"][0]["finish_reason"] == "stop"
    assert served.complete(prompt="ab", max_tokens=7)["choices"][0]["text"] == "Hello w"
    assert served.complete(prompt="ab", max_tokens=8)["choices"][0]["text"] == "Hello w\ufffd"


@pytest.mark.parametrize(
    ("stop", "more", "text", "reason"),
    [
        ("wör", {}, "Hello ", "wör"),
        (["xyz", "l"], {}, "He", "l"),
        (["o w", "lo"], {"include_stop_str_in_output": True}, "Hello", "lo"),
        (["rldx"], {}, "Hello wörld", None),
        (None, {"stop_token_ids": [ord("o")]}, "Hell", ord("o")),
    ],
)
def test_stops(served, stop, more, text, reason):
    body = {"prompt": "a", "stop": stop, "max_tokens": 50, **more}
    (choice,) = served.complete(**body)["choices"]
    assert (choice["text"], choice["stop_reason"], choice["finish_reason"]) == (text, reason, "stop")
    parts = [chunk["choices"][0]["text"] for chunk in served.chunks("/v1/completions", **body)]
    assert "".join(parts) == text


def test_prompts_of_every_form_and_n(served):
    for prompt, texts in (
        (["a", "bc"], [[256, 97], [256, 98, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ):
        served.engine.requests.clear()
        answer = served.complete(prompt=prompt, n=2, seed=5, max_tokens=3)
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(texts)))
        assert [r.prompt for r in served.engine.requests] == [text for text in texts for _ in range(2)]
        assert [r.sampling.seed for r in served.engine.requests] == [5, 6] * len(texts)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
        chunks = served.chunks("/v1/completions", prompt=prompt, n=2, max_tokens=3)
        for i in range(2 * len(texts)):
            assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) == "Hel"


def test_without_max_tokens_a_completion_has_16_or_what_fits():
    served = Served("x" * 50)  # 200 tokens at most
    for prompt, expected in (("a", 16), ("a" * 189, 10), (["a", "a" * 198], 17)):
        answer = served.complete(prompt=prompt)
        assert answer["usage"]["completion_tokens"] == expected
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    answer = served.post("/v1/completions", prompt="a" * 189, max_tokens=16)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_scores_of_prompts_as_evaluation_harnesses_ask_for_them(served):
    (choice,) = served.complete(prompt=[97, 0xE4, 98], echo=True, logprobs=1, max_tokens=1)["choices"]
    assert choice["text"] == "a\ufffdbH"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["a", "bytes:\\xe4", "b", "H"]
    assert scores["token_logprobs"] == [None, -1.0, -2.0, -0.5]
    assert scores["top_logprobs"] == [None, {"bytes:\\xe4": -1.0}, {"b": -2.0}, {"H": -0.5}]
    assert scores["text_offset"] == [0, 1, 1, 3]
    none = served.complete(prompt="ab", echo=True, logprobs=0, max_tokens=0)
    assert none["choices"][0]["text"] == "ab"
    assert none["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert none["choices"][0]["logprobs"]["top_logprobs"] == [None, {"a": -1.0}, {"b": -2.0}]
    sampled = served.complete(prompt="a", logprobs=0, max_tokens=2)
    assert sampled["choices"][0]["logprobs"]["top_logprobs"] == [{"H": -0.5}, {"e": -0.5}]
    assert none["usage"]["completion_tokens"] == 0
    streamed = served.chunks("/v1/completions", prompt="ab", echo=True, logprobs=0, max_tokens=2)
    assert [c["choices"][0]["text"] for c in streamed] == ["abH", "e"]
    assert [len(c["choices"][0]["logprobs"]["tokens"]) for c in streamed] == [4, 1]
    held_back = served.chunks("/v1/completions", prompt="ab", echo=True, logprobs=0, max_tokens=4, stop=["Helm"])
    assert [c["choices"][0]["text"] for c in held_back] == ["ab", "", "", "Hell"]
    assert [i for c in held_back for i in c["choices"][0]["logprobs"]["text_offset"]] == [0, 0, 1, 2, 3, 4, 5]


def test_of_no_tokens_none_is_counted_nor_ends_the_text():
    served = Served("")  # an end token at once
    (choice,) = served.complete(prompt="ab", max_tokens=0)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert 'vllm:generation_tokens_total{engine="0",model_name="tiny"} 0.0' in served.client.get("/metrics").text


def test_a_chat():
    served = Served("<think>hm</think>Yes.")
    answer = served.chat()
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
    assert served.tokenizer.decode(served.engine.requests[0].prompt) == "<user>Hi\n<assistant>"
    assert served.engine.requests[0].prompt[:2] == [256, ord("<")]  # one bos, the template's
    assert served.engine.requests[0].max_new_tokens == 200 - answer["usage"]["prompt_tokens"]
    chunks = served.chunks(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        stream_options={"include_usage": True},
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:-1]] == ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == answer["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    opened = Served("hm</think>Yes.").chat(chat_template_kwargs={"thinking": True})
    assert opened["choices"][0]["message"]["reasoning"] == "hm"
    scored = Served("Yé").chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in scored] == [[89], [0xC3], [0xA9]]
    assert [top["token"] for top in scored[0]["top_logprobs"]] == ["Y", "\0"]


CALL = f'{CALLS_BEGIN}{CALL_BEGIN}weather{SEPARATOR}{{"city": "Rom"}}{CALL_END}{CALLS_END}'


def test_tool_calls():
    served = Served(f"Well.{CALL}")
    served.engine.max_length = 2000
    (choice,) = served.chat(tools=[TOOL], max_completion_tokens=150)["choices"]
    assert choice["finish_reason"] == "length"  # of bytes; the prompt with the tools is long
    (choice,) = served.chat(tools=[TOOL])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rom"}'}
    assert b"### weather" in bytes(i for i in served.engine.requests[0].prompt if i < 256)
    chunks = served.chunks("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], tools=[TOOL])
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert re.fullmatch("call_.*", calls[0]["id"])
    assert "".join(c["function"]["arguments"] for c in calls) == '{"city": "Rom"}'
    (choice,) = served.chat(tools=[TOOL], tool_choice="none")["choices"]
    assert choice["message"]["content"] == f"Well.{CALL}"


@pytest.mark.parametrize("parallel", [True, False])
def test_of_several_tool_calls_the_first_alone_if_parallel_ones_arent_wanted(parallel):
    one = CALL.removeprefix(CALLS_BEGIN).removesuffix(CALLS_END)
    served = Served(f"{CALLS_BEGIN}{one}{one}{CALLS_END}")
    served.engine.max_length = 2000
    (choice,) = served.chat(tools=[TOOL], parallel_tool_calls=parallel)["choices"]
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["weather"] * (2 if parallel else 1)
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_tool_calls_follow_the_schema(choice):
    served = Served()
    served.engine.max_length = 3000
    (answer,) = served.chat(tools=[TOOL], tool_choice=choice, seed=3, parallel_tool_calls=False)["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert len(json.loads(call["function"]["arguments"])["city"]) <= 3
    assert answer["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("seed", range(3))
def test_structured_output(served, seed):
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    served.engine.max_length = 3000
    (choice,) = served.chat(response_format=form, seed=seed)["choices"]
    assert list(json.loads(choice["message"]["content"])) == ["city"]
    (choice,) = served.complete(prompt="a", structured_outputs={"regex": "[xy]{2}-\\d"}, seed=seed)["choices"]
    assert re.fullmatch(r"[xy]{2}-\d", choice["text"])
    (choice,) = served.complete(prompt="a", guided_choice=["yes", "no"], seed=seed)["choices"]
    assert choice["text"] in ("yes", "no")


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("completions", {}, "prompt is missing"),
        ("completions", {"prompt": ""}, None),
        ("completions", {"prompt": []}, "prompt is empty"),
        ("completions", {"prompt": [[]]}, "a prompt is empty"),
        ("completions", {"prompt": {"a": 1}}, "prompt is {'a': 1}: it must be a string or a list"),
        ("completions", {"prompt": [999]}, "the vocabulary is 0 to 271"),
        ("completions", {"prompt": [-1]}, "the vocabulary is 0 to 271"),
        ("completions", {"prompt": "a" * 500}, "a prompt has 501 tokens"),
        ("completions", {"prompt": "a" * 10**6}, "the prompt has 1000000 characters"),
        ("completions", {"prompt": "a", "max_tokens": 500}, "at most 198 can follow"),
        ("completions", {"prompt": "a", "max_tokens": -1}, "max_tokens is -1: it must be at least 0"),
        ("completions", {"prompt": "a", "temperature": -1}, "temperature is -1: it must be from 0 to 100"),
        ("completions", {"prompt": "a", "temperature": "1"}, "temperature is '1': it must be a finite number"),
        ("completions", {"prompt": "a", "top_p": 1.5}, "top_p is 1.5"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs is 21: it must be from 0 to 20"),
        ("completions", {"prompt": "a", "n": 0}, "n is 0"),
        ("completions", {"prompt": "a", "n": 10**9}, "1000000000 texts are asked for at once"),
        ("completions", {"prompt": "a", "stop": [""]}, "stop must be"),
        ("completions", {"prompt": "a", "stop_token_ids": [272]}, "stop_token_ids has 272"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has 'x'"),
        ("completions", {"prompt": "a", "logit_bias": {"3": 101}}, "logit_bias has '3'"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix isn't supported"),
        ("completions", {"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs isn't supported: use echo"),
        ("completions", {"prompt": "a", "best_of": 3}, "best_of isn't supported"),
        ("completions", {"prompt": "a", "guided_regex": "["}, "the regex of the output can't be followed"),
        ("completions", {"prompt": "a", "stream_options": {"include_usage": 3}}, "stream_options.include_usage is 3"),
        ("chat/completions", {"messages": []}, "messages is empty"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ("chat/completions", {"messages": [{"role": "critic", "content": ""}]}, "messages[0].role is 'critic'"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ("chat/completions", {"messages": [USER], "top_logprobs": 2}, "top_logprobs needs logprobs"),
        ("chat/completions", {"messages": [USER], "tool_choice": "required"}, "there are no tools"),
        ("chat/completions", {"messages": [USER], "tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        ("chat/completions", {"messages": [USER], "response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ("chat/completions", {"messages": [USER], "functions": [{}]}, "functions isn't supported"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_impossible_requests_get_400_and_a_line(served, path, body, said):
    answer = served.post(f"/v1/{path}", **body)
    if said is None:
        assert answer.status_code == 200  # bos alone
        return
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert said in message
    assert "\n" not in message
    assert len(message) < 1500
    assert served.service.running == set()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "isn't valid JSON"),
        (b"[]", "it must hold a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b"\xff", "isn't valid JSON"),
    ],
)
def test_malformed_bodies_get_400(served, body, said):
    answer = served.client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_names_paths_and_sizes():
    served = Served(limits=Limits(max_body_bytes=1000))
    for path, body, status in (
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404),
        ("/v1/completions", {"prompt": "a", "model": "tiny"}, 200),
        ("/v1/completions", {"prompt": "a" * 1000}, 413),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {}, 405),
    ):
        answer = served.post(path, **body)
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["code"] == status
    chunked = served.client.post("/v1/completions", content=iter([b'{"prompt": "', b"a" * 1000, b'"}']))
    assert chunked.status_code == 413


def test_who_may_ask():
    served = Served(address=Address(api_key="secret"))
    assert served.client.get("/health").status_code == 200
    for key, status in ((None, 401), ("wrong", 401), ("secret", 200)):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        assert served.client.get("/v1/models", headers=headers).status_code == status
    served = Served(address=Address(api_key="clé"))
    assert served.client.get("/v1/models", headers={"Authorization": "bearer clé".encode()}).status_code == 200
    served = Served(address=Address(api_key=""))
    assert served.client.get("/v1/models", headers={"Authorization": "Bearer any"}).status_code == 200
    open_ = Served()
    for headers, status in (
        ({"Origin": "http://testserver"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ):
        answer = open_.client.get("/v1/models", headers=headers)
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
    assert Served(address=Address("0.0.0.0")).client.get("/health", headers={"Host": "x.example"}).status_code == 200


@pytest.mark.parametrize("address", [Address(port=65536), Address(port=-1), Address("203.0.113.1")], ids=str)
def test_an_impossible_address_is_named(address):
    with pytest.raises(OSError, match=f"{address.host}:{address.port} can't be listened on: ."):
        bind(address)


def test_limits_and_draining(served):
    full = Served(limits=Limits(max_requests=3))
    assert full.post("/v1/completions", prompt="a", n=4).status_code == 429
    assert full.post("/v1/completions", prompt="a", n=4).headers["retry-after"] == "1"
    assert full.post("/v1/completions", prompt="a", n=3).status_code == 200
    served.server.draining = True
    assert served.post("/v1/completions", prompt="a").status_code == 503
    assert served.client.get("/health").status_code == 503
    assert served.client.get("/v1/models").status_code == 200


def test_over_the_limit_clients_get_429_and_the_others_finish():
    served = Served(pause=0.1, limits=Limits(max_requests=5))

    with served.client as client, concurrent.futures.ThreadPoolExecutor(20) as threads:  # one event loop for all
        post = lambda _: client.post("/v1/completions", json={"prompt": "a"})
        answers = list(threads.map(post, range(20)))
    assert [a.status_code for a in answers].count(200) == 5
    refused = [a for a in answers if a.status_code != 200]
    assert {(a.status_code, a.headers["retry-after"]) for a in refused} == {(429, "1")}
    assert "5 texts are being generated or wait" in refused[0].json()["error"]["message"]
    assert all(a.json()["choices"][0]["text"] == "Hello wörld" for a in answers if a.status_code == 200)
    assert served.service.running == set()
    assert served.post("/v1/completions", prompt="a").status_code == 200


def test_an_error_of_the_engine_is_that_requests_alone():
    served = Served(lambda prompt: [97, ValueError("the logits are not finite")] if 120 in prompt else [98, 257])
    answer = served.post("/v1/completions", prompt="x")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the logits are not finite"
    assert served.complete(prompt="y")["choices"][0]["text"] == "b"
    first, last = served.chunks("/v1/completions", prompt="x")
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["message"] == "the logits are not finite"
    assert served.service.running == set()


def test_a_client_that_goes_away_ends_its_text_and_is_no_defect():
    served = Served(pause=60)
    messages = [{"type": "http.request", "body": b'{"prompt": "ab"}'}, {"type": "http.disconnect"}]
    sent, headers = [], [(b"host", b"testserver")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(served.server.app(scope, receive, send))  # raises nothing, which a log would show
    assert sent[0]["status"] == 499
    assert len(served.engine.cancelled) == 1
    assert served.service.running == set()


def test_a_client_that_goes_away_before_the_stream_begins_ends_its_text():
    """As if the connection were still full of an earlier answer: sending waits, and is cancelled there."""
    served = Served(pause=60)
    messages = [{"type": "http.request", "body": b'{"prompt": "ab", "stream": true}'}, {"type": "http.disconnect"}]
    headers = [(b"host", b"testserver")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}

    async def receive():
        return messages.pop(0)

    async def send(message):
        await asyncio.sleep(60)

    asyncio.run(served.server.app(scope, receive, send))
    assert len(served.engine.cancelled) == 1
    assert served.service.running == set()


def test_tokenizing(served):
    answer = served.post("/tokenize", prompt="<eos>é", return_token_strs=True).json()
    assert answer["tokens"] == [256, 257, 0xC3, 0xA9]
    assert answer["token_strs"] == ["<bos>", "<eos>", "bytes:\\xc3", "bytes:\\xa9"]
    assert served.post("/tokenize", prompt="ab", add_special_tokens=False).json()["tokens"] == [97, 98]
    chat = served.post("/tokenize", messages=[USER]).json()
    assert served.post("/detokenize", tokens=chat["tokens"]).json()["prompt"] == "<bos><user>Hi\n<assistant>"
    assert served.post("/detokenize", tokens=[272]).status_code == 400
    assert served.post("/tokenize").status_code == 400
    assert served.post("/tokenize", messages=[USER], tools=[{}]).status_code == 400
    info = served.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<bos>", "<eos>", TEMPLATE)


def test_metrics_have_the_names_that_dashboards_know(served):
    served.complete(prompt="ab", max_tokens=3)
    text = served.client.get("/metrics").text
    value = lambda name, more="": float(re.search(rf"^{re.escape(name + label(more))} (.*)$", text, re.M)[1])
    label = lambda more: "{" + ",".join(sorted(['engine="0"', 'model_name="tiny"', *[more] * bool(more)])) + "}"
    assert value("vllm:prompt_tokens_total") == 3
    assert value("vllm:generation_tokens_total") == 3
    assert value("vllm:time_to_first_token_seconds_count") == 1
    assert value("vllm:inter_token_latency_seconds_count") == 2
    assert value("vllm:num_requests_running") == 1
    assert value("vllm:kv_cache_usage_perc") == 0.25
    assert value("dsv3_jax:programs") == 27
    assert value("dsv3_jax:drafts_up_to") == 4
    assert value("vllm:prefix_cache_hits_total") == 40
    assert value("vllm:spec_decode_num_draft_tokens_total") == 20
    assert value("vllm:spec_decode_num_accepted_tokens_total") == 15
    assert value("vllm:spec_decode_num_accepted_tokens_per_pos_total", 'position="1"') == 6
    assert value("vllm:request_success_total", 'finished_reason="length"') == 1


def test_a_text_that_nobody_reads_is_an_aborted_one():
    served = Served()

    async def leave():
        answer = Completion(served.service, CompletionRequest(prompt="ab", n=2))
        answer.start()
        answer.close()

    asyncio.run(leave())
    aborted = 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 2.0'
    assert aborted in served.client.get("/metrics").text


def test_a_model_without_a_chat_template():
    answer = Served(template=None).post("/v1/chat/completions", messages=[USER])
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


def test_the_page_and_the_description(served):
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "innerHTML" not in page.text
    paths = served.client.get("/openapi.json").json()["paths"]
    assert (
        "prompt" in paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["required"]
    )


def test_what_the_description_forbids_is_refused(served):
    paths = served.client.get("/openapi.json").json()["paths"]
    schema_of = lambda path: paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert schema_of("/detokenize")["tokens"]["items"]["minimum"] == 0
    assert served.client.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert schema_of("/tokenize")["messages"]["anyOf"][0]["minItems"] == 1
    assert served.client.post("/tokenize", json={"messages": []}).status_code == 400
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    structured = schema_of("/v1/chat/completions")["structured_outputs"]["anyOf"][0]["properties"]
    assert structured["choice"]["anyOf"][0]["minItems"] == 1
    more = {"structured_outputs": {"choice": []}}
    assert served.client.post("/v1/chat/completions", json=chat | more).status_code == 400
    assert schema_of("/v1/chat/completions")["modalities"]["anyOf"][0]["const"] == ["text"]
    for modalities in ([], ["audio"]):
        more = {"modalities": modalities}
        assert served.client.post("/v1/chat/completions", json=chat | more).status_code == 400
