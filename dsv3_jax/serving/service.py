"""The parts shared by endpoints: the engine, its tokenizer and template, limits, and the running texts."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.data import Tokenizer
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.generation_config import GenerationConfig
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.serving.chat import ChatError, ChatPrompt, ChatTemplate
from dsv3_jax.serving.detokenize import Vocabulary
from dsv3_jax.serving.grammar import Grammar, GrammarError, Grammars
from dsv3_jax.serving.metrics import Metrics
from dsv3_jax.serving.output import TextOutput
from dsv3_jax.serving.protocol import Generation, RequestError, structure
from dsv3_jax.serving.responses import TokenLogprob
from dsv3_jax.serving.tools import MARKS

_MAX_STOPS, _MAX_BIASES = 16, 1024


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server."""

    max_requests: int = 256
    """Maximum number of running and waiting texts, counting each choice of a request; more get status 429."""
    max_choices: int = 128
    """Maximum number of texts per request: prompts times n."""
    max_body_bytes: int = 32 * 2**20
    """Maximum size of a request's body."""


@dataclasses.dataclass
class Piece:
    """A part of one text, with its tokens, some of whose text may be held back."""

    text: str = ""
    scores: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.scores or self.finish_reason)

    def __add__(self, other: Piece) -> Piece:
        return Piece(
            self.text + other.text,
            self.scores + other.scores,
            other.finish_reason or self.finish_reason,
            other.stop_reason if other.finish_reason else self.stop_reason,
        )


@dataclasses.dataclass(frozen=True)
class Options:
    """Options for generating the texts of one request."""

    sampling: Sampling
    max_tokens: int | None
    default_tokens: int | None
    stops: list[str]
    include_stop: bool
    skip_special_tokens: bool
    grammar: Grammar | None


