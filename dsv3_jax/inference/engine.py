"""The inference engine: continuous batching over one pool of pages, on its own thread.

It repeats: admit requests for which there are pages, process a chunk of one prompt, take a decoding step for all texts.
Results are read one step later, while the device computes the next step; tokens and lengths stay on the device. The
host only waits if it needs each token first, for penalties or a grammar.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import threading
import time
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.inference import steps
from dsv3_jax.inference.expert_stacks import experts_in_stacks
from dsv3_jax.inference.paged_cache import SCRATCH, PagePool, init_pool, spread
from dsv3_jax.inference.pages import PageAllocator
from dsv3_jax.inference.request import Grammar, Request, Score, Stats, Step
from dsv3_jax.inference.sampling import ALL, Edits, Sampling, edits_of, kind, rows
from dsv3_jax.inference.speculation import Acceptance, Speculation
from dsv3_jax.model.auto import PAGE, kernels
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.sharding import current_sharding

_GREEDY = Sampling(temperature=0)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine."""

    max_batch: int = 32
    """Maximum number of texts in a batch; other requests wait."""
    max_length: int | None = None
    """Maximum length of a prompt and its continuation in tokens; by default the model's range."""
    cache_tokens: int | None = None
    """Tokens that the cache has room for; by default what cache_share allows, and at most max_batch times max_length.
    On a CPU a quarter of the machine's free memory counts as free."""
    cache_share: float = 0.6
    """Fraction of the free memory, after loading the model, for the cache; the rest is for activations."""
    cache_dtype: str | None = None
    """Dtype of the latents in the cache, by default the runtime's; float8_e4m3fn takes 5/9 of bfloat16's bytes."""
    prefill_chunk: int = 256
    """Prompt tokens put into the cache between two steps of the texts; more if there are several prompts per text."""
    drafts: int | None = None
    """Tokens that the MTP module drafts per step; by default 1 if the model has MTP, else 0."""
    drafts_up_to: int | None = None
    """Maximum number of running texts for which drafts are used; by default the engine measures when they pay."""
    seed: int = 0
    """Seed for texts whose sampling has none."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.drafts is not None and self.drafts < 0:
            raise ConfigError(f"drafts is {self.drafts}: it must not be negative")
        if not 0 < self.cache_share < 1:
            raise ConfigError(f"cache_share is {self.cache_share}: it must be between 0 and 1")
        if self.cache_dtype not in (None, "float32", "bfloat16", "float8_e4m3fn"):
            raise ConfigError(f"cache_dtype is {self.cache_dtype!r}: it must be float32, bfloat16 or float8_e4m3fn")


class _Running:
    """An admitted request. `prefilled` of its tokens are in the cache, and `pending` steps haven't been read."""

    def __init__(self, request: Request, pages: list[int], found: int, acceptance: Acceptance) -> None:
        self.request, self.pages, self.prefilled, self.slot = request, pages, found, -1
        self.tokens = [*request.prompt, *request.text]
        self.acceptance, self.pending = acceptance, 0
        self.ended, self.finite = False, True

    @property
    def in_prefill(self) -> bool:
        return self.prefilled < len(self.tokens)


