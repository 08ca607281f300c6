"""A quantized model computes each token alone: no batch, chunk or thread count changes a bit of it.

And int8 keys and values stay within half a step.

Legend: B sequences, T slots, H heads, C head channels.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_models import VARIANTS, feed, random_ids
from small_quantized import OFFICIAL, SOURCES, quantized
from yuanmoe.engine.generate import Generation
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.model.state.key_values import Slots, attend
from yuanmoe.ops import native

NEW_TOKENS = 4


def greedy(model, prompts, **options):
    """What is said to each prompt."""
    said = [[] for _ in prompts]
    ids = [prompt.tolist() for prompt in prompts]
    for token in Generation(model, ids, SamplingParams(max_new_tokens=NEW_TOKENS), **options):
        said[token.sequence].append(token.token_id)
    return said


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=6)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    source=st.sampled_from(SOURCES),
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    chunk_size=st.integers(2, 30),
    seed=st.integers(0, 9),
)
def test_greedy_answers_depend_on_no_batch_and_no_chunks(bits, variant, source, lengths, chunk_size, seed):
    torch.manual_seed(seed)
    source = source if source != "gptq" or variant in OFFICIAL else "float16"
    model, prompts = quantized(variant, bits, source), [random_ids(length) for length in lengths]
    alone = [greedy(model, [prompt])[0] for prompt in prompts]
    assert greedy(model, prompts, chunk_size=chunk_size) == alone


@pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("source", SOURCES)
@torch.inference_mode()
def test_logits_are_the_same_bit_for_bit_on_one_thread_and_two(source, kv_dtype):
    model = quantized("m32", 4, source)
    prompts = [random_ids(length) for length in (17, 5, 23)]
    model.kv_dtype, before = kv_dtype, torch.get_num_threads()
    try:
        together = feed(model, model.new_cache(3, 23), prompts)
        for prompt, logits in zip(prompts, together, strict=True):
            cache = model.new_cache(1, 23)
            pieces = [feed(model, cache, [piece])[0] for piece in prompt.split([1, 2, 1, len(prompt) - 4])]
            assert torch.equal(torch.cat(pieces), logits)
        torch.set_num_threads(2)
        for one, two in zip(together, feed(model, model.new_cache(3, 23), prompts), strict=True):
            assert torch.equal(one, two)
    finally:
        model.kv_dtype = torch.bfloat16
        torch.set_num_threads(before)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40), st.floats(1e-6, 1e4))
def test_int8_keys_are_within_half_a_step(heads, tokens, channels, scale):
    x = torch.randn(tokens, heads, channels) * scale
    slots = Slots((1, heads, tokens, channels), torch.int8, "cpu")
    slots.write(torch.zeros(tokens, dtype=torch.long), torch.arange(tokens), x)
    found = slots.read(slice(None), tokens, torch.float32)[0]
    assert ((found - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 * 1.0001).all()


@torch.inference_mode()
def test_attention_over_int8_keys_and_values_is_within_its_bound():
    """Scores move by at most |q|_1 max|k| / (254 sqrt C) = d each, so weights by a factor within e^{+-2d}."""
    B, H, T, C = 1, 2, 50, 32
    q, k, v = (torch.randn(T, H, C) for _ in range(3))
    rows, positions = torch.zeros(T, dtype=torch.long), torch.arange(T)
    results = []
    for dtype in (torch.float32, torch.int8):
        keys, values = Slots((B, H, T, C), dtype, "cpu"), Slots((B, H, T, C), dtype, "cpu")
        keys.write(rows, positions, k)
        values.write(rows, positions, v)
        results.append(attend(q, keys, values, [0], [T]))
    largest = v.abs().amax()
    shift = q.abs().sum(-1).amax() * k.abs().amax() / 254 / C**0.5
    bound = largest / 254 + largest * torch.expm1(2 * shift)
    error = (results[1] - results[0]).abs().amax()
    assert 0 < error <= bound
    assert bound < largest
    assert error < 0.05


@torch.inference_mode()
def test_int8_keys_and_values_take_half_and_change_little():
    model = quantized("m32", 8, spread=0.1)
    ids = random_ids(60)
    logits, sizes = [], []
    for kv_dtype in (torch.bfloat16, torch.int8):
        model.kv_dtype = kv_dtype
        cache = model.new_cache(1, 60)
        logits.append(feed(model, cache, [ids])[0])
        sizes.append(cache.keys[0].nbytes)
    model.kv_dtype = torch.bfloat16
    assert sizes[1] / sizes[0] == (16 + 4) / 32
    relative = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    assert 0 < relative.median() < 0.05
