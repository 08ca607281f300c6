"""A quantized model gives a request the same bits alone and in any company, whatever its source was stored in.

Company is everything that the engine may do to a request: neighbours, chunks, reused prefixes, giving way, adapters of
others and its own, sampling with a seed. Logits of passes are compared too, as a token hides most differences.
"""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import small_adapters
from engine_runs import NATIVE_PAGE, random_requests, request, run
from small_models import VARIANTS, feed, random_ids
from small_quantized import OFFICIAL, SOURCES, quantized
from yuanmoe.checkpoint.adapters.adapter import Adapter, base_of
from yuanmoe.engine.engine import Engine
from yuanmoe.model.lora.multi_lora import MultiLora
from yuanmoe.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")

# Roles left as they are keep the source's precision: their products are those of whole matrices.
LEFT = ((), (("experts", 16),), (("lfa", 16), ("attention", 16)), (("embedding", 16),))


@st.composite
def models(draw):
    """Any source, width and layer; 96 rows of a router are beyond one tile of every variant of the kernels."""
    source = draw(st.sampled_from(SOURCES))
    variant = draw(st.sampled_from(OFFICIAL if source == "gptq" else sorted(VARIANTS)))
    roles = draw(st.sampled_from(LEFT))
    if VARIANTS[variant].get("num_experts") == 0 or not VARIANTS[variant].get("localized_filtering", True):
        roles = ()
    return variant, draw(st.sampled_from([4, 8])), source, roles, draw(st.sampled_from([32, 64]))


def model_of(choice):
    """The model of a draw; made outside of the draw, which must depend on nothing else."""
    variant, bits, source, roles, width = choice
    model = quantized(variant, bits, source, roles=roles, width=width)
    model.kv_dtype = torch.bfloat16
    return model


def said(outputs):
    """Tokens and scores, which must be the same numbers."""
    return [[(output.token_id, output.logprob) for output in each] for each in outputs]


@settings(max_examples=30, deadline=None)
@given(models(), st.integers(0, 2**32), st.sampled_from([torch.bfloat16, torch.int8, torch.float32]))
@torch.inference_mode()
def test_logits_are_the_same_however_a_prompt_is_cut_and_whoever_is_beside_it(choice, seed, kv_dtype):
    torch.manual_seed(seed)
    model = model_of(choice)
    model.kv_dtype = kv_dtype
    prompts = [random_ids(length) for length in (33, 5, 23, 18)]
    together = feed(model, model.new_cache(4, 33), prompts)
    for prompt, logits in zip(prompts, together, strict=True):
        cache = model.new_cache(1, 33)
        pieces = [feed(model, cache, [piece])[0] for piece in prompt.split([1, 2, 1, len(prompt) - 4])]
        assert torch.equal(torch.cat(pieces), logits)


@settings(max_examples=30, deadline=None)
@given(models(), st.integers(0, 2**32), st.integers(2, 6), st.sampled_from([2, 20, 150]))
def test_a_request_gets_the_same_bits_in_any_company(choice, seed, max_batch_size, spare_tokens):
    model = model_of(choice)
    rng = random.Random(seed)
    requests = random_requests(rng, 7)
    by_itself = [run(Engine(model), [each])[0] for each in requests]
    engine = Engine(
        model,
        max_batch_size=max_batch_size,
        step_tokens=max_batch_size + spare_tokens,
        cache_tokens=rng.randint(2, 5) * NATIVE_PAGE,
    )
    assert said(run(engine, requests, rng)) == said(by_itself)


@pytest.mark.parametrize("source", SOURCES)
def test_who_gives_way_and_who_reuses_a_prefix_goes_on_with_the_same_bits(source):
    model = model_of(("m32", 4, source, (), 64))
    beginning = random_ids(NATIVE_PAGE).tolist()
    requests = [request(random_ids(29).tolist(), 37, temperature=0.5 * seed, seed=seed) for seed in range(2)]
    requests += [request([*beginning, *random_ids(29).tolist()], 6) for _ in range(2)]
    by_itself = [run(Engine(model), [each])[0] for each in requests]
    engine = Engine(model, cache_tokens=6 * NATIVE_PAGE, max_batch_size=5, step_tokens=17)
    assert said(run(engine, requests)) == said(by_itself)
    assert engine.stats().reused_tokens > 0
    assert engine.stats().preemptions > 0


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(0, 2**32), st.integers(2, 6), st.sampled_from([2, 20, 150]))
def test_adapters_change_the_bits_of_their_own_requests_alone(choice, seed, max_batch_size, spare_tokens):
    model = model_of(choice)
    rng = random.Random(seed)
    made = _adapters(model)
    requests = [dataclasses.replace(each, adapter=rng.choice([None, *made])) for each in random_requests(rng, 7)]
    by_itself = [run(Engine(model, adapters=MultiLora(model, made)), [each])[0] for each in requests]
    engine = Engine(
        model,
        adapters=MultiLora(model, made),
        max_batch_size=max_batch_size,
        step_tokens=max_batch_size + spare_tokens,
        cache_tokens=rng.randint(2, 5) * NATIVE_PAGE,
    )
    assert said(run(engine, requests, rng)) == said(by_itself)


def _adapters(model) -> dict[str, Adapter]:
    made = {}
    roles = {"attention": ("q", "k", "v", "o", "head"), "experts": ("experts",), "queries": ("q",)}
    for number, (name, targets) in enumerate(roles.items()):
        if name == "experts" and not model.config.is_moe:
            continue
        wanted = small_adapters.settings(*targets, rank=2 + number, router=name == "attention" and model.config.is_moe)
        factors = small_adapters.factors(model, wanted, b_std=0.3, seed=number)
        made[name] = Adapter(settings=wanted, base=base_of(model, "small"), tensors=factors)
    return made