class Busy(RequestError):
    """The server has no room for a request."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} texts are being generated or wait, the most that this server takes: try again later")
        self.status = 429


class Service:
    """The model behind a server.

    Args:
      engine: runs the requests.
      tokenizer: the model's.
      end_ids: tokens that end a text.
      template: for conversations; None if the model has none.
      defaults: default sampling parameters.
      model_name: the name in requests.
      limits: on concurrent work.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        end_ids: Collection[int],
        template: ChatTemplate | None,
        defaults: GenerationConfig,
        model_name: str,
        limits: Limits,
    ) -> None:
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.model_name, self.limits = model_name, limits
        self.vocabulary = Vocabulary(tokenizer, shown=MARKS)
        self.metrics = Metrics(model_name, engine.stats)
        self.running: set[Choice] = set()
        self._end_ids, self._defaults = tuple(sorted(end_ids)), defaults

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Grammars, created on first use, since that takes about a second for a large vocabulary."""
        return Grammars(self.tokenizer, self.vocabulary, self._end_ids, self.engine.vocab_size)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError (404) if a request names another model."""
        if name is not None and name != self.model_name:
            raise RequestError(f"there is no model {name[:200]!r}: this server has {self.model_name!r}", "model", 404)

    def check_count(self, texts: int) -> None:
        """Raises RequestError if a request has too many texts, Busy if there is no room for them now."""
        if texts > self.limits.max_choices:
            raise RequestError(f"{texts} texts are asked for at once: at most {self.limits.max_choices} can be", "n")
        if len(self.running) + texts > self.limits.max_requests:
            raise Busy(self.limits.max_requests)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encodes a prompt. Raises RequestError if it has no tokens or too many."""
        # A token has at most some 100 bytes: what is hopeless isn't tokenized.
        if len(text) > 128 * self.engine.max_length + 1024:
            raise RequestError(
                f"the prompt has {len(text)} characters: a prompt and its continuation have at most "
                f"{self.engine.max_length} tokens",
                "prompt",
            )
        return self.check_ids(self.tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens).tolist())

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """Checks a prompt of token ids. Raises RequestError if it is empty, too long, or has an invalid id."""
        if not ids:
            raise RequestError("a prompt is empty: it must have at least one token", "prompt")
        if len(ids) >= self.engine.max_length:
            raise RequestError(
                f"a prompt has {len(ids)} tokens: with its continuation it may have {self.engine.max_length}", "prompt"
            )
        for i in ids:
            if not 0 <= i < self.engine.vocab_size:
                raise RequestError(
                    f"a prompt has the token {i}: the vocabulary is 0 to {self.engine.vocab_size - 1}", "prompt"
                )
        return list(ids)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, **how: Any) -> ChatPrompt:
        """Renders a conversation. Raises RequestError if there is no template, or it rejects the messages."""
        if self.template is None:
            raise RequestError(
                "the model has no chat template: use /v1/completions, or serve it with --chat-template", "messages"
            )
        try:
            return self.template.render(messages, tools or None, **how)
        except ChatError as error:
            raise RequestError(str(error), "messages") from None

    def grammar(self, request: Generation, *, thinking: bool = False) -> Grammar | None:
        """Returns the grammar for a request's output, if it specifies one. Raises RequestError."""
        asked = structure(request)
        if asked is None:
            return None
        kind, value = asked
        makes: dict[str, Callable[..., Grammar]] = {
            "json": self.grammars.json_schema,
            "regex": self.grammars.regex,
            "choice": self.grammars.choice,
        }
        try:
            return makes[kind](value, thinking=thinking)
        except GrammarError as error:
            raise RequestError(f"the {kind} of the output can't be followed: {error}", "response_format") from None

    def tool_grammar(self, tools: Sequence[Mapping[str, Any]], *, several: bool, thinking: bool) -> Grammar:
        """Returns the grammar for calls of `tools`. Raises RequestError if a schema is unsupported."""
        assert self.template is not None
        fenced = self.template.fenced_arguments
        try:
            return self.grammars.tool_calls(tools, fenced=fenced, several=several, thinking=thinking)
        except GrammarError as error:
            raise RequestError(f"the parameters of the tools can't be followed: {error}", "tools") from None

    def options(
        self,
        request: Generation,
        *,
        default_tokens: int | None = None,
        limit: int | None = None,
        grammar: Grammar | None = None,
    ) -> Options:
        """Returns the options for generating a request's texts.

        Args:
          default_tokens: default number of tokens, or as many as there is room for; None for the latter.
          limit: the token limit under another name, which overrides `max_tokens`.
          grammar: overrides the grammar of the request.

        Raises:
          RequestError: a value is invalid.
        """
        if len(request.stops) > _MAX_STOPS or any(not stop or len(stop) > 1024 for stop in request.stops):
            raise RequestError(f"stop must be at most {_MAX_STOPS} texts of 1 to 1024 characters", "stop")
        bias = self._bias(request)
        for token in request.stop_token_ids or []:
            if not 0 <= token < self.engine.vocab_size:
                raise RequestError(
                    f"stop_token_ids has {token}: the vocabulary is 0 to {self.engine.vocab_size - 1}", "stop_token_ids"
                )

        def pick(name: str, default: float) -> Any:
            found = (getattr(request, name), getattr(self._defaults, name, None), default)
            return next(v for v in found if v is not None)

        top_k, top_p = pick("top_k", 0), pick("top_p", 1.0)
        try:
            sampling = Sampling(
                temperature=float(pick("temperature", 1.0)),
                top_k=top_k if top_k > 0 else None,
                top_p=float(top_p) or 1e-9,  # 0 means the most likely token alone
                min_p=request.min_p or 0.0,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                repetition_penalty=request.repetition_penalty,
                logit_bias=bias,
                seed=request.seed,
                stop_token_ids=tuple(request.stop_token_ids or ()),
                ignore_eos=request.ignore_eos,
            )
        except ConfigError as error:
            raise RequestError(str(error)) from None
        return Options(
            sampling,
            request.max_tokens if limit is None else limit,
            default_tokens,
            request.stops,
            request.include_stop_str_in_output,
            request.skip_special_tokens,
            grammar or self.grammar(request),
        )

    def _bias(self, request: Generation) -> dict[int, float]:
        bias: dict[int, float] = {}
        if len(request.logit_bias or {}) > _MAX_BIASES:
            raise RequestError(
                f"logit_bias has {len(request.logit_bias or {})} tokens: at most {_MAX_BIASES}", "logit_bias"
            )
        for key, value in (request.logit_bias or {}).items():
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
            if not 0 <= token < self.engine.vocab_size or not -100 <= value <= 100:
                raise RequestError(
                    f"logit_bias has {key[:40]!r}: {value:g}; it maps token ids, 0 to {self.engine.vocab_size - 1}, to "
                    "numbers from -100 to 100",
                    "logit_bias",
                )
            bias[token] = float(value)
        return bias

    def choice(
        self,
        prompt: list[int],
        options: Options,
        *,
        seed_offset: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> Choice:
        """Starts one text.

        Args:
          prompt: token ids.
          options: for generation.
          seed_offset: added to the request's seed, so that its choices
          differ.
          logprobs: number of alternatives with log probabilities per token; None for no log probabilities.
          prompt_logprobs: the same for the prompt's tokens.

        Raises:
          RequestError: prompt and continuation are too long, or the engine rejects the request.
        """
        room = self.engine.max_length - len(prompt)
        if options.max_tokens is not None and options.max_tokens > room:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {options.max_tokens} new ones exceed the model's "
                f"{self.engine.max_length}: at most {room} can follow",
                "max_tokens",
            )
        seed = options.sampling.seed
        if seed is not None:
            sampling = dataclasses.replace(options.sampling, seed=(seed + seed_offset) % 2**63)
            options = dataclasses.replace(options, sampling=sampling)
        default = room if options.default_tokens is None else min(options.default_tokens, room)
        count = default if options.max_tokens is None else options.max_tokens
        return Choice(self, prompt, options, count, logprobs, prompt_logprobs)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes tokens, special ones by name. Raises RequestError if an id is outside the vocabulary."""
        for i in ids:
            if not 0 <= i < self.engine.vocab_size:
                raise RequestError(f"tokens has {i}: the vocabulary is 0 to {self.engine.vocab_size - 1}", "tokens")
        whole = b"".join(self.vocabulary.bytes[i] for i in ids if i < len(self.vocabulary.bytes))
        return whole.decode("utf-8", "replace")

    def tokenizer_info(self) -> dict[str, Any]:
        """Returns special tokens and the chat template, under the names in tokenizer_config.json."""
        name = self.vocabulary.name
        return {
            "tokenizer_class": type(self.tokenizer).__name__,
            "bos_token": name(self.tokenizer.bos_id),
            "eos_token": name(self.tokenizer.eos_id),
            "pad_token": None,
            "chat_template": None if self.template is None else self.template.source,
            "model_max_length": self.engine.max_length,
        }

    def failure(self) -> str | None:
        """Returns why the service can't process requests any more; None if it can."""
        return self.engine.failure

    def cancel_all(self) -> None:
        """Cancels all running texts."""
        for choice in list(self.running):
            choice.cancel()


