"""An engine that writes what a test tells it to: the server's own work, without a model."""

import asyncio
import dataclasses
import types

import numpy as np


@dataclasses.dataclass
class Step:
    tokens: list
    logprobs: list | None = None
    prompt_logprobs: list | None = None
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_token: int | None = None
    error: str | None = None


class ScriptedEngine:
    """Writes `script(prompt)`, a list of token ids, one per step; where there is a grammar, what that allows."""

    vocab_size, max_length, failure = 272, 200, None

    def __init__(self, tokenizer, script, end_id, pause=0.0):
        self.tokenizer, self.script, self.end_id, self.pause = tokenizer, script, end_id, pause
        self.requests, self.cancelled = [], []

    def submit(self, prompt, sampling, **how):
        request = types.SimpleNamespace(prompt=prompt, sampling=sampling, **how)
        self.requests.append(request)
        return self._steps(request)

    async def _steps(self, request):
        script = [*self.script(request.prompt)] if request.grammar is None else self._allowed(request)
        scored = request.prompt_logprobs is not None
        prompt = [(t, None if not i else -float(i), [(t, -float(i))]) for i, t in enumerate(request.prompt)]
        for n, token in enumerate(script):
            await asyncio.sleep(self.pause)
            if isinstance(token, Exception):
                yield Step([], error=str(token))
                return
            ends = token in (self.end_id, *request.sampling.stop_token_ids)
            full = n + 1 == request.max_new_tokens
            score = (token, -0.5, [(token, -0.5), (0, -2.0)][: request.logprobs])
            yield Step(
                [token],
                None if request.logprobs is None else [score],
                prompt if scored and n == 0 else None,
                finish_reason="stop" if ends else "length" if full else None,
                stop_token=token if ends else None,
            )
            if ends or full:
                return

    def _allowed(self, request):
        rng = np.random.default_rng(request.sampling.seed or 0)
        while True:
            bits = np.unpackbits(request.grammar.mask().view(np.uint8), bitorder="little")
            allowed = [int(i) for i in np.flatnonzero(bits)]
            closing = [i for i in allowed if chr(i) in '"}]0' or i == self.end_id]
            token = int(rng.choice(closing if closing and rng.random() < 0.5 else allowed))
            yield token
            if token == self.end_id:
                return
            request.grammar.accept(token)

    def cancel(self, request):
        self.cancelled.append(request)

    def stats(self):
        return types.SimpleNamespace(
            running=1,
            waiting=2,
            cache_usage=0.25,
            preemptions=3,
            prefix_queries=100,
            prefix_hits=40,
            drafts=10,
            draft_tokens=20,
            accepted_tokens=15,
            accepted_per_position=[9, 6],
            drafts_up_to=4,
            programs=27,
        )
