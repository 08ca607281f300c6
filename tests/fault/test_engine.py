"""What fails in one request, or in a pass, ends just that; cancelling frees at once; nothing is left behind."""

import random

import pytest
import torch

from small_models import random_ids, random_model, small_config
from yuanmoe.engine.engine import Engine
from yuanmoe.engine.requests import Request
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.errors import CheckpointError, UsageError

POISON = 31
"""A token whose embedding is not a number."""


def poisoned_model(**changes):
    model = random_model(small_config(tie_word_embeddings=False, **changes))
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    return model


def request(prompt, constraint=None, **params):
    return Request(prompt_ids=prompt, params=SamplingParams(**{"max_new_tokens": 6} | params), constraint=constraint)


def finish(engine: Engine) -> dict[int, list]:
    outputs: dict[int, list] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def said(outputs):
    return [output.token_id for output in outputs]


def check_empty(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.queued, stats.running, stats.used_pages) == (0, 0, 0)
    assert stats.free_pages == engine._schedule.pages.num_pages


@pytest.mark.parametrize("page_size", [4, 32])
def test_scores_that_are_no_numbers_end_their_request_and_no_other(page_size):
    model = poisoned_model()
    prompts = [random_ids(n, vocab_size=POISON).tolist() for n in (5, 9, 40)]
    expected = []
    for prompt in prompts:
        engine = Engine(model, vocab_size=POISON)
        engine.submit(request(prompt, temperature=0.7, seed=1))
        expected.append(said(finish(engine)[0]))
    engine = Engine(model, page_size=page_size)
    # Its pages are full of NaN when the others take them over.
    engine.submit(request([POISON] * 60))
    for prompt in prompts:
        engine.submit(request(prompt, temperature=0.7, seed=1, logit_bias={POISON: -100}))
    outputs = finish(engine)
    (failed,) = outputs.pop(0)
    assert (failed.token_id, failed.finish_reason) == (-1, None)
    assert isinstance(failed.error, CheckpointError)
    assert "a sequence got scores that are not numbers: the weights are damaged" in str(failed.error)
    assert [said(each) for each in outputs.values()] == expected
    check_empty(engine)


