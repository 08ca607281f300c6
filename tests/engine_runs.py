"""Requests for an engine in tests, its outputs, and what they must be: what whole passes without any cache say."""

import random

import pytest
import torch

from yuanmoe.engine.engine import Engine
from yuanmoe.engine.requests import Request, RequestOutput
from yuanmoe.engine.sampling import Sampler, SamplingParams, sample

NATIVE_PAGE = 32
"""What the compiled attention takes; other sizes go through torch."""


@torch.inference_mode()
def check(model, request: Request, outputs: list[RequestOutput]) -> None:
    """That these outputs are what a request says by itself: each token follows from a whole pass over those before."""
    params, prompt, said = request.params, list(request.prompt_ids), ids(outputs)
    sampler = Sampler(params, prompt, model.config.vocab_size)
    rows = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    sampled = [sample(row[None], [sampler]) for row in rows]
    assert said == [each.ids[0] for each in sampled]
    assert [output.logprob for output in outputs] == pytest.approx([each.logprobs[0] for each in sampled], abs=1e-3)
    reasons = [None] * (len(said) - 1) + ["stop" if said[-1] in params.stop_ids else "length"]
    assert [output.finish_reason for output in outputs] == reasons
    assert not set(said[:-1]) & set(params.stop_ids)
    assert len(said) <= params.max_new_tokens
    assert reasons[-1] == "stop" or len(said) == params.max_new_tokens


def check_all(model, requests, outputs) -> None:
    for each, said in zip(requests, outputs, strict=True):
        check(model, each, said)


def run(engine: Engine, requests, rng: random.Random | None = None) -> list[list[RequestOutput]]:
    """The outputs of each request; with `rng` they arrive bit by bit."""
    outputs: dict[int, list[RequestOutput]] = {}
    left = list(requests)[::-1]
    while left or engine.has_work:
        while left and (rng is None or rng.random() < 0.4):
            outputs[engine.submit(left.pop())] = []
        for output in engine.step():
            if output.error is not None:
                raise output.error
            outputs[output.request_id].append(output)
    stats = engine.stats()
    assert (stats.queued, stats.running, stats.used_pages) == (0, 0, 0)
    return list(outputs.values())


def ids(outputs):
    return [output.token_id for output in outputs]


def request(
    prompt,
    max_new_tokens=6,
    *,
    top_logprobs=0,
    prompt_logprobs=False,
    routing=False,
    constraint=None,
    adapter=None,
    **params,
):
    return Request(
        prompt_ids=prompt,
        params=SamplingParams(max_new_tokens=max_new_tokens, **params),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        routing=routing,
        constraint=constraint,
        adapter=adapter,
    )


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Greedy and sampled, with and without penalties, some with a beginning in common; up to 63 tokens."""
    beginnings = [[], [rng.randint(1, 31) for _ in range(NATIVE_PAGE + 2)]]
    return [
        request(
            rng.choice(beginnings) + [rng.randint(1, 31) for _ in range(rng.randint(1, 9))],
            rng.choice([1, 3, 20]),
            temperature=rng.choice([0.0, 0.9]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            logit_bias=rng.choice([{}, {5: 3.0}]),
            seed=number,
            stop_ids=(rng.randint(0, 31),),
        )
        for number in range(count)
    ]