class Engine:
    """Generates texts with one model.

    Args:
      model, variables: from `load_pretrained`.
      config: sizes.
      end_ids: tokens that end a text; by default the model's.

    ```
    engine = Engine(model, variables)
    for step in engine.submit([1, 2, 3], Sampling(temperature=0), max_new_tokens=8):
        print(step.tokens)
    ```
    """

    def __init__(
        self,
        model: DeepSeekV3,
        variables: Mapping[str, Any],
        config: EngineConfig | None = None,
        *,
        end_ids: Collection[int] | None = None,
    ) -> None:
        config = EngineConfig() if config is None else config
        self.config, c = config, model.config
        limit = c.max_position_embeddings
        if config.max_length is not None and not 2 <= config.max_length <= limit:
            raise ConfigError(f"max_length is {config.max_length}: it must be from 2 to the model's range, {limit}")
        self.vocab_size = c.vocab_size
        has_mtp = c.num_nextn_predict_layers > 0 and "mtp_0" in variables["params"]
        self.drafts = (1 if has_mtp else 0) if config.drafts is None else config.drafts
        if self.drafts and not has_mtp:
            raise ConfigError("drafts need the model's MTP module: it has none, or was loaded without")
        expanded = dataclasses.replace(model.runtime, attention_form="expanded", remat="none")
        absorbed = dataclasses.replace(expanded, attention_form="absorbed")
        self._expanded, self._absorbed = model.clone(runtime=expanded), model.clone(runtime=absorbed)
        self._variables = experts_in_stacks(self._absorbed, variables)
        self._ends = frozenset(c.eos_token_ids if end_ids is None else end_ids)

        def pool(pages: int) -> PagePool:
            return init_pool(c, model.runtime, pages, mtp=self.drafts > 0, dtype=config.cache_dtype)

        self._mesh = _mesh_of(variables)
        with self._on_mesh():
            self._rows = current_sharding(model.runtime).size("batch")  # a batch has a multiple of so many texts
        devices = {d for x in jax.tree.leaves(variables) if isinstance(x, jax.Array) for d in x.devices()}
        page_bytes = jax.eval_shape(lambda: pool(1)).bytes / self._rows
        ahead = 2 * (self.drafts + 1)  # tokens that two steps write past a text's end
        self.max_length, count = _sizes(config, limit, ahead, page_bytes, _free_memory(devices))
        count += -(1 + count) % self._rows
        self._most_pages = -(-(self.max_length + ahead) // PAGE)
        with self._on_mesh():
            made = jax.jit(lambda: spread(pool(1 + count), model.runtime))  # and the scratch page
            self._pool: PagePool = made()
        self._slots = steps.init_slots(model, config.max_batch, self.drafts)
        # Said, as a step's results say it: or its program would be compiled again for them.
        one = next(iter(devices)) if len(devices) == 1 else None
        self._place = one if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        if self._place is not None:
            self._slots = jax.device_put(self._slots, self._place)
        if one is not None:
            self._pool = jax.device_put(self._pool, one)
        self.bytes_per_token = self._pool.bytes / ((1 + count) * PAGE)
        self.pages = PageAllocator(1 + count)
        self._free_slots = list(range(config.max_batch - 1, -1, -1))
        self._batch_sizes = sorted({-(-size // self._rows) * self._rows for size in _buckets(config.max_batch, 2)})
        self._table_sizes = _buckets(self._most_pages, 4)
        by_kernel = kernels(model.runtime) is not None and self._mesh is None  # which doesn't read what a text hasn't
        self._decode_tables = _buckets(self._most_pages, 16 if by_kernel else 2)
        self._chunk_sizes = sorted({-(-config.prefill_chunk // 4), config.prefill_chunk})
        pieces = [-(-min(n, config.max_batch) // self._rows) * self._rows for n in (1, 4, 16)]
        self._piece_rows, self._few_pieces = sorted(set(pieces)), pieces[1]
        self._batch: tuple[Any, steps.Packed] | None = None  # of the last step, and what it was made of
        self.speculation = Speculation(self.drafts, config.drafts_up_to)
        """Which steps have drafts; its `str` says so in words."""
        self._timed: tuple[int, int, int] | None = None  # the last turn's step, if it did nothing else
        self._turn_ended = 0.0

        self._waiting: collections.deque[Request] = collections.deque()
        self._running: list[_Running] = []
        self._unread: collections.deque[tuple[list[_Running], steps.Drawn, int]] = collections.deque()
        self._new = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._submitted = 0
        self._programs: set[Any] = set()
        self._counts: collections.Counter[str] = collections.Counter()
        self._accepted_at = [0] * self.drafts
        self.failure: str | None = None
        """The error that ended the engine's thread, if any."""

    # What callers use, from any thread.

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling = _GREEDY,
        *,
        max_new_tokens: int,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Request:
        """Submits a prompt.

        Args:
          prompt: token ids, at least one.
          max_new_tokens: maximum number of new tokens.
          logprobs: number of alternatives to each token to score, 0 to 20; None for no scores.
          prompt_logprobs: the same for the prompt's tokens.
          grammar: constrains the text.

        Raises:
          ConfigError: an empty prompt, an id outside the vocabulary, or more tokens than `max_length`.
        """
        tokens = [int(t) for t in prompt]
        if not tokens:
            raise ConfigError("a prompt is empty: give it at least one token, for example the tokenizer's bos")
        for token in (*tokens, *sampling.logit_bias):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(f"token id {token} is outside the vocabulary: ids go from 0 to {self.vocab_size - 1}")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
        if len(tokens) + max_new_tokens > self.max_length:
            raise ConfigError(
                f"a prompt of {len(tokens)} tokens and {max_new_tokens} new ones exceed the {self.max_length} tokens "
                "that a text may have here"
            )
        for name, value in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
            if value is not None and not 0 <= value <= steps.MOST_LOGPROBS:
                raise ConfigError(f"{name} is {value}: it must be from 0 to {steps.MOST_LOGPROBS}")
        with self._new:
            if self.failure is not None:
                raise ConfigError(f"the engine has stopped: {self.failure}")
            if self._closing:
                raise ConfigError("the engine is closed")
            self._submitted += 1
            seed = hash((self.config.seed, self._submitted)) if sampling.seed is None else sampling.seed
            how = dict(logprobs=logprobs, prompt_logprobs=prompt_logprobs, grammar=grammar)
            request = Request(tokens, sampling, seed=seed, max_new_tokens=max_new_tokens, **how)  # type: ignore[arg-type]
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
                self._thread.start()
            self._new.notify()
        return request

    def cancel(self, request: Request) -> None:
        """Cancels a request and frees its pages; its last step says so. Does nothing if it has finished."""
        request.cancelled = True
        with self._new:
            self._new.notify()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling = _GREEDY, *, max_new_tokens: int
    ) -> Generator[list[int]]:
        """Continues all prompts in parallel, and yields the new tokens of each in order.

        Raises ConfigError as `submit` does, and RuntimeError for a text that failed.
        """
        requests: list[Request] = []
        try:
            with self._new:  # the engine sees them all at once
                for prompt in prompts:
                    requests.append(self.submit(prompt, sampling, max_new_tokens=max_new_tokens))
            for request in requests:
                tokens: list[int] = []
                for step in request:
                    if step.error is not None:
                        raise RuntimeError(step.error)
                    tokens += step.tokens
                yield tokens
        finally:  # also where a prompt is refused, or the caller wants no more
            for request in requests:
                self.cancel(request)

    def stats(self) -> Stats:
        """Returns counts and the current state."""
        n = self._counts
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_usage=self.pages.usage,
            preemptions=n["preemptions"],
            prefix_queries=self.pages.queries,
            prefix_hits=self.pages.hits,
            drafts=n["drafts"],
            draft_tokens=n["draft_tokens"],
            accepted_tokens=n["accepted_tokens"],
            accepted_per_position=tuple(self._accepted_at),
            drafts_up_to=self.speculation.pays_up_to,
            steps=n["steps"],
            tokens=n["tokens"],
            programs=len(self._programs),
        )

    def replace_variables(self, variables: Mapping[str, Any]) -> None:
        """Replaces the weights by others of the same shapes, as between two rounds of training. Arrays aren't copied.

        Raises RuntimeError if requests are running or waiting.
        """
        with self._new:
            if self._running or self._waiting:
                raise RuntimeError("the weights can't be replaced while texts are being generated")
            self._variables = experts_in_stacks(self._absorbed, variables)
            self.pages.forget()

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def close(self) -> None:
        """Stops the thread after all requests have finished; new ones are rejected."""
        with self._new:
            self._closing = True
            self._new.notify()
        if self._thread is not None:
            self._thread.join()

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, count: None) -> int:
        """Compiles all programs, of every batch and length, before the first request comes.

        progress: called with how many are done, of how many. Returns the latter.
        """
        programs: list[Callable[[], Any]] = []
        for table in self._table_sizes:
            for size in self._chunk_sizes:
                if size <= table * PAGE or table == self._most_pages:
                    for count in self._piece_rows if size == self._chunk_sizes[0] else self._piece_rows[:1]:
                        programs.append(functools.partial(self._prefill_nothing, count, size, table))
        for table in self._decode_tables:
            for batch in self._batch_sizes:
                for drafts in self._drafts_of(batch):
                    programs.append(functools.partial(self._decode_nothing, batch, table, drafts))
        for batch in sorted({*self._batch_sizes, *self._piece_rows}):
            for drafts in {0, *self._drafts_of(batch)} if batch in self._piece_rows else self._drafts_of(batch):
                programs.append(functools.partial(self._draw_nothing, batch, drafts))
        for done, program in enumerate(programs):
            progress(done, len(programs))
            with self._on_mesh():
                program()
            jax.block_until_ready(self._pool)
        progress(len(programs), len(programs))
        return len(programs)

    def _drafts_of(self, batch: int) -> set[int]:
        """Numbers of drafts that steps of a batch's bucket may have."""
        up_to = self.config.drafts_up_to
        if up_to is None:
            return {0, self.drafts}
        return {self.drafts} if batch <= up_to else {0} if batch // 2 >= up_to else {0, self.drafts}

    def _prefill_nothing(self, count: int, size: int, table: int) -> None:
        tokens = np.zeros((count, size), np.int32)
        packed = self._put(self._batch_of([], count, table))
        hidden, _ = self._prefill(tokens, tokens, packed)
        self._score_prompt(hidden, tokens)

    def _decode_nothing(self, batch: int, table: int, drafts: int) -> None:
        self._decode(self._put(self._batch_of([], batch, table)), drafts)

    def _draw_nothing(self, batch: int, drafts: int) -> None:
        """Every way of drawing; of the tables only the smallest: drawing doesn't look at them."""
        packed = self._put(self._batch_of([], batch, 1))
        dtype = jnp.promote_types(self._expanded.runtime.dtype, jnp.float32)
        logits = jax.device_put(np.zeros((batch, 1 + drafts, self.vocab_size), dtype), self._place)
        for how in range(ALL + 1):
            self._draw(logits, packed, None, how, False)
        for edited, scored in ((False, True), (True, False), (True, True)):
            self._draw(logits, packed, self._edits([], batch) if edited else None, ALL, scored)

    # The thread.

    def _work(self) -> None:
        try:
            while True:
                with self._new:
                    while not (self._waiting or self._running or self._unread or self._closing):
                        self._new.wait()
                    if self._closing and not (self._waiting or self._running or self._unread):
                        return
                with self._on_mesh():
                    self._turn()
        except BaseException as error:
            traceback.print_exc()
            with self._new:  # what is submitted from here on is refused
                self.failure = f"{type(error).__name__}: {error}"
                left = [r.request for r in self._running] + list(self._waiting)
                self._running, self._waiting = [], collections.deque()
            for request in left:
                request.put(Step([], error=self.failure))

    def _turn(self) -> None:
        """Runs one iteration of the loop."""
        programs, before, self._timed = len(self._programs), self._timed, None
        self._end_cancelled()
        self._admit()
        room, prompts = self._room_for_prompts(), False
        while room > 0 and (pieces := self._next_pieces(room)):
            room -= self._prefill_pieces(pieces)
            self._read(1)
            prompts = True
        ready = [r for r in self._running if not r.in_prefill and not self._surely_ends(r)]
        if any(r.request.constrained for r in ready):
            self._read(0)
            ready = [r for r in ready if not r.ended and not self._surely_ends(r)]
        ready = self._with_pages(ready)
        if ready:
            step = self._step(ready)
            self._timed = None if prompts else step
        self._read(1 if ready else 0)
        now = time.perf_counter()
        nothing_else = not prompts and len(self._programs) == programs
        self.speculation.took(before if nothing_else else None, now - self._turn_ended)  # from a step's end to the next
        self._turn_ended = now

    def _room_for_prompts(self) -> int:
        """Tokens of prompts to process before the next step: a chunk, or as many chunks as there are prompts per text.

        Where few texts wait for a step, this delays few, and the prompts join in time for one large batch.
        """
        prompts = sum(r.in_prefill for r in self._running)
        return self.config.prefill_chunk * max(1, prompts // max(len(self._running) - prompts, 1))

    def _surely_ends(self, r: _Running) -> bool:
        """Whether the pending steps, of at least one token each, complete the text."""
        return len(r.request.text) + r.pending >= r.request.max_new_tokens

    def _end_cancelled(self) -> None:
        with self._new:
            cancelled = [request for request in self._waiting if request.cancelled]
            for request in cancelled:
                self._waiting.remove(request)
        for r in [r for r in self._running if r.request.cancelled]:
            self._release(r)
            cancelled.append(r.request)
        for request in cancelled:
            request.put(Step([], finish_reason="cancelled"))

    def _admit(self) -> None:
        """Assigns slots and pages to waiting requests, in order."""
        while self._waiting and self._free_slots:
            request = self._waiting[0]
            tokens = [*request.prompt, *request.text]
            scores_prompt = request.prompt_logprobs is not None and not request.was_scored
            found = [] if scores_prompt else self.pages.match(tokens)
            more = self.pages.allocate(-(-(len(tokens) + 1 + self.drafts) // PAGE) - len(found))
            if more is None:
                self.pages.release(found)
                return
            hit = len(found) * PAGE
            if not request.text:
                self.pages.count(len(tokens), hit)
                request.cached = hit
            r = _Running(request, found + more, hit, self.speculation.of_text())
            r.slot = self._free_slots.pop()
            with self._new:  # at no moment is it in neither of them
                self._waiting.popleft()
                self._running.append(r)

    def _with_pages(self, ready: list[_Running]) -> list[_Running]:
        """Allocates further pages for texts that need them, preempting the most recent texts if there are none."""
        for r in list(ready):
            if r.ended:
                continue
            longest = len(r.request.prompt) + len(r.request.text) + (r.pending + 1) * (1 + self.drafts)
            short = -(-longest // PAGE) - len(r.pages)
            while short > 0 and not r.ended:
                more = self.pages.allocate(short)
                if more is not None:
                    r.pages += more
                    break
                if self._unread:
                    self._read(0)  # texts that have ended give pages back, and the others' lengths are known
                    longest = len(r.request.prompt) + len(r.request.text) + 1 + self.drafts
                    short = -(-longest // PAGE) - len(r.pages)
                else:
                    self._preempt(self._running[-1])
        return [r for r in ready if not r.ended and not self._surely_ends(r)]

    def _preempt(self, r: _Running) -> None:
        """Preempts a request: frees its pages and requeues it first, to restart with the tokens that it has."""
        self._counts["preemptions"] += 1
        self._release(r)
        with self._new:
            self._waiting.appendleft(r.request)

    def _release(self, r: _Running) -> None:
        """Ends a text here. It keeps its pages until all of its steps have been read, which still write to them."""
        if r.ended:
            return
        r.ended = True
        with self._new:
            self._running.remove(r)
            self._free_slots.append(r.slot)
            if not r.pending:
                self._give_back(r)

    def _give_back(self, r: _Running) -> None:
        """Gives back a text's pages, zeroed if they may hold non-finite values, which would affect later holders.

        Those that other texts hold too aren't zeroed: they are the same prefix's, and needed.
        """
        with self._new:  # `replace_variables` forgets pages from another thread
            pages = self.pages.release(r.pages, forget=not r.finite)
        if pages and (r.in_prefill or not r.finite):  # in prefill, nothing has been drawn that would tell
            padded = pages + [SCRATCH] * (self._most_pages - len(pages))
            self._pool = steps.clear(self._pool, np.array(padded, np.int32))

    # Device programs.

    def _next_pieces(self, room: int) -> list[_Running]:
        """The prompts to put into the cache next: the oldest, with others if all that is left of each is short.

        Many go together only where all rows of that program are used, and `room` tokens allow it.
        """
        todo = [r for r in self._running if r.in_prefill]
        size, few = self._chunk_sizes[0], self._few_pieces
        short = [r for r in todo if len(r.tokens) - r.prefilled <= size]
        most = max(n for n in self._piece_rows if n <= few or n <= min(len(short), room // size))
        return short[:most] if todo[:1] == short[:1] else todo[:1]

    def _prefill_pieces(self, group: list[_Running]) -> int:
        """Puts a piece of each prompt into the cache, and draws after last ones. Returns the tokens, padding counted.

        Several pieces are their prompts' last.
        """
        pieces = [r.tokens[r.prefilled : r.prefilled + self.config.prefill_chunk] for r in group]
        size = next(s for s in self._chunk_sizes if s >= max(map(len, pieces)))
        rows = next(n for n in self._piece_rows if n >= len(group))
        needed = -(-(max(r.prefilled for r in group) + size) // PAGE)
        table = next((s for s in self._table_sizes if s >= needed), self._table_sizes[-1])
        last = group[0].prefilled + len(pieces[0]) == len(group[0].tokens)
        constrained = last and any(r.request.constrained for r in group)
        if constrained:
            self._read(0)
        of = self._batch_of(group, rows, table)
        tokens, following = np.zeros((rows, size), np.int32), np.full((rows, size), -1, np.int32)
        for i, (r, piece) in enumerate(zip(group, pieces, strict=True)):
            after = r.tokens[r.prefilled + 1 : r.prefilled + 1 + len(piece)]
            tokens[i, : len(piece)], following[i, : len(after)] = piece, after
            of.cached[i], of.new[i] = r.prefilled, len(piece)
        packed = self._put(of)
        hidden, logits = self._prefill(tokens, following, packed)
        drawn = None
        if last:
            for r in group:
                r.pending += 1
            edits = self._edits(group, rows) if constrained else None
            scored = any(r.request.logprobs is not None for r in group)
            drawn = self._draw(logits, packed, edits, self._kind(group), scored)
        self._score_prompts(group, hidden, following)
        for r, piece in zip(group, pieces, strict=True):
            r.prefilled += len(piece)
            if last and not r.ended:
                self.pages.publish(r.tokens, r.pages)
        if drawn is not None:
            self._unread.append((group, drawn, 0))
        return rows * size

    def _score_prompts(self, group: list[_Running], hidden: jax.Array, following: np.ndarray) -> None:
        """Scores the tokens of prompts that asked for it, after their pieces, before these count as prefilled."""
        want = [r.request.prompt_logprobs is not None and not r.request.was_scored for r in group]
        if not any(want):
            return
        scores = self._score_prompt(hidden, following)
        for i, r in enumerate(group):
            if want[i]:
                request = r.request
                if not r.prefilled:  # also where it was preempted and begins again
                    request.prompt_scores = [(request.prompt[0], None, [])]
                after = r.tokens[r.prefilled + 1 : r.prefilled + 1 + following.shape[1]]
                request.prompt_scores += _scores(scores, i, after, request.prompt_logprobs or 0)

    def _step(self, ready: list[_Running]) -> tuple[int, int, int]:
        """Hands a step to the device. Returns its sizes, and how many drafts it has."""
        batch = next(s for s in self._batch_sizes if s >= len(ready))
        pages = [len(r.pages) for r in ready]
        table = next(s for s in self._decode_tables if s >= max(pages))
        scored = any(r.request.logprobs is not None for r in ready)
        for r in ready:
            r.pending += 1
        edits = self._edits(ready, batch) if any(r.request.constrained for r in ready) else None
        accepted = sum(r.acceptance.mean for r in ready if not r.request.constrained)
        drafts = self.speculation.choose(batch, len(ready), accepted)
        drafts = drafts if all(r.request.takes_drafts for r in ready) else 0
        made_of = (list(ready), pages)
        if self._batch is None or self._batch[0] != made_of:  # else it is there already
            self._batch = made_of, self._put(self._batch_of(ready, batch, table))
        packed = self._batch[1]
        logits = self._decode(packed, drafts)
        drawn = self._draw(logits, packed, edits, self._kind(ready), scored)
        self._counts["steps"] += 1
        self._unread.append((ready, drawn, drafts))
        return batch, table, drafts

    def _batch_of(self, ready: list[_Running], batch: int, table: int) -> steps.Batch:
        """The arrays of a step, on the host, padded to sizes that are compiled for."""
        pad = batch - len(ready)
        column: Any = lambda values, padding: np.array([*values, *[padding] * pad], np.int32)
        how = rows([r.request.sampling for r in ready] + [_GREEDY] * pad, [r.request.seed for r in ready] + [0] * pad)
        tables = np.full((batch, table), SCRATCH, np.int32)
        for row, r in zip(tables, ready, strict=False):
            row[: len(r.pages)] = r.pages[:table]
        return steps.Batch(
            slot=column([r.slot for r in ready], self.config.max_batch),
            cached=column([0] * len(ready), 0),
            new=column([1] * len(ready), 0),
            plain=column([r.request.constrained for r in ready], 0),
            how=how,
            tables=tables,
        )

    def _put(self, batch: steps.Batch) -> steps.Packed:
        packed: steps.Packed = jax.device_put(batch.pack(), self._place)
        return packed

    def _kind(self, ready: list[_Running]) -> int:
        """How the texts are drawn; all of `Sampling` where edits or scores are wanted, so that programs stay few."""
        if any(r.request.constrained or r.request.logprobs is not None for r in ready):
            return ALL
        return kind(r.request.sampling for r in ready)

    def _prefill(self, tokens: np.ndarray, following: np.ndarray, packed: steps.Packed) -> tuple[jax.Array, jax.Array]:
        self._programs.add(("prefill", tokens.shape, packed[1].shape))
        self._pool, self._slots, hidden, logits = steps.prefill(
            self._expanded, self._variables, self._pool, self._slots, tokens, following, packed
        )
        return hidden, logits

    def _decode(self, packed: steps.Packed, drafts: int) -> jax.Array:
        self._programs.add(("decode", packed[1].shape, drafts))
        logits: jax.Array
        self._pool, self._slots, logits = steps.decode(
            self._absorbed, self._variables, self._pool, self._slots, packed, drafts=drafts
        )
        return logits

    def _draw(
        self, logits: jax.Array, packed: steps.Packed, edits: Edits | None, how: int, scored: bool
    ) -> steps.Drawn:
        self._programs.add(("draw", logits.shape, how, edits is not None, scored))
        drawn: steps.Drawn
        self._slots, drawn = steps.draw(self._slots, logits, packed[:1], edits, kind=how, scored=scored)
        drawn.result.copy_to_host_async()
        return drawn

    def _score_prompt(self, hidden: jax.Array, following: np.ndarray) -> steps.Scores:
        self._programs.add(("score_prompt", hidden.shape))
        scores: steps.Scores = steps.score_prompt(self._expanded, self._variables, hidden, following)
        return scores

    def _edits(self, ready: list[_Running], batch: int) -> Edits:
        factor, bias = np.ones((batch, self.vocab_size), np.float32), np.zeros((batch, self.vocab_size), np.float32)
        for i, r in enumerate(ready):
            request, allowed = r.request, None
            if request.grammar is not None:
                try:
                    bits = np.ascontiguousarray(request.grammar.mask()).view(np.uint8)
                    allowed = np.unpackbits(bits, bitorder="little")[: self.vocab_size].astype(bool)
                except ValueError as error:  # its row is drawn all the same, and left out
                    self._refuse(r, str(error))
            factor[i], bias[i] = edits_of(self.vocab_size, request.sampling, request.prompt, request.text, allowed)
        return Edits(factor, bias)

    # Results.

    def _read(self, leave: int) -> None:
        """Reads the results of all steps except the newest `leave`, and delivers them."""
        while len(self._unread) > leave:
            ready, drawn, drafts = self._unread.popleft()
            result, scores = jax.device_get((drawn.result, drawn.scores))
            tokens, count, finite = result[:, :-2].tolist(), result[:, -2].tolist(), result[:, -1].tolist()
            for i, r in enumerate(ready):
                r.pending -= 1
                r.finite = r.finite and bool(finite[i])
                if r.ended:
                    if not r.pending:
                        self._give_back(r)
                    continue
                if not finite[i] and drafts:
                    # Perhaps of a draft alone, which would be rejected: attention reads its place as zero times NaN.
                    r.request.takes_drafts = False
                    self._preempt(r)
                    continue
                if not finite[i]:
                    self._fail(r, "the logits are not finite: the weights or an activation hold NaN or infinity")
                    continue
                if drafts and not r.request.constrained:
                    self._count_drafts(r, count[i] - 1, drafts)
                self._hand_out(r, tokens[i][: count[i]], None if scores is None else (scores, i))

    def _count_drafts(self, r: _Running, accepted: int, drafts: int) -> None:
        self._counts.update(drafts=1, draft_tokens=drafts, accepted_tokens=accepted)
        for acceptance in (r.acceptance, self.speculation.acceptance):
            acceptance.add(accepted)
        for position in range(accepted):
            self._accepted_at[position] += 1

    def _hand_out(self, r: _Running, tokens: list[int], scores: tuple[Any, int] | None) -> None:
        """Delivers new tokens to a text, up to the one that ends it."""
        request = r.request
        finish, stop = None, None
        for at, token in enumerate(tokens):
            request.text.append(token)
            if request.grammar is not None and not request.grammar.finished:
                try:
                    request.grammar.accept(token)
                except ValueError as error:
                    return self._refuse(r, str(error))
            if token in request.sampling.stop_token_ids or (token in self._ends and not request.sampling.ignore_eos):
                finish, stop = "stop", token
            elif len(request.text) >= request.max_new_tokens:
                finish = "length"
            if finish:
                tokens = tokens[: at + 1]
                break
        self._counts["tokens"] += len(tokens)
        step = Step(tokens, cached_tokens=request.cached, finish_reason=finish, stop_token=stop)
        if scores is not None and request.logprobs is not None:
            step.logprobs = _scores(*scores, tokens, request.logprobs)
        if request.prompt_logprobs is not None and not request.was_scored:
            step.prompt_logprobs, request.was_scored = request.prompt_scores, True
        if finish:
            self.pages.publish([*request.prompt, *request.text][:-1], r.pages)
            self._release(r)
        request.put(step)

    def _refuse(self, r: _Running, message: str) -> None:
        """Ends a request whose grammar can't be followed any further."""
        self._release(r)
        r.request.put(Step([], error=message))

    def _fail(self, r: _Running, message: str) -> None:
        """Fails a request."""
        self._release(r)
        r.request.put(Step([], error=message))


def _sizes(config: EngineConfig, limit: int, ahead: int, page_bytes: float, free: int | None) -> tuple[int, int]:
    """Tokens of the longest text, and pages of the cache.

    limit: the model's range. ahead: additional tokens that a text needs room for. free: bytes of memory, if known.
    Raises ConfigError if there is no room for one text.
    """

    def pages_of(length: int) -> int:
        return -(-(length + ahead) // PAGE)

    length, said = config.max_length or limit, f"cache_tokens is {config.cache_tokens}"
    if config.cache_tokens is not None:
        pages = -(-config.cache_tokens // PAGE)
    elif free is None:
        pages = max(config.max_batch * pages_of(length) // 4, pages_of(length))
    else:
        room = int(config.cache_share * free / page_bytes)
        said = f"cache_share ({config.cache_share}) of the {free / 2**30:.1f} GiB that are free is {room * PAGE} tokens"
        if config.max_length is None:
            length = max(min(length, room * PAGE - ahead), 2)
        pages = min(config.max_batch * pages_of(length), room)
    if pages < pages_of(length):
        raise ConfigError(f"{said}: one text of max_length ({length}) needs {pages_of(length) * PAGE}")
    return length, pages


def _mesh_of(variables: Any) -> Any:
    """The mesh that weights are spread over, if they are."""
    of = (getattr(x, "sharding", None) for x in jax.tree.leaves(variables))
    return next((s.mesh for s in of if isinstance(s, NamedSharding) and s.mesh.size > 1), None)


def _free_memory(devices: Collection[jax.Device]) -> int | None:
    """Bytes, on the device that has the fewest: of a CPU a quarter of the machine's; None where that isn't known."""
    stats = [d.memory_stats() for d in devices]
    told = [s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s]
    if not told and all(d.platform == "cpu" for d in devices):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            told = [int(lines["MemAvailable"].split()[0]) * 1024 // 4]  # what is free, or a cache of files
    return min(told, default=None)


def _buckets(most: int, factor: int) -> list[int]:
    """Sizes that programs are compiled for: the largest, and powers of the factor below, but not one by an eighth.

    A length of a power of two takes one more page than that.
    """
    sizes, size = [], 1
    while size + size // 8 < most:
        sizes.append(size)
        size *= factor
    return [*sizes, most]


def _scores(scores: steps.Scores, row: int, tokens: Sequence[int], most: int) -> list[Score]:
    """Returns the scores of a row's first tokens, with `most` alternatives."""
    of_row = jax.device_get(jax.tree.map(lambda x: x[row], scores))
    ids, values = of_row.ids[:, :most].tolist(), of_row.values[:, :most].tolist()
    return [
        (token, float(of_row.token[i]), list(zip(ids[i], values[i], strict=True))) for i, token in enumerate(tokens)
    ]
