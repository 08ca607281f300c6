"""Adapters side by side: what a request says with one of them is its own, whoever has which other.

Expected tokens come from whole passes with that adapter alone attached, so that two ways to correct a model meet.
"""

import contextlib
import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import small_adapters
from engine_runs import NATIVE_PAGE, check_all, ids, random_requests, request, run
from small_models import VARIANTS, random_ids, random_model, small_config
from yuanmoe.checkpoint.adapters.adapter import Adapter, base_of
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.engine.engine import Engine
from yuanmoe.errors import UsageError
from yuanmoe.model.lora.attach import attach, attached, detach
from yuanmoe.model.lora.multi_lora import NOBODY, MultiLora
from yuanmoe.ops import native

EVERYTHING = ("q", "k", "v", "o", "lfa", "experts", "head")
ROLES = {"everything": EVERYTHING, "queries": ("q",), "experts": ("experts",)}


def adapters(model, **changes) -> dict[str, Adapter]:
    """Of different roles, ranks and scales; one routes otherwise too."""
    made = {}
    for number, (name, roles) in enumerate(ROLES.items()):
        settings = small_adapters.settings(*roles, rank=2 + number, router=name == "everything", **changes)
        factors = small_adapters.factors(model, settings, b_std=0.3, seed=number)
        made[name] = Adapter(settings=settings, base=base_of(model, "small"), tensors=factors)
    return made


def with_adapters(rng: random.Random, count: int) -> list:
    return [dataclasses.replace(each, adapter=rng.choice([None, *ROLES])) for each in random_requests(rng, count)]


def check_each(model, made, requests, outputs) -> None:
    """That every request was answered as by a model with its adapter alone."""
    for name in [None, *made]:
        mine = [place for place, each in enumerate(requests) if each.adapter == name]
        if name is not None:
            attach(model, made[name].tensors, made[name].settings)
        check_all(model, [requests[place] for place in mine], [outputs[place] for place in mine])
        detach(model)


