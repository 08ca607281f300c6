"""What the official modelling arithmetic computes from the golden checkpoints, to rounding."""

import json

import pytest
import torch
from safetensors.torch import load_file

from golden_data.drawn import DATA, drawn_weights
from small_models import greedy
from yuanmoe.checkpoint.load import load_model
from yuanmoe.model.state.cache import Cache

MOE = ("moe-tiny", "moe-32x2")
ALL = (*MOE, "dense-tiny")
TOLERANCE = 1e-4
"""Of logits relative to their spread, of hidden states and router scores as they are; routes may differ below it."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def expected(golden, name):
    return load_file(golden / name / "expected.safetensors")


@pytest.fixture
def load(golden, name):
    return lambda **changes: load_model(golden / name, **changes)


def assert_logits(ours, theirs):
    assert ours.dtype == theirs.dtype == torch.float32
    assert ((ours - theirs).abs().max() / theirs.std()).item() < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_logits_and_hidden_states(load, expected):
    output = load()(expected["input_ids"])
    assert_logits(output.logits, expected["logits"])
    assert (output.hidden - expected["last_hidden"]).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize(
    ("changes", "ids", "logits"),
    [
        ({"rope_angles": "bfloat16"}, "input_ids", "logits_bf16_rope"),
        ({"rope_theta": 40890.0}, "input_ids", "logits_base_40890"),
        ({"packing": "hf-mask"}, "packed_input_ids", "packed_logits"),
    ],
    ids=["bfloat16 angles", "base 40890", "reset_attention_mask"],
)
def test_variants(load, expected, changes, ids, logits):
    assert_logits(load(**changes)(expected[ids]).logits, expected[logits])
    plain = load()(expected[ids]).logits
    assert (plain - expected[logits]).abs().max().item() > 0.1, "the variant makes no difference here"


@pytest.mark.parametrize("name", MOE)
def test_router_scores_and_routes(load, expected):
    routings = load()(expected["input_ids"]).routings
    assert len(routings) == len(expected["router_logits"])
    compared = 0
    for routing, theirs in zip(routings, expected["router_logits"].flatten(1, 2), strict=True):
        assert (routing.logits - theirs).abs().max().item() < TOLERANCE
        ranked = theirs.sort(dim=-1, descending=True).values
        clear = ranked[:, 1] - ranked[:, 2] > TOLERANCE
        chosen = theirs.topk(2).indices.sort(dim=-1).values
        assert torch.equal(routing.experts.sort(dim=-1).values[clear], chosen[clear])
        compared += int(clear.sum())
    assert compared > 0.9 * expected["router_logits"][..., 0].numel(), "too few clear routes to compare"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("exact_weights")
def test_greedy_tokens_through_a_cache(load, expected):
    model, theirs = load(), expected["greedy"]
    prompts, answers = theirs[:, :7], theirs[:, 7:]
    assert greedy(model, list(prompts), answers.shape[1]) == answers.tolist()


@pytest.mark.parametrize("name", ALL)
def test_logits_through_a_cache_in_chunks(load, expected):
    model, ids = load(), expected["input_ids"]
    cache = Cache(model.config, *ids.shape, dtype=torch.float32)
    logits = []
    for chunk in ids.split([1, 2, 17, 1, 20], dim=1):
        hidden, _ = model.model(chunk.flatten(), cache.extend([chunk.shape[1]] * len(ids)))
        logits.append(model.logits(hidden).view(*chunk.shape, -1))
    assert_logits(torch.cat(logits, dim=1), expected["logits"])


@pytest.mark.parametrize("name", ALL)
def test_the_official_config_says_all_that_matters(load, golden, name):
    values = json.loads((golden / name / "config.json").read_text())
    config = load().config
    assert config.attention_size == values.get("attention_projection_size", values["hidden_size"])
    assert config.rotary_dim == values["hidden_size"] // values["num_attention_heads"]
    assert (config.rope_theta, config.rope_angles, config.packing) == (10000.0, "float32", "continuous")
    assert config.is_moe == ("moe_config" in values)


def test_drawn_weights_are_those_of_the_file():
    kept, drawn = load_file(DATA / "moe-tiny" / "model.safetensors"), drawn_weights("moe-tiny")
    assert drawn.keys() == kept.keys()
    for name, weights in kept.items():
        # Processors without AVX2 take other logarithms and cosines on the way to a normal distribution.
        torch.testing.assert_close(drawn[name], weights, rtol=0, atol=5e-6, msg=name)
