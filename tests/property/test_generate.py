"""Generation: what a sequence says depends on its prompt alone, however the work is cut, and stays in the context."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_models import EOD, VARIANTS, VOCABULARY, random_ids, random_model, small_config
from yuanmoe.engine.generate import Generation
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.engine.score import score, windows
from yuanmoe.errors import ContextLengthError, UsageError

NEW_TOKENS = 6
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def say(model, prompts, params=None, **options):
    """The tokens of each prompt's continuation."""
    generation = Generation(model, prompts, params or SamplingParams(max_new_tokens=NEW_TOKENS), **options)
    said = [[] for _ in prompts]
    for token in generation:
        said[token.sequence].append(token)
    return said


def ids(tokens):
    return [token.token_id for token in tokens]


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_to_right_is_the_argmax_of_whole_passes(variant):
    model = random_model(small_config(**VARIANTS[variant]))
    prompt = random_ids(7).tolist()
    (said,) = say(model, [prompt])
    whole = list(prompt)
    for token in said:
        logits = model(torch.tensor([whole])).logits[0, -1]
        assert token.token_id == int(logits.argmax())
        assert token.logprob == pytest.approx(logits.log_softmax(dim=-1)[token.token_id].item(), abs=1e-4)
        whole.append(token.token_id)
    assert len(said) == NEW_TOKENS


@settings(max_examples=12)
@given(lengths=LENGTHS, chunk_size=st.integers(1, 40), sampled=st.booleans(), data=st.data())
def test_neighbours_order_and_chunks_change_nothing(lengths, chunk_size, sampled, data):
    model = random_model(small_config())
    prompts = [random_ids(length).tolist() for length in lengths]
    settings_of = [
        SamplingParams(temperature=sampled * 0.8, seed=row, max_new_tokens=row + 2, stop_ids=(row,), top_p=0.9)
        for row in range(len(prompts))
    ]
    order = data.draw(st.permutations(range(len(prompts))))
    alone = [ids(say(model, [prompts[row]], settings_of[row])[0]) for row in order]
    together = say(model, [prompts[r] for r in order], [settings_of[r] for r in order], chunk_size=chunk_size)
    assert [ids(tokens) for tokens in together] == alone


def test_a_stop_token_is_the_last_and_the_others_go_on():
    model = random_model(small_config())
    prompts = [random_ids(4).tolist(), random_ids(9).tolist()]
    free = [ids(tokens) for tokens in say(model, prompts)]
    stop = free[0][1]
    cut = say(
        model, prompts, [SamplingParams(max_new_tokens=NEW_TOKENS, stop_ids=(stop,)), SamplingParams(max_new_tokens=3)]
    )
    end = free[0].index(stop) + 1
    assert ids(cut[0]) == free[0][:end]
    assert ids(cut[1]) == free[1][:3]
    assert [token.finish_reason for token in cut[0]] == [None] * (end - 1) + ["stop"]
    assert [token.finish_reason for token in cut[1]] == [None, None, "length"]


@pytest.mark.parametrize("routing", [False, True])
def test_a_sequence_stopped_from_outside_says_nothing_more(routing):
    model = random_model(small_config())
    prompts = [random_ids(4).tolist(), random_ids(9).tolist()]
    free = say(model, prompts)
    generation = Generation(model, prompts, SamplingParams(max_new_tokens=NEW_TOKENS), routing=routing)
    said = [[], []]
    for token in generation:
        said[token.sequence].append(token.token_id)
        if len(said[0]) == 2:
            generation.stop(0)
    assert said == [ids(free[0])[:2], ids(free[1])]
    # The first tokens are prefill's; with routing the next token was chosen already when one is shown.
    assert generation.timing.decode_tokens == 2 + NEW_TOKENS - 2 + routing


def test_routing_is_that_of_each_token_as_it_passed():
    model = random_model(small_config(num_experts=(5, 0, 3), num_hidden_layers=3))
    prompts = [random_ids(3).tolist(), random_ids(8).tolist()]
    lengths = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=5)]
    plain = [ids(tokens) for tokens in say(model, prompts, lengths)]
    for prompt, tokens, expected in zip(prompts, say(model, prompts, lengths, routing=True), plain, strict=True):
        assert ids(tokens) == expected
        whole = model(torch.tensor([prompt + expected])).routings
        for place, token in enumerate(tokens[:-1], start=len(prompt)):
            assert token.routing.experts.tolist() == [layer.experts[place].tolist() for layer in whole]
            torch.testing.assert_close(token.routing.weights, torch.stack([layer.weights[place] for layer in whole]))
        assert tokens[-1].routing is None


