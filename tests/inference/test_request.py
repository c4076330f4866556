"""Results on their way from the engine's thread to a caller."""

import asyncio
import threading

from dsv3_jax.inference.request import Request, Step
from dsv3_jax.inference.sampling import Sampling

NONE = dict(seed=0, max_new_tokens=9, logprobs=None, prompt_logprobs=None, grammar=None)


def score(token):
    return token, -1.0, []


def received(steps):
    """Steps that a caller gets who looks after all of them have been put."""

    async def look():
        request = Request([1], Sampling(), **NONE)
        for step in steps:
            request.put(step)
        return [step async for step in request]

    return asyncio.run(look())


def test_steps_that_wait_come_as_one():
    first = Step([5], [score(5)], prompt_logprobs=[score(1)], cached_tokens=3)
    last = Step([6, 7], [score(6), score(7)], cached_tokens=3, finish_reason="stop", stop_token=7)
    assert received([first, last]) == [
        Step([5, 6, 7], [score(5), score(6), score(7)], [score(1)], 3, finish_reason="stop", stop_token=7)
    ]


def test_tokens_before_an_error_are_not_lost():
    failed = Step([], error="not finite")
    assert received([Step([5]), Step([6]), failed]) == [Step([5, 6]), failed]


def test_every_token_arrives_once_and_in_order():
    """From another thread, while callers look."""
    count, texts = 2000, 4

    async def all_tokens(request):
        return [token async for step in request for token in step.tokens]

    async def look():
        requests = [Request([1], Sampling(), **NONE) for _ in range(texts)]

        def put():
            for i in range(count):
                for request in requests:
                    request.put(Step([i], finish_reason="length" if i == count - 1 else None))

        thread = threading.Thread(target=put)
        thread.start()
        found = await asyncio.gather(*map(all_tokens, requests))
        thread.join()
        return found

    assert asyncio.run(look()) == [list(range(count))] * texts


def test_a_closed_loop_is_no_error():
    async def make():
        return Request([1], Sampling(), **NONE)

    request = asyncio.run(make())
    request.put(Step([5]))
    request.put(Step([6]))