class Choice:
    """A text being generated."""

    def __init__(
        self,
        service: Service,
        prompt: list[int],
        options: Options,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> None:
        self._service, self._prompt, self._options, self._max_tokens = service, prompt, options, max_tokens
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs
        self._request: Any = None
        self._finish = "abort"
        self.prompt_scores: list[TokenLogprob] = []
        """Scores of the prompt's tokens, available with the first piece."""
        self.generated = self.cached = 0
        """Number of tokens so far, and of prompt tokens found in the cache."""

    def start(self) -> None:
        """Submits the text to the engine. Raises RequestError if it is rejected."""
        grammar = self._options.grammar
        try:
            self._request = self._service.engine.submit(
                self._prompt,
                self._options.sampling,
                max_new_tokens=max(self._max_tokens, 1),  # of none, one is drawn and left out: the prompt is scored
                logprobs=self._logprobs,
                prompt_logprobs=self._prompt_logprobs,
                grammar=None if grammar is None else grammar.copy(),
            )
        except ConfigError as error:
            raise RequestError(str(error)) from None
        self._service.running.add(self)
        self._timer = self._service.metrics.begin(len(self._prompt))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the text in pieces; the last one has the finish reason.

        Raises RequestError (500) if the engine fails this request.
        """
        options = self._options
        output = TextOutput(
            self._service.vocabulary,
            options.stops,
            include_stop=options.include_stop,
            skip_special_tokens=options.skip_special_tokens,
        )
        try:
            async for step in self._request:
                if step.prompt_logprobs is not None:
                    self.prompt_scores = [TokenLogprob(*score) for score in step.prompt_logprobs]
                self.cached = step.cached_tokens
                before = self.generated
                piece = self._piece(step, output)
                self._timer.tokens(self.generated - before)
                if piece.finish_reason:
                    self._finish = piece.finish_reason
                yield piece
                if piece.finish_reason:
                    return
        finally:
            self.cancel()

    def _piece(self, step: Any, output: TextOutput) -> Piece:
        """Returns the text of one step's tokens, up to a stop string or the end."""
        if step.error is not None:
            raise RequestError(step.error, status=500)
        if not self._max_tokens:  # the one that was drawn is left out
            return Piece(finish_reason="length")
        piece = Piece()
        for token, score in zip(step.tokens, step.logprobs or [None] * len(step.tokens), strict=True):
            self.generated += 1
            last = step.finish_reason == "stop" and token == step.tokens[-1] and step.stop_token is not None
            if not last:
                piece.text += output.add(token)
                if score is not None:
                    piece.scores.append(TokenLogprob(*score))
            if output.stopped is not None:
                return piece + Piece(finish_reason="stop", stop_reason=output.stopped)
        if step.finish_reason:
            piece += Piece(output.end(), [], step.finish_reason)
            if output.stopped is not None:
                return piece + Piece(finish_reason="stop", stop_reason=output.stopped)
            if step.stop_token in self._options.sampling.stop_token_ids:
                piece.stop_reason = step.stop_token
        return piece

    def cancel(self) -> None:
        """Cancels the text if it is still running, and frees its resources."""
        if self in self._service.running:
            self._service.running.discard(self)
            self._service.engine.cancel(self._request)
            self._timer.end(self._finish)


def start_all(choices: Sequence[Choice]) -> None:
    """Starts all texts of a request, or none."""
    try:
        for choice in choices:
            choice.start()
    except BaseException:
        for choice in choices:
            choice.cancel()
        raise


async def merge[T](streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """Merges several streams, yielding each item with the index of its stream. An error in one ends all."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, list[T], BaseException | None]] = asyncio.Queue()

    async def forward(i: int, stream: AsyncIterator[T]) -> None:
        error = None
        try:
            async for item in stream:
                queue.put_nowait((i, [item], None))
        except BaseException as raised:
            error = raised
        queue.put_nowait((i, [], error))  # its end

    tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            i, items, error = await queue.get()
            if error is not None:
                raise error
            left -= not items
            for item in items:
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
