"""The engine: what a request says is its own, whatever else runs, however passes are cut, and whoever has to wait.

Expected tokens come from whole passes without any cache, so that the engine agrees with the model and not with itself.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_runs import NATIVE_PAGE, check, check_all, ids, random_requests, request, run
from small_models import VARIANTS, random_ids, random_model, small_config
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.engine.engine import Engine
from yuanmoe.engine.score import score
from yuanmoe.errors import ContextLengthError, UsageError
from yuanmoe.model.router import Routing
from yuanmoe.ops import native
from yuanmoe.routing import expert_load as load


@settings(max_examples=7)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, NATIVE_PAGE]),
    max_batch_size=st.integers(2, 5),
    spare_tokens=st.sampled_from([2, 20, 150]),
    spare_pages=st.integers(0, 5),
)
def test_what_a_request_says_depends_on_it_alone(seed, page_size, max_batch_size, spare_tokens, spare_pages):
    model = random_model(small_config())
    rng = random.Random(seed)
    requests = random_requests(rng, 7)
    engine = Engine(
        model,
        page_size=page_size,
        max_batch_size=max_batch_size,
        step_tokens=max_batch_size + spare_tokens,
        cache_tokens=(63 // page_size + 1 + spare_pages) * page_size,
    )
    check_all(model, requests, run(engine, requests, rng))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_layer_can_be_served(variant):
    model = random_model(small_config(**VARIANTS[variant]))
    requests = random_requests(random.Random(0), 4)
    check_all(model, requests, run(Engine(model), requests))


def test_who_gives_way_goes_on_as_if_nothing_had_been():
    model = random_model(small_config())
    engine = Engine(model, page_size=4, cache_tokens=48, max_batch_size=4, step_tokens=20)
    requests = [request(random_ids(12).tolist(), 20, temperature=0.8, seed=n, presence_penalty=1.0) for n in range(4)]
    check_all(model, requests, run(engine, requests))
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("page_size", [4, NATIVE_PAGE])
def test_what_lies_in_unused_slots_does_not_matter(page_size):
    model = random_model(small_config())
    engine = Engine(model, page_size=page_size, cache_tokens=256)
    cache = engine._runner._cache
    for slots in (*cache.keys, *cache.values):
        slots.values.fill_(torch.nan)
    requests = random_requests(random.Random(2), 4)
    check_all(model, requests, run(engine, requests))


def test_a_conversation_continues_where_its_last_answer_ended():
    model = random_model(small_config())
    engine = Engine(model, page_size=4, cache_tokens=200)
    first = request(random_ids(10).tolist(), 12)
    (said,) = run(engine, [first])
    second = request([*first.prompt_ids, *ids(said), 3, 4, 5], 5)
    (answer,) = run(engine, [second])
    check(model, second, answer)
    # All but the last token of the answer was computed: 21 tokens, 5 pages.
    assert [output.reused_tokens for output in answer] == [20] * 5
    assert engine.stats().computed_tokens == 21 + 25 - 20 + 4


def test_several_answers_to_one_prompt_read_it_once():
    model = random_model(small_config())
    engine = Engine(model, page_size=4, cache_tokens=400)
    prompt = random_ids(42).tolist()
    requests = [request(prompt, 3, temperature=1.0, seed=seed) for seed in range(5)]
    check_all(model, requests, run(engine, requests))
    assert engine.stats().reused_tokens == 4 * 40
    assert engine.stats().computed_tokens == 42 + 4 * 2 + 5 * 2


@pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_a_quantized_model_answers_bit_for_bit_the_same_in_any_company(tmp_path, kv_dtype):
    config = small_config(hidden_size=64, moe_intermediate_size=64, head_dim=32)
    save_native(random_model(config).bfloat16().state_dict(), config, tmp_path / "whole")
    quantize_checkpoint(tmp_path / "whole", tmp_path / "packed", bits=4)
    model = load_model(tmp_path / "packed", kv_dtype=kv_dtype)
    beginning = random_ids(NATIVE_PAGE).tolist()
    requests = [request(random_ids(29).tolist(), 37, temperature=0.5 * seed, seed=seed) for seed in range(2)]
    requests += [request([*beginning, *random_ids(29).tolist()], 6) for _ in range(2)]
    by_itself = [run(Engine(model), [each])[0] for each in requests]
    engine = Engine(model, cache_tokens=6 * NATIVE_PAGE, max_batch_size=5, step_tokens=17)
    together = run(engine, requests)
    stats = engine.stats()
    assert stats.reused_tokens > 0
    assert stats.preemptions > 0
    assert [[(o.token_id, o.logprob) for o in outputs] for outputs in together] == [
        [(o.token_id, o.logprob) for o in outputs] for outputs in by_itself
    ]


def test_keys_and_values_in_8_bits_stay_close():
    model = random_model(small_config(initializer_range=0.1))
    requests = [request(random_ids(20).tolist(), 4) for _ in range(3)]
    exact, rounded = (run(Engine(model, kv_dtype=dtype), requests) for dtype in (None, torch.int8))
    assert rounded != exact
    for mine, theirs in zip(exact, rounded, strict=True):
        assert mine[0].logprob == pytest.approx(theirs[0].logprob, abs=0.05)


def test_routing_is_that_of_the_token_that_was_read():
    model = random_model(small_config(num_experts=(5, 0, 3), num_hidden_layers=3))
    requests = [request(random_ids(n).tolist(), 4, routing=n > 3) for n in (3, 8, 11)]
    engine = Engine(model, step_tokens=64, max_batch_size=2)
    said = run(engine, requests)
    assert all(output.routing is None for output in said[0])
    for each, outputs in zip(requests[1:], said[1:], strict=True):
        whole = model(torch.tensor([[*each.prompt_ids, *ids(outputs)]])).routings
        for place, output in enumerate(outputs, start=len(each.prompt_ids) - 1):
            assert output.routing.experts.tolist() == [layer.experts[place].tolist() for layer in whole]
            torch.testing.assert_close(output.routing.weights, torch.stack([layer.weights[place] for layer in whole]))


def test_visits_are_counted_before_they_pile_up(monkeypatch):
    monkeypatch.setattr(load, "COUNT_TOKENS", 5)
    counted = load.ExpertLoad((2, 0, 3), torch.device("cpu"))
    visits = torch.tensor([[0], [1], [1]]), torch.tensor([[2], [2], [0]])
    one, other = (Routing(torch.ones(3, 1), experts, torch.zeros(3, 3)) for experts in visits)
    for passes in range(1, 4):
        counted.add((one, other))
        assert counted._num_uncounted == 3 * (passes % 2)
    assert counted.counts().tolist() == [[3, 6, 0], [3, 0, 6]]


def test_the_load_of_the_experts_counts_every_visit():
    model = random_model(small_config(num_experts=(5, 0, 3), num_hidden_layers=3))
    engine = Engine(model)
    prompt = random_ids(9).tolist()
    (said,) = run(engine, [request(prompt, 3)])
    whole = model(torch.tensor([[*prompt, *ids(said)[:-1]]])).routings
    expected = [torch.bincount(layer.experts.flatten(), minlength=5).tolist() for layer in whole]
    assert engine.stats().expert_load.tolist() == expected
    assert Engine(random_model(small_config(num_experts=0))).stats().expert_load.shape == (0, 0)


@pytest.mark.parametrize("spare_tokens", [0, 7, 500])
def test_prompts_are_scored_as_score_does(spare_tokens):
    model = random_model(small_config())
    engine = Engine(model, page_size=4, cache_tokens=160, max_batch_size=4, step_tokens=4 + spare_tokens)
    beginning = random_ids(30).tolist()
    requests = [
        request([*beginning, *random_ids(n).tolist()], 20, prompt_logprobs=n != 1, top_logprobs=3 * (n == 9))
        for n in (1, 5, 9, 12)
    ]
    unscored, *scored = run(engine, requests)
    assert unscored[0].prompt is None
    for each, outputs in zip(requests[1:], scored, strict=True):
        assert outputs[0].prompt.logprobs == pytest.approx(score(model, each.prompt_ids), abs=1e-4)
        assert all(output.prompt is None for output in outputs[1:])
        check(model, each, outputs)
    tops = scored[1][0].prompt.top
    assert [len(top) for top in tops] == [3] * 38
    whole = model(torch.tensor([requests[2].prompt_ids])).logits[0].log_softmax(dim=-1)
    assert [top[0][0] for top in tops] == whole[:-1].argmax(dim=-1).tolist()


def test_a_prompt_of_one_token_has_no_scores():
    (said,) = run(Engine(random_model(small_config())), [request([3], 1, prompt_logprobs=True)])
    assert said[0].prompt == ([], [])


def test_the_likeliest_tokens_are_named_beside_the_one_that_was_taken():
    model = random_model(small_config())
    requests = [request(random_ids(5).tolist(), 3, top_logprobs=n, temperature=2.0, seed=n) for n in (0, 2, 20)]
    for each, outputs in zip(requests, run(Engine(model), requests), strict=True):
        said = list(each.prompt_ids)
        for output in outputs:
            expected = model(torch.tensor([said])).logits[0, -1].log_softmax(dim=-1)
            values, tokens = expected.topk(max(each.top_logprobs, 1))
            assert [token for token, _ in output.top_logprobs] == tokens.tolist()[: each.top_logprobs]
            assert [value for _, value in output.top_logprobs] == pytest.approx(
                values.tolist()[: each.top_logprobs], abs=1e-4
            )
            assert output.logprob == pytest.approx(expected[output.token_id].item(), abs=1e-4)
            said.append(output.token_id)


class Alternating:
    """Even and odd tokens in turn, then `<eod>`."""

    def __init__(self, length: int) -> None:
        self.said: list[int] = []
        self._length = length

    def mask(self) -> torch.Tensor:
        allowed = torch.arange(32) % 2 == len(self.said) % 2
        allowed[0] = False
        if len(self.said) == self._length:
            allowed = torch.arange(32) == 0
        return allowed

    def accept(self, token_id: int) -> None:
        self.said.append(token_id)


def test_a_grammar_decides_what_may_come_also_for_who_gave_way():
    model = random_model(small_config())
    engine = Engine(model, page_size=4, cache_tokens=48, max_batch_size=4, step_tokens=20)
    grammars = [Alternating(9 + n) for n in range(3)]
    requests = [
        request(random_ids(12).tolist(), 20, constraint=grammar, temperature=1.0, seed=n, stop_ids=(0,))
        for n, grammar in enumerate(grammars)
    ]
    free = request(random_ids(12).tolist(), 20)
    *bound, unbound = run(engine, [*requests, free])
    assert engine.stats().preemptions > 0
    for n, (grammar, outputs) in enumerate(zip(grammars, bound, strict=True)):
        assert ids(outputs) == grammar.said
        assert [token % 2 for token in grammar.said] == [place % 2 for place in range(9 + n)] + [0]
        assert outputs[-1].finish_reason == "stop"
    check(model, free, unbound)


def test_rows_beyond_the_tokenizer_are_never_sampled():
    model = random_model(small_config())
    hot = request(random_ids(5, vocab_size=10).tolist(), 20, temperature=50.0, seed=1)
    assert max(ids(run(Engine(model), [hot])[0])) > 9
    assert max(ids(run(Engine(model, vocab_size=10), [hot])[0])) <= 9


def test_without_a_limit_the_context_is_filled_or_the_cache():
    model = random_model(small_config(max_position_embeddings=20))
    unlimited = request(random_ids(13).tolist(), None)
    for engine, length in ((Engine(model), 20), (Engine(model, page_size=4, cache_tokens=16), 17)):
        (said,) = run(engine, [unlimited])
        assert 13 + len(said) == length
        assert said[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"prompt": []}, UsageError, "the prompt is empty; the model needs a token to start from"),
        ({"prompt": [3, 32]}, UsageError, "the prompt holds the token id 32; ids are 0..31"),
        ({"prompt": [3] * 125}, ContextLengthError, "the prompt has 125 tokens; with 6 new ones it exceeds the"),
        ({"prompt": [3] * 60}, ContextLengthError, r"the prompt has 60 tokens; with 6 new ones it exceeds the 64 "
         r"that the cache holds \(cache_tokens\); shorten it, ask for fewer \(max_new_tokens\), or make more room"),
        ({"prompt": [3] * 65, "max_new_tokens": None}, ContextLengthError, "with 63 new ones it exceeds the 64 that"),
        ({"prompt": [3], "logit_bias": {32: 1.0}}, UsageError, "logit_bias names the token id 32; ids are 0..31"),
        ({"prompt": [3], "top_logprobs": 21}, UsageError, "top_logprobs is 21; it must be between 0 and 20"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_anything_is_spent(wrong, error, message):
    engine = Engine(random_model(small_config()), cache_tokens=64)
    with pytest.raises(error, match=message):
        engine.submit(request(**wrong))
    assert not engine.has_work
    assert engine.step() == []
    # The last token of an answer needs no room.
    engine.submit(request([3] * 59))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "page_size is 0 and max_batch_size 64; both must be at least 1"),
        ({"max_batch_size": 0}, "max_batch_size 0; both must be at least 1"),
        ({"max_batch_size": 9, "step_tokens": 8}, "step_tokens 8 is below max_batch_size 9; a pass needs a token"),
        ({"cache_tokens": 31}, r"cache_tokens 31 is not one page of 32 \(page_size\)"),
        ({"kv_dtype": torch.int64}, "keys and values in torch.int64"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_one_another_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Engine(random_model(small_config()), **options)