def test_a_dense_model_has_no_routing():
    model = random_model(small_config(num_experts=0))
    assert all(token.routing is None for token in say(model, [[3, 4]], routing=True)[0])


def test_rows_beyond_the_tokenizer_are_never_sampled():
    model = random_model(small_config())
    prompts = [random_ids(5, vocab_size=10).tolist()]
    hot = SamplingParams(temperature=50.0, seed=1, max_new_tokens=20)
    assert max(ids(say(model, prompts, hot)[0])) > 9
    assert max(ids(say(model, prompts, hot, vocab_size=10)[0])) <= 9


def test_without_a_limit_the_context_is_filled():
    model = random_model(small_config(max_position_embeddings=20))
    (said,) = say(model, [random_ids(13).tolist()], SamplingParams())
    assert len(said) == 7
    assert said[-1].finish_reason == "length"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_cache_has_the_dtype_of_the_model(dtype):
    model = random_model(small_config()).to(dtype)
    assert len(say(model, [[3, 4, 5]])[0]) == NEW_TOKENS


def test_timing_counts_every_token():
    model = random_model(small_config())
    generation = Generation(model, [[3], [4, 5]], SamplingParams(max_new_tokens=4))
    assert (generation.timing.prefill_tokens_per_s, generation.timing.decode_tokens_per_s) == (0, 0)
    assert len(list(generation)) == 8
    timing = generation.timing
    assert (timing.prefill_tokens, timing.decode_tokens) == (3, 6)
    assert timing.prefill_tokens_per_s == pytest.approx(3 / timing.prefill_s)
    assert timing.decode_tokens_per_s == pytest.approx(6 / timing.decode_s)


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        ([[3] * 15], {"max_new_tokens": 10}, ContextLengthError, "the prompt has 15 tokens; with 10 new ones it exceed"
         r"s the model's context of 20 \(max_position_embeddings\); shorten it by 5 tokens, or ask for at most 5"),
        ([[3], [3] * 20], {"max_new_tokens": 1}, ContextLengthError, "prompt 1 has 20 tokens.*shorten it by 1 tokens$"),
        ([[3] * 25], {}, ContextLengthError, "the prompt has 25 tokens; with 1 new ones.*shorten it by 6 tokens$"),
        ([[3], []], {}, UsageError, "prompt 1 is empty; the model needs a token to start from, such as <eod>"),
        ([[3, VOCABULARY]], {}, UsageError, "the prompt holds the token id 32; ids are 0..31"),
        ([[-1]], {}, UsageError, "the prompt holds the token id -1"),
        ([], {}, UsageError, "0 prompts"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_continued_are_refused_before_any_work(prompts, params, error, message):
    model = random_model(small_config(max_position_embeddings=20))
    model.model.forward = None
    with pytest.raises(error, match=message):
        Generation(model, prompts, SamplingParams(**params))


def test_other_arguments_are_checked_too():
    model = random_model(small_config())
    with pytest.raises(UsageError, match="1 prompts and 2 sets of sampling parameters; give one for each"):
        Generation(model, [[3]], [SamplingParams()] * 2)
    with pytest.raises(UsageError, match="chunk_size is 0; it must be at least 1"):
        Generation(model, [[3]], chunk_size=0)


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_scores_are_the_log_probabilities_of_a_whole_pass(chunk_size):
    model = random_model(small_config())
    text = random_ids(30)
    whole = model(text[None]).logits[0].log_softmax(dim=-1)
    expected = whole[:-1].gather(1, text[1:, None])[:, 0]
    assert score(model, text.tolist(), chunk_size=chunk_size) == pytest.approx(expected.tolist(), abs=1e-4)


def test_scores_of_a_long_text_are_those_of_its_windows():
    model = random_model(small_config(max_position_embeddings=10))
    text = random_ids(23).tolist()
    scores = score(model, text)
    assert len(scores) == 22
    assert scores[:9] == pytest.approx(score(model, text[:10]), abs=1e-5)
    assert scores[9:14] == pytest.approx(score(model, text[5:15])[4:], abs=1e-5)


@given(length=st.integers(2, 200), context=st.integers(2, 40))
def test_windows_score_each_token_once_and_see_half_a_context(length, context):
    scored = [place for _, first, stop in windows(length, context) for place in range(first, stop)]
    assert scored == list(range(1, length))
    for start, first, stop in windows(length, context):
        assert 0 <= start < first < stop
        assert stop - start <= context
        assert start == 0 or first - start >= context // 2


def test_one_token_has_no_score():
    with pytest.raises(UsageError, match="1 tokens: at least 2 are needed"):
        score(random_model(small_config()), [EOD])
