"""The counts agree with the modules and with brute force on small models of every kind."""

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM
from yuanmoe.plan import cost


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 3))
    chosen = draw(st.integers(1, 3))
    router = draw(st.sampled_from(["attention", "linear", "shared-expert"]))
    experts: Any = draw(st.lists(st.integers(chosen, 6) | st.just(0), min_size=layers, max_size=layers))
    if draw(st.booleans()):
        experts = experts[0]
    return ModelConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=2 * draw(st.integers(1, 12)),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.integers(1, 3)),
        head_dim=4 * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 20)),
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=draw(st.integers(1, 20)),
        num_shared_experts=draw(st.integers(1, 2)) if router == "shared-expert" else 0,
        router=router,
        localized_filtering=draw(st.booleans()),
        partial_rotary_factor=0.5,
        tie_word_embeddings=draw(st.booleans()),
        eod_token_id=0,
        sep_token_id=1,
        pad_token_id=2,
    )


def role_of(name: str) -> cost.Role:
    """The role of a tensor, from its published name."""
    if "norm" in name:
        return "norms"
    parts = {"embed_tokens": "embedding", "lm_head": "head", "lfa": "lfa", "self_attn": "attention", "router": "router"}
    parts |= {"shared_experts": "shared_experts", "experts": "experts", "mlp": "dense"}
    return next(role for part, role in parts.items() if f".{part}." in f".{name}.")  # type: ignore[return-value]


@settings(deadline=None, max_examples=60)
@given(configs())
def test_the_module_has_these_parameters_in_these_roles(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    counted = dict.fromkeys(cost.ROLES, 0)
    for name, parameter in model.named_parameters():
        counted[role_of(name)] += parameter.numel()
    assert counted == cost.parameters(config)


@given(configs(), st.integers(1, 9), st.sampled_from(list(cost.PRECISIONS.values())))
def test_more_tokens_read_more_weights_up_to_all(config: ModelConfig, tokens: int, precision: cost.Precision) -> None:
    fewer, more = (cost.read_bytes(config, precision, count) for count in (tokens, tokens + 1))
    stored = sum(cost.weight_bytes(config, precision).values())
    head = next(weight for weight in cost.weights(config) if weight.role == "head")
    assert 0 < fewer <= more <= stored + precision.weight_bytes(head)


@given(configs())
def test_one_token_reads_what_is_active(config: ModelConfig) -> None:
    active = sum(cost.active_parameters(config).values())
    assert cost.read_bytes(config, cost.PRECISIONS[16]) == pytest.approx(2 * active)


@given(configs(), st.integers(1, 30))
def test_prefill_is_the_sum_over_its_tokens(config: ModelConfig, tokens: int) -> None:
    head = 2 * config.vocab_size * config.hidden_size
    body = cost.forward_flops(config) - head
    each = [body + cost.attention_flops(config, position + 1) for position in range(tokens)]
    assert cost.prefill_flops(config, tokens) == pytest.approx(sum(each) + head)


@given(st.integers(1, 5), st.data())
def test_expected_experts_by_enumeration(num_experts: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, num_experts))
    tokens = data.draw(st.integers(1, 3))
    choices = list(itertools.combinations(range(num_experts), chosen))
    distinct = [len(set().union(*routes)) for routes in itertools.product(choices, repeat=tokens)]
    assert cost.expected_experts(num_experts, chosen, tokens) == pytest.approx(
        float(Fraction(sum(distinct), len(distinct)))
    )
