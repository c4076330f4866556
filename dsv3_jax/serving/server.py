"""The HTTP server: routes, errors, the API key, and a shutdown that lets running requests finish."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv3_jax.serving.chat_completions import ChatCompletion
from dsv3_jax.serving.completions import Completion
from dsv3_jax.serving.openapi import openapi
from dsv3_jax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
    check_messages,
    parse_request,
)
from dsv3_jax.serving.responses import DONE, event
from dsv3_jax.serving.service import Service

_PAGE = Path(__file__).with_name("page.html")
_OPEN = ("/", "/health", "/metrics", "/openapi.json")
"""Paths that need no API key."""
_POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of a server, and access to it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    """None or empty for a server that asks for none."""
    grace_seconds: float = 30.0
    """Seconds that running requests have to finish after SIGTERM."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


class Server:
    """The HTTP interface of a service: `app` is its ASGI application, and `draining` whether it is shutting down."""

    def __init__(self, service: Service, address: Address) -> None:
        self.service, self.address, self.draining = service, address, False
        self._created = int(time.time())
        get, post = (functools.partial(Route, methods=[method]) for method in ("GET", "POST"))
        routes = [
            get("/", self._page),
            get("/health", self._health),
            get("/metrics", self._metrics),
            get("/openapi.json", self._openapi),
            get("/v1/models", self._models),
            get("/v1/models/{name:path}", self._model),
            get("/tokenizer_info", self._tokenizer_info),
            post("/tokenize", self._tokenize),
            post("/detokenize", self._detokenize),
            post("/v1/completions", functools.partial(self._generate, CompletionRequest, Completion)),
            post("/v1/chat/completions", functools.partial(self._generate, ChatRequest, ChatCompletion)),
        ]
        handlers: Any = {RequestError: _refused, HTTPException: _no_route, ClientDisconnect: _left, Exception: _failed}
        app = Starlette(routes=routes, exception_handlers=handlers)
        self.app: ASGIApp = _Guard(app, address, service.limits.max_body_bytes)

    # Endpoints ----------------------------------------------------------------------------------------------

    async def _generate(self, kind: Any, make: Any, request: Request) -> Response:
        parsed = parse_request(kind, await request.body())
        self._check(parsed.model)
        # Tokenizing and grammars may take a while: others' tokens go on meanwhile.
        answer = await asyncio.to_thread(make, self.service, parsed)
        answer.start()
        if parsed.stream:
            return _Stream(answer)
        try:
            return JSONResponse(await _while_connected(request, answer.whole()))
        finally:
            answer.close()

    async def _tokenize(self, request: Request) -> Response:
        parsed = parse_request(TokenizeRequest, await request.body())
        self._check(parsed.model, new=False)
        if (parsed.prompt is None) == (parsed.messages is None):
            raise RequestError("either prompt or messages must be there", "prompt")
        if parsed.messages is not None:
            text = self.service.render(
                check_messages(parsed.messages),
                parsed.tools,
                add_generation_prompt=parsed.add_generation_prompt and not parsed.continue_final_message,
                continue_final_message=parsed.continue_final_message,
                extra=parsed.chat_template_kwargs,
            ).text
        else:
            text = parsed.prompt or ""
        adds = parsed.add_special_tokens
        adds = parsed.messages is None if adds is None else adds
        encode = functools.partial(self.service.tokenizer.encode_prompt, text, add_special_tokens=adds)
        ids = (await asyncio.to_thread(encode)).tolist()
        answer = {"tokens": ids, "count": len(ids), "max_model_len": self.service.engine.max_length}
        if parsed.return_token_strs:
            answer["token_strs"] = [self.service.vocabulary.name(i) for i in ids]
        return JSONResponse(answer)

    async def _detokenize(self, request: Request) -> Response:
        parsed = parse_request(DetokenizeRequest, await request.body())
        self._check(parsed.model, new=False)
        return JSONResponse({"prompt": self.service.decode(parsed.tokens)})

    async def _tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(self.service.tokenizer_info())

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self.service.model_name, "object": "model", "created": self._created, "owned_by": "dsv3_jax"}
        return card | {"max_model_len": self.service.engine.max_length}

    async def _health(self, request: Request) -> Response:
        if self.draining:
            return _error("the server is stopping", 503)
        if failure := self.service.failure():
            return _error(failure, 500)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi())

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text("utf-8"), headers={"Content-Security-Policy": _POLICY})

    def _check(self, model: str | None, new: bool = True) -> None:
        """Raises RequestError if the server is shutting down, or has another model. new: for generating text."""
        if new and self.draining:
            raise RequestError("the server is stopping: ask another", status=503)
        self.service.check_model(model)


_NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _Stream(StreamingResponse):
    """The events of an answer, the last one an error if it fails. Cancels unfinished texts at the end."""

    def __init__(self, answer: Any) -> None:
        super().__init__(_events(answer), media_type="text/event-stream", headers=_NO_BUFFER)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also of one whose events were never asked for
            self._answer.close()


async def _events(answer: Any) -> AsyncIterator[str]:
    try:
        async for line in answer.events():
            yield line
    except RequestError as error:
        yield event(_body(str(error), error.status)) + DONE


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """Returns the result of `work`, which is cancelled if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


# Errors -----------------------------------------------------------------------------------------------------

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}


def _body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "internal_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(message: str, status: int, param: str | None = None) -> Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(_body(message, status, param), status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(str(error), error.status, error.param)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _error(f"{request.method} {request.url.path}: {error.detail}", error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _left(request: Request, error: Exception) -> Response:
    """The response to a client that has disconnected, which nobody receives."""
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    """The response to an internal error. The details are in the log, since Starlette raises it again."""
    return _error(f"internal error: {type(error).__name__}", 500)


class _Guard:
    """Middleware that checks the API key, and rejects requests from other web pages and bodies that are too large."""

    def __init__(self, app: ASGIApp, address: Address, max_body_bytes: int) -> None:
        self._app, self._address, self._most = app, address, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            return await refusal(scope, receive, send)
        size = 0

        async def limited() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise RequestError(f"the request's body is larger than {self._most} bytes", status=413)
            return message

        await self._app(scope, limited, send)

    def _refusal(self, path: str, headers: dict[str, str]) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1] != host:
            return _error(f"requests of other web pages aren't taken: Origin is {origin[:200]}", 403)
        # A page whose name was made to point here would pass as its own origin.
        if self._address.loopback and not _is_local(host):
            return _error(f"this server is for its own machine: Host is {host[:200]}", 403)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most:
            return _error(f"the request's body is larger than {self._most} bytes", 413)
        key = self._address.api_key
        given = headers.get("authorization", "").encode("latin-1")
        given = given[7:] if given[:7].lower() == b"bearer " else given
        if key and path not in _OPEN and not hmac.compare_digest(given, key.encode()):
            return _error("the API key is missing or wrong: send Authorization: Bearer KEY", 401)
        return None


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    return name in ("localhost", "testserver", "")


# Running ----------------------------------------------------------------------------------------------------


class _Uvicorn(uvicorn.Server):
    """Uvicorn, which on SIGTERM waits until running requests have finished, and answers new ones with 503."""

    def __init__(self, server: Server, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                server.app,
                host=server.address.host,
                port=server.address.port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._server, self._ready = server, ready
        self._drain: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._server.draining:  # asked twice: at once
            self.should_exit = self.force_exit = True
            return
        self._server.draining = True
        if sig == signal.SIGINT and not self._server.service.running:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        stop: bool = await super().on_tick(counter)
        server = self._server
        if server.draining and self._drain is None:
            self._drain = time.monotonic()
            count = len(server.service.running)
            print(f"stopping: {count} texts may finish within {server.address.grace_seconds:g} s", file=sys.stderr)
        if self._drain is not None and (
            not server.service.running or time.monotonic() - self._drain > server.address.grace_seconds
        ):
            server.service.cancel_all()
            return True
        return stop


def bind(address: Address) -> socket.socket:
    """Returns a socket bound to an address, not listening yet. Raises OSError if the address can't be used."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address.host, address.port))
    except (OSError, OverflowError) as error:  # the latter of a port that is none
        bound.close()
        why = getattr(error, "strerror", error)
        raise OSError(f"{address.host}:{address.port} can't be listened on: {why}") from None
    return bound


def run(server: Server, bound: socket.socket, ready: Callable[[str], None]) -> None:
    """Serves at a socket of `bind` until SIGTERM or Ctrl-C. ready: called with the server's URL once it listens."""
    host = f"[{server.address.host}]" if ":" in server.address.host else server.address.host
    url = f"http://{host}:{bound.getsockname()[1]}"
    _Uvicorn(server, lambda: ready(url)).run([bound])