@settings(max_examples=7)
@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 3, NATIVE_PAGE]),
    max_batch_size=st.integers(2, 5),
    spare_tokens=st.sampled_from([2, 20, 150]),
    spare_pages=st.integers(0, 5),
)
def test_what_a_request_says_depends_on_it_and_its_adapter(seed, page_size, max_batch_size, spare_tokens, spare_pages):
    model = random_model(small_config())
    made = adapters(model)
    rng = random.Random(seed)
    requests = with_adapters(rng, 8)
    engine = Engine(
        model,
        adapters=MultiLora(model, made),
        page_size=page_size,
        max_batch_size=max_batch_size,
        step_tokens=max_batch_size + spare_tokens,
        cache_tokens=(63 // page_size + 1 + spare_pages) * page_size,
    )
    check_each(model, made, requests, run(engine, requests, rng))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_layer_can_be_adapted(variant):
    model = random_model(small_config(**VARIANTS[variant]))
    present = ["q", "k", "v", "o", "head"]
    settings = small_adapters.settings(*present)
    made = {
        "one": Adapter(
            settings=settings, base=base_of(model, ""), tensors=small_adapters.factors(model, settings, b_std=0.3)
        )
    }
    requests = [request([3, 4, 5], adapter=name) for name in (None, "one", None)]
    check_each(model, made, requests, run(Engine(model, adapters=MultiLora(model, made)), requests))


def test_a_prefix_is_reused_under_the_same_adapter_only():
    model = random_model(small_config())
    made = adapters(model)
    engine = Engine(model, adapters=MultiLora(model, made), page_size=4, cache_tokens=400)
    prompt = random_ids(17).tolist()
    reused = []
    for name in (None, "queries", "experts", "queries", None):
        (outputs,) = run(engine, [request(prompt, 3, adapter=name)])
        reused.append(outputs[0].reused_tokens)
    assert reused == [0, 0, 0, 16, 16]


def test_scores_of_a_prompt_are_those_of_its_adapter():
    model = random_model(small_config())
    made = adapters(model)
    prompt = random_ids(40).tolist()
    engine = Engine(model, adapters=MultiLora(model, made), step_tokens=64)
    names = [None, "everything"]
    said = run(engine, [request(prompt, 1, prompt_logprobs=True, adapter=name) for name in names])
    for name, (output,) in zip(names, said, strict=True):
        if name is not None:
            attach(model, made[name].tensors, made[name].settings)
        (alone,) = run(Engine(model), [request(prompt, 1, prompt_logprobs=True)])
        assert output.prompt.logprobs == pytest.approx(alone[0].prompt.logprobs, abs=1e-4)
    assert said[0][0].prompt.logprobs != pytest.approx(said[1][0].prompt.logprobs, abs=1e-2)


@pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
def test_who_has_no_adapter_is_answered_bit_for_bit_as_without_neighbours_that_have_one(tmp_path):
    config = small_config(hidden_size=64, moe_intermediate_size=64, head_dim=32)
    save_native(random_model(config).bfloat16().state_dict(), config, tmp_path / "whole")
    quantize_checkpoint(tmp_path / "whole", tmp_path / "packed", bits=4)
    model = load_model(tmp_path / "packed")
    made = adapters(model)
    plain = [request(random_ids(9).tolist(), 12) for _ in range(3)]
    others = [request(random_ids(9).tolist(), 12, adapter=name) for name in made]
    by_itself = run(Engine(model), plain)
    engine = Engine(model, adapters=MultiLora(model, made), step_tokens=17, max_batch_size=6)
    together = run(engine, [*plain, *others])
    assert [[(o.token_id, o.logprob) for o in outputs] for outputs in together[:3]] == [
        [(o.token_id, o.logprob) for o in outputs] for outputs in by_itself
    ]
    for each, outputs in zip(others, together[3:], strict=True):
        (by_itself,) = run(Engine(model, adapters=MultiLora(model, made)), [each])
        attach(model, made[each.adapter].tensors, made[each.adapter].settings)
        (alone,) = run(Engine(model), [dataclasses.replace(each, adapter=None)])
        detach(model)
        assert [(o.token_id, o.logprob) for o in by_itself] == [(o.token_id, o.logprob) for o in alone]
        assert [(o.token_id, o.logprob) for o in outputs] == [(o.token_id, o.logprob) for o in alone]


def test_the_model_is_as_it_was_between_passes_also_after_one_that_failed():
    model = random_model(small_config())
    before = {name: id(module) for name, module in model.named_modules()}
    multi = MultiLora(model, adapters(model))
    with contextlib.suppress(ZeroDivisionError), multi.at_work(np.array([0, NOBODY])):
        assert {name: id(module) for name, module in model.named_modules()} != before
        _ = 1 / 0
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not attached(model)


def test_an_adapter_that_is_not_there_is_refused():
    engine = Engine(random_model(small_config()))
    with pytest.raises(UsageError, match="no adapter 'poet'; loaded: none"):
        engine.submit(request([1], adapter="poet"))
    assert not engine.has_work


def test_a_model_with_an_adapter_attached_takes_no_others():
    model = random_model(small_config())
    made = adapters(model)
    attach(model, made["queries"].tensors, made["queries"].settings)
    with pytest.raises(UsageError, match="detach it first"):
        MultiLora(model, made)


def test_one_without_corrections_changes_nothing():
    model = random_model(small_config())
    made = adapters(model)
    zero = {name: torch.zeros_like(tensor) for name, tensor in made["everything"].tensors.items()}
    engine = Engine(
        model, adapters=MultiLora(model, {"zero": dataclasses.replace(made["everything"], tensors=zero)}), page_size=4
    )
    alone, together = run(engine, [request([1, 2, 3], 9), request([1, 2, 3], 9, adapter="zero")])
    assert ids(alone) == ids(together)
