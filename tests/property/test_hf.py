"""Under transformers a sequence computes the same wherever padding stands, however it is cut, cropped or reordered."""

import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from small_models import VARIANTS, configs, feed, greedy, random_ids, random_model, small_config
from yuanmoe.checkpoint.formats.official_config import official_config
from yuanmoe.hosts.hf import YuanConfig, YuanForCausalLM
from yuanmoe.model.state.cache import Cache

pytestmark = pytest.mark.usefixtures("no_grad")

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def assert_same(ours, theirs):
    """Equal logits up to float32 rounding; they spread by about 1 to 5."""
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


def shell_over(model) -> YuanForCausalLM:
    """The transformers model with the weights of `model`."""
    shell = YuanForCausalLM(YuanConfig(**official_config(model.config, torch.float32)))
    shell.load_state_dict(model.state_dict(), strict=not model.config.tie_word_embeddings)
    return shell.eval()


@st.composite
def padded_batches(draw):
    """A mask with holes anywhere, rows and passes of padding alone included, and cuts of its slots into passes."""
    rows, slots = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    mask = torch.tensor([[draw(st.integers(0, 1)) for _ in range(slots)] for _ in range(rows)])
    cuts = sorted(draw(st.sets(st.integers(1, slots), max_size=3)) - {slots})
    return mask, cuts


@settings(max_examples=60)
@given(configs(), padded_batches())
def test_padding_anywhere_and_passes_of_any_length_change_nothing(config, batch):
    mask, cuts = batch
    model = random_model(config)
    shell = shell_over(model)
    ids = random_ids(*mask.shape)
    alone = {
        at: model(row[keep == 1][None]).logits[0]
        for at, (row, keep) in enumerate(zip(ids, mask, strict=True))
        if keep.any()
    }
    results = [shell(ids, attention_mask=mask, use_cache=False).logits] if alone else []
    cache, parts = None, []
    for start, stop in zip([0, *cuts], [*cuts, mask.shape[1]], strict=True):
        out = shell(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    for logits in (*results, torch.cat(parts, dim=1)):
        for at, expected in alone.items():
            assert_same(logits[at, mask[at] == 1], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(variant):
    model = random_model(small_config(**VARIANTS[variant]))
    shell = shell_over(model)
    prompts = [random_ids(length) for length in (1, 6, 4)]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=0, padding_side="left")
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    said = greedy(model, prompts, 8)
    for use_cache in (True, False):
        batch = shell.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **GREEDY)
        assert batch[:, 6:].tolist() == said
    assert (
        shell.generate(ids, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=2, **GREEDY)[:, 6:].tolist()
        == said
    )
    sampled = shell.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, top_k=1, eos_token_id=None)
    assert sampled[:, 6:].tolist() == said


def best_beams(model, prompt, num_beams: int, new_tokens: int) -> list[int]:
    """Beam search as it is defined, over the package's own cache."""
    cache = Cache(model.config, 1, len(prompt) + new_tokens, dtype=torch.float32)
    scores = feed(model, cache, [prompt])[0][-1].log_softmax(-1)[None]
    beams: list[list[int]] = [[]]
    for _ in range(new_tokens):
        best, places = scores.flatten().topk(num_beams)
        rows, tokens = (places // scores.shape[1]).tolist(), (places % scores.shape[1]).tolist()
        beams = [[*beams[row], token] for row, token in zip(rows, tokens, strict=True)]
        cache.select(rows)
        if len(beams[0]) < new_tokens:
            logits = feed(model, cache, [torch.tensor([token]) for token in tokens])
            scores = best[:, None] + torch.cat(logits).log_softmax(-1)
    return beams[0]


@pytest.mark.parametrize("variant", ["m32", "dense", "no LFA"])
def test_beams_of_a_padded_batch_are_those_of_a_search_written_out(variant):
    model = random_model(small_config(**VARIANTS[variant]))
    prompts = [random_ids(length) for length in (3, 5)]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=0, padding_side="left")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = shell_over(model).generate(ids, attention_mask=mask, num_beams=4, max_new_tokens=7, **GREEDY)
    expected = [best_beams(model, prompt, 4, 7) for prompt in prompts]
    assert expected != greedy(model, prompts, 7), "beams that only repeat the greedy answer show nothing"
    assert found[:, 5:].tolist() == expected


@settings(max_examples=20)
@given(configs(), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3))
def test_a_cropped_cache_goes_on_as_if_nothing_had_been_there(config, prompt_length, discarded, drafted):
    discarded = min(discarded, drafted)
    shell = shell_over(random_model(config))
    text, draft = random_ids(2, prompt_length + drafted + 2), random_ids(2, discarded)
    kept = prompt_length + drafted - discarded
    cache = DynamicCache(config=shell.config)
    cache.activate_past_recording()
    shell(text[:, :prompt_length], past_key_values=cache)
    cache.crop(0)
    shell(torch.cat([text[:, prompt_length:kept], draft], dim=1), past_key_values=cache)
    cache.crop(-discarded)
    assert_same(shell(text[:, kept:], past_key_values=cache).logits, shell(text).logits[:, kept:])


@pytest.mark.parametrize("variant", ["m32", "dense", "no LFA"])
def test_assisted_generation_says_what_greedy_says(variant):
    model = random_model(small_config(**VARIANTS[variant]))
    shell = shell_over(model)
    prompt = random_ids(4).repeat(3)
    said = greedy(model, [prompt], 16)
    given = {"input_ids": prompt[None], "attention_mask": torch.ones(1, 12), "max_new_tokens": 16}
    assert shell.generate(**given, prompt_lookup_num_tokens=3, **GREEDY)[:, 12:].tolist() == said
    for assistant in (shell, shell_over(random_model(small_config(), seed=1))):
        assisted = shell.generate(**given, assistant_model=assistant, **GREEDY)
        assert assisted[:, 12:].tolist() == said


@settings(max_examples=20)
@given(configs(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_position_ids_that_restart_keep_documents_apart(config, lengths):
    shell = shell_over(random_model(config))
    documents = [random_ids(length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = shell(torch.cat(documents)[None], position_ids=positions, use_cache=False).logits[0]
    assert_same(packed, torch.cat([shell(document[None]).logits[0] for document in documents]))


def test_embeddings_in_place_of_ids_and_positions_that_are_given():
    shell = shell_over(random_model(small_config()))
    ids = random_ids(2, 6)
    expected = shell(ids).logits
    embeds = shell.get_input_embeddings()(ids)
    assert_same(shell(inputs_embeds=embeds).logits, expected)
    assert torch.equal(
        shell.generate(inputs_embeds=embeds, max_new_tokens=4, **GREEDY),
        shell.generate(ids, max_new_tokens=4, **GREEDY)[:, 6:],
    )
    assert_same(shell(ids, position_ids=torch.arange(6)[None] + 7).logits, expected)  # rotary angles are relative
    assert not torch.allclose(shell(ids, position_ids=torch.arange(6)[None] * 2, use_cache=True).logits, expected)