class Grammar:
    def __init__(self, mask: torch.Tensor | Exception, accepted: int = 99) -> None:
        self._mask, self._left = mask, accepted

    def mask(self) -> torch.Tensor:
        if isinstance(self._mask, Exception):
            raise self._mask
        return self._mask

    def accept(self, token_id: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyError(token_id)


@pytest.mark.parametrize(
    ("grammar", "error", "message", "spoken"),
    [
        (Grammar(ValueError("no such rule")), ValueError, "no such rule", 0),
        (Grammar(torch.ones(32, dtype=torch.bool), 2), KeyError, r"\d", 2),
        (Grammar(torch.ones(7, dtype=torch.bool)), UsageError, r"a constraint's mask is \[7\] of torch.bool; it", 0),
        (Grammar(torch.ones(32)), UsageError, r"mask is \[32\] of torch.float32; it must be \[32\] bool", 0),
        (Grammar(torch.zeros(32, dtype=torch.bool)), UsageError, "the constraint allows no token, not even a stop", 0),
    ],
)  # fmt: skip
def test_a_failing_grammar_ends_its_request_and_no_other(grammar, error, message, spoken):
    model = random_model(small_config())
    alone = Engine(model)
    free = request(random_ids(9).tolist())
    alone.submit(free)
    engine = Engine(model)
    engine.submit(request(random_ids(5).tolist(), grammar))
    engine.submit(free)
    outputs = finish(engine)
    with pytest.raises(error, match=message):
        raise outputs[0][-1].error
    assert all(output.error is None for output in outputs[0][:-1])
    assert len(outputs[0]) == spoken + 1
    assert said(outputs[1]) == said(finish(alone)[0])
    check_empty(engine)


def test_a_failing_pass_ends_those_in_it_and_the_next_ones_are_served():
    model = random_model(small_config())
    engine = Engine(model, page_size=4, max_batch_size=2)
    prompts = [random_ids(10).tolist() for _ in range(3)]
    expected = []
    for prompt in prompts:
        alone = Engine(model)
        alone.submit(request(prompt))
        expected.append(said(finish(alone)[0]))
    for prompt in prompts:
        engine.submit(request(prompt))
    engine.step()
    # The second layer fails when the first has written its keys and values and moved its tails.
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
    failed = engine.step()
    hook.remove()
    assert [(output.request_id, str(output.error)) for output in failed] == [(0, "no more"), (1, "no more")]
    assert said(finish(engine)[2]) == expected[2]
    # What the failed ones had finished before is sound and can be reused.
    for prompt in prompts:
        engine.submit(request([*prompt]))
    assert [said(outputs) for outputs in finish(engine).values()] == expected
    assert engine.stats().reused_tokens == 3 * 8
    check_empty(engine)


def test_an_interrupted_pass_leaves_nothing_half_done():
    model = random_model(small_config())
    engine = Engine(model)
    engine.submit(request(random_ids(10).tolist()))
    engine.step()
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    check_empty(engine)


def test_cancelling_frees_at_once_wherever_the_request_is():
    engine = Engine(random_model(small_config()), page_size=4, max_batch_size=2, step_tokens=8, cache_tokens=128)
    ids = [engine.submit(request(random_ids(20).tolist())) for _ in range(3)]
    while engine.stats().running < 2:
        engine.step()
    used = engine.stats().used_pages
    assert engine.cancel(ids[2])
    assert (engine.stats().queued, engine.stats().used_pages) == (0, used)
    while engine.stats().generated_tokens < 2:
        engine.step()
    used = engine.stats().used_pages
    assert engine.cancel(ids[0])
    assert engine.stats().used_pages <= used - 5
    assert {output.request_id for output in engine.step()} <= {ids[1]}
    assert engine.cancel(ids[1])
    check_empty(engine)
    assert engine.step() == []
    assert not engine.cancel(ids[1])
    assert not engine.cancel(99)


@pytest.mark.parametrize("steps", [60, pytest.param(250, marks=pytest.mark.slow)])
def test_requests_that_end_in_every_way_leave_nothing_behind(steps):
    rng = random.Random(0)
    model = poisoned_model(num_hidden_layers=1, hidden_size=8, num_experts=0, intermediate_size=8, head_dim=4)
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(MemoryError) if rng.random() < 0.01 else None
    )
    engine = Engine(model, page_size=2, cache_tokens=100, max_batch_size=32, step_tokens=100)
    anything = torch.ones(32, dtype=torch.bool)
    ends = {"stop": 0, "length": 0, "error": 0, "cancel": 0}
    alive: set[int] = set()
    for _ in range(steps):
        for _ in range(rng.randint(0, 22)):
            grammar = rng.choice([Grammar(anything, rng.randint(1, 9)), Grammar(ValueError()), None, None, None])
            prompt = [rng.choice([1, 2, 3, 4]) for _ in range(rng.randint(1, 12))] + [POISON] * (rng.random() < 0.05)
            params = {
                "temperature": rng.choice([0.0, 1.0]),
                "stop_ids": (3, 9, 17),
                "max_new_tokens": rng.choice([1, 2, 30]),
                "seed": rng.randrange(2**32),
            }
            alive.add(engine.submit(request(prompt, grammar, logit_bias={POISON: -100}, **params)))
        for request_id in [each for each in sorted(alive) if rng.random() < 0.01]:
            assert engine.cancel(request_id)
            alive.discard(request_id)
            ends["cancel"] += 1
        for output in engine.step():
            assert output.request_id in alive
            end = "error" if output.error else output.finish_reason
            if end:
                ends[end] += 1
                alive.discard(output.request_id)
    for outputs in finish(engine).values():
        end = outputs[-1]
        ends["error" if end.error else end.finish_reason] += 1
    assert sum(ends.values()) == engine._submitted > 8 * steps
    assert min(ends.values()) > steps / 5
    assert engine.stats().preemptions > 0
    check_empty(engine)
