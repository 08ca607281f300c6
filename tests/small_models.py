"""Small models for tests: configurations by hypothesis, random weights that spread the logits, and runs of a cache."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.router import Routing
from yuanmoe.model.state.cache import Cache

EOD = 0
VOCABULARY = 32


def small_config(**changes) -> ModelConfig:
    """Two layers of eight experts under the Attention Router, with everything M32 has: LFA, half rotary heads, tied."""
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 12,
        "intermediate_size": 20,
        "num_experts": 8,
        "moe_intermediate_size": 12,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "eod_token_id": EOD,
        "sep_token_id": 1,
        "pad_token_id": 2,
    }
    return ModelConfig(**values | changes)


VARIANTS = {
    "m32": {},
    "linear router": {"router": "linear"},
    "shared experts": {"router": "shared-expert", "num_shared_experts": 2},
    "no LFA": {"localized_filtering": False},
    "router bias": {"router_bias": True},
    "dense": {"num_experts": 0, "partial_rotary_factor": 1.0},
    "experts by layer": {"num_experts": (5, 0, 3), "num_hidden_layers": 3},
    "untied, one expert a token": {"tie_word_embeddings": False, "num_experts_per_tok": 1},
}
"""The ablations of both papers, and what the backbone of Yuan 3.0 adds."""


@st.composite
def configs(draw) -> ModelConfig:
    """Any router, LFA or none, dense or routed layers in any mixture, odd sizes."""
    router = draw(st.sampled_from(["attention", "linear", "shared-expert"]))
    top_k = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    by_layer = st.lists(st.sampled_from([0, 3, 4, 7]), min_size=layers, max_size=layers).map(tuple)
    return small_config(
        router=router,
        num_hidden_layers=layers,
        num_experts=draw(st.sampled_from([0, 3, 8]) | by_layer),
        num_experts_per_tok=top_k,
        num_shared_experts=draw(st.integers(1, 2)) if router == "shared-expert" else 0,
        router_bias=draw(st.booleans()),
        localized_filtering=draw(st.booleans()),
        hidden_size=draw(st.sampled_from([6, 8, 16])),
        moe_intermediate_size=draw(st.sampled_from([5, 8])),
        partial_rotary_factor=draw(st.sampled_from([0.5, 1.0])),
        rope_angles=draw(st.sampled_from(["float32", "bfloat16"])),
        tie_word_embeddings=draw(st.booleans()),
    )


def random_model(config: ModelConfig, seed: int = 0) -> CausalLM:
    """Random weights, those of the norms included, ready for inference."""
    torch.manual_seed(seed)
    model = CausalLM(config).initialize()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def random_ids(*shape: int, vocab_size: int = VOCABULARY) -> Tensor:
    """Ids other than `<eod>`."""
    return torch.randint(EOD + 1, vocab_size, shape)


def route_gap(routing: Routing) -> float:
    """The smallest distance between the last chosen and the first refused expert of any token."""
    chosen = routing.experts.shape[1]
    ranked = routing.logits.sort(dim=-1, descending=True).values
    return float("inf") if ranked.shape[1] == chosen else (ranked[:, chosen - 1] - ranked[:, chosen]).min().item()


def feed(model: CausalLM, cache: Cache, prompts: Sequence[Tensor]) -> list[Tensor]:
    """One pass: the next tokens of each row of the cache (none for an empty tensor), and their logits."""
    new = [len(prompt) for prompt in prompts]
    hidden, _ = model.model(torch.cat(list(prompts)), cache.extend(new))
    return list(model.logits(hidden).split(new))


def feed_in_passes(model: CausalLM, prompts: Sequence[Tensor], cuts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each prompt, cut at its `cuts` (ascending, as many for each prompt), one pass of a cache a piece."""
    cache = Cache(model.config, len(prompts), max(map(len, prompts)), dtype=torch.float32)
    pieces = [prompt.tensor_split(list(at)) for prompt, at in zip(prompts, cuts, strict=True)]
    passes = [feed(model, cache, together) for together in zip(*pieces, strict=True) if sum(map(len, together))]
    return [torch.cat(parts) for parts in zip(*passes, strict=True)]


def greedy(model: CausalLM, prompts: Sequence[Tensor], new_tokens: int) -> list[list[int]]:
    """The next `new_tokens` of each prompt, always the likeliest, all prompts in one cache."""
    cache = Cache(model.config, len(prompts), max(map(len, prompts)) + new_tokens, dtype=torch.float32)
    said: list[list[int]] = [[] for _ in prompts]
    logits = feed(model, cache, prompts)
    for _ in range(new_tokens):
        last = [row[-1].argmax() for row in logits]
        for words, word in zip(said, last, strict=True):
            words.append(int(word))
        logits = feed(model, cache, [word[None] for word in last])
    return said
