"""What is said about a text: paired differences between RoPE settings, and sums over routings, against plain loops."""

import math
import re

import pytest
import torch

from small_models import random_ids, random_model, small_config
from yuanmoe.errors import UsageError
from yuanmoe.evals import routing as routing_file
from yuanmoe.evals.reading import configured, losses, progress, text_windows
from yuanmoe.evals.rope import BLOCK_TOKENS, MIN_BLOCKS, Setting, difference, judge
from yuanmoe.evals.routing import LayerRecord, TextKinds, expert_matrices, favourites, layer_summary, recorded
from yuanmoe.model.router import Routing


def synthetic(**means):
    """Losses of 40 blocks by setting, `t10000_float32=mean` above a noise that all share and a smaller one of each."""
    shared, found = 2 * torch.rand(40 * BLOCK_TOKENS), {}
    for name, mean in means.items():
        theta, angles = name[1:].split("_")
        own = 0.1 * torch.randn(40, 1).expand(40, BLOCK_TOKENS).flatten()
        found[Setting(rope_theta=float(theta), rope_angles=angles)] = shared + own - own.mean() + mean
    return found


def test_a_clear_base_beside_unclear_angles():
    losses = synthetic(t10000_float32=3.0, t10000_bfloat16=3.001, t40890_float32=3.5, t40890_bfloat16=3.4)
    verdict = judge(losses)
    assert (verdict.rope_theta, verdict.rope_angles) == (10000.0, None)
    assert re.fullmatch(
        r"These weights want RoPE base 10000: with 40890 a token costs 0\.4000 \+- 0\.0\d+ nats more\. The text is too "
        r"short to tell the precisions of the angles apart: they differ by 0\.0010 \+- 0\.0\d+ nats a token\. "
        r"About [\d,]+ more tokens would, if it stays so\.",
        verdict.text,
    )


def test_an_unclear_base_and_how_many_tokens_it_takes():
    losses = synthetic(t10000_float32=3.0, t10000_bfloat16=3.0, t40890_float32=3.03, t40890_bfloat16=3.5)
    verdict = judge(losses)
    assert (verdict.rope_theta, verdict.rope_angles) == (None, None)
    assert "too short to tell RoPE base 10000 from 40890: they differ by 0.0300 +- 0.0" in verdict.text
    assert verdict.more_tokens > 0
    assert f"About {verdict.more_tokens:,} more tokens would" in verdict.text

    def repeated(times):
        return judge({setting: nats.repeat(times) for setting, nats in losses.items()}).rope_theta

    tokens = 40 * BLOCK_TOKENS
    wanted = (tokens + verdict.more_tokens) / tokens
    assert repeated(math.ceil(wanted * 1.1)) == 10000.0, "so many tokens are enough"
    assert repeated(max(1, math.floor(wanted * 0.7))) is None, "and fewer are not"


def test_the_closest_of_several_bases_decides():
    losses = synthetic(t10000_float32=3.0, t10000_bfloat16=3.5, t40890_float32=3.5, t40890_bfloat16=3.5)
    assert judge(losses).rope_theta == 10000.0
    losses |= synthetic(t1000000_float32=3.0, t1000000_bfloat16=3.5)
    assert judge(losses | {s: nats for s, nats in losses.items() if s.rope_theta == 1e6}).rope_theta is None


def test_without_spread_or_difference_nothing_is_claimed():
    few = MIN_BLOCKS * BLOCK_TOKENS - 6
    short = judge({setting: nats[:few] for setting, nats in synthetic(t10000_float32=1.0, t40890_float32=9.0).items()})
    assert (short.rope_theta, short.more_tokens) == (None, 6)
    assert short.text == f"The text is too short to tell: {few} tokens were scored, at least {few + 6} are needed."
    nats = torch.rand(999)
    equal = judge(dict.fromkeys(synthetic(t10000_float32=0, t40890_float32=0), nats))
    assert (equal.rope_theta, equal.more_tokens) == (None, None)
    assert equal.text.endswith("10000 from 40890: they make no difference at all.")


def test_differences_are_paired():
    easy, noise = torch.rand(960), 100 * torch.rand(960)
    apart = difference(easy + noise + 0.5, easy + noise)
    assert apart.mean == pytest.approx(0.5, abs=1e-5)
    assert apart.standard_error < 1e-5
    blocks = torch.randn(30)
    spread = difference(blocks.repeat_interleave(BLOCK_TOKENS), torch.zeros(960))
    assert spread.standard_error == pytest.approx((blocks.double().std() / 30**0.5).item(), rel=1e-5)


def test_every_token_is_read_once_and_scored_once():
    assert list(text_windows(range(8), 4)) == [range(4), range(3, 7), range(6, 8)]
    with pytest.raises(
        UsageError, match="1 tokens in a context of 4: at least 2 are needed, as the first is only read"
    ):
        list(text_windows([3], 4))
    model, ids = random_model(small_config()), [0, *random_ids(40).tolist()]
    seen = []
    with progress(model, seen.append):
        nats = losses(model, ids, 16)
    assert sum(seen) == pytest.approx(40)
    assert len(seen) == 3 * 2, "one report a pass and layer"
    with torch.no_grad():
        for start in (0, 15, 30):
            window = torch.tensor(ids[start : start + 16])
            expected = torch.nn.functional.cross_entropy(
                model(window[None, :-1]).logits[0], window[1:], reduction="none"
            )
            torch.testing.assert_close(nats[start : start + 15], expected, atol=1e-4, rtol=1e-4)


def test_a_window_may_exceed_the_context_of_the_config():
    ids = random_ids(200).tolist()
    short, long = random_model(small_config()), random_model(small_config(max_position_embeddings=256))
    torch.testing.assert_close(losses(short, ids, 200), losses(long, ids, 200))
    assert short.config.max_position_embeddings == 128


def test_settings_are_put_back_even_after_an_error():
    model = random_model(small_config())
    before = model.config

    def fail():
        with configured(model, rope_theta=77.0):
            assert model.config.rope_theta == model.model.config.rope_theta == 77.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model.config is model.model.config is before


def read(model, ids):
    """The records of a text read by a model in passes of two windows, and the routings of its tokens."""
    with recorded(model, ids) as records:
        losses(model, ids, len(ids))
    with torch.no_grad():
        return records, model(torch.tensor(ids[:-1])[None]).routings


def test_records_are_sums_over_the_routings():
    model = random_model(small_config(num_hidden_layers=3, num_experts=(6, 0, 4)))
    ids = random_ids(30).tolist()
    records, routings = read(model, ids)
    assert [record.layer for record in records] == [0, 2]
    for record, routing in zip(records, routings, strict=True):
        E = record.num_experts
        together = torch.zeros(E, E, dtype=torch.int64)
        by_kind = torch.zeros(E, record.kinds.count, dtype=torch.int32)
        for token_id, chosen in zip(ids[:-1], routing.experts.tolist(), strict=True):
            for i in chosen:
                by_kind[i, record.kinds.token_ids.index(token_id)] += 1
                together[i, chosen] += 1
        assert record.tokens == 29
        assert torch.equal(record.together, together)
        assert torch.equal(record.by_kind.view(E, -1), by_kind)
        assert record.first_weights == pytest.approx(routing.weights[:, 0].sum().item(), rel=1e-4)
        shares = torch.tensor(expert_matrices(record)["together"])
        expected = together / together.diagonal().clamp(min=1)[:, None]
        torch.testing.assert_close(shares, expected.fill_diagonal_(0), atol=6e-5, rtol=0)


def test_rare_kinds_of_tokens_share_a_place(monkeypatch):
    monkeypatch.setattr(routing_file, "MAX_KINDS", 3)
    model = random_model(small_config(num_hidden_layers=1))
    ids = [5, 5, 5, 6, 6, 7, 7, 8, 9, 5]
    (record,), _ = read(model, ids)
    assert record.kinds.token_ids == [5, 6, 7]
    assert record.by_kind.view(8, 4).sum(dim=0).tolist() == [6, 4, 4, 4]  # Two choices a token, the last is not read.
    assert {token["token_id"] for mine in favourites(record) for token in mine} <= {5, 6, 7}


def test_relations_are_those_of_the_router():
    model = random_model(small_config(num_hidden_layers=1))
    inputs = []
    router = model.model.layers[0].mlp.router
    with router.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0].clone())):
        (record,), _ = read(model, random_ids(300).tolist())
    q, k, _ = (inputs[0] @ router.weight.detach().T).view(299, 3, 8).unbind(1)
    expected = torch.softmax(q[:, :, None] * k[:, None, :], dim=-1).mean(dim=0)
    torch.testing.assert_close(torch.tensor(expert_matrices(record)["relations"]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{"router": "linear"}, {"router": "shared-expert", "num_shared_experts": 1}])
def test_other_routers_have_no_relations(changes):
    records, _ = read(random_model(small_config(**changes)), random_ids(12).tolist())
    assert all(expert_matrices(record)["relations"] is None for record in records)


def test_a_load_in_numbers():
    """Experts 0 and 1 take every second token together, 2 and 3 the others; 4 and 5 are idle."""
    record = LayerRecord(7, 6, TextKinds([10, 11] * 8))
    chosen = torch.tensor([[0, 1], [3, 2]] * 8)
    record(torch.nn.Identity(), (torch.empty(16, 4),), Routing(torch.tensor([[0.75, 0.25]] * 16), chosen, chosen))
    assert layer_summary(record) == {
        "layer": 7,
        "experts": 6,
        "load": [0.25, 0.25, 0.25, 0.25, 0, 0],
        "max_over_mean": 1.5,
        "variation": round(0.5**0.5, 4),
        "entropy_nats": round(math.log(4), 4),
        "effective_experts": 4.0,
        "dead_experts": [4, 5],
        "first_weight": 0.75,
        # By their loads alone the 16 pairs would spread over 6 kinds of pair.
        "pairs": [{"experts": pair, "tokens": 8, "times_chance": 3.0} for pair in ([0, 1], [2, 3])],
    }
    beyond_chance = [[{"token_id": 10, "tokens": 8, "times_chance": 2.0}]] * 2
    assert favourites(record) == beyond_chance + [[{"token_id": 11, "tokens": 8, "times_chance": 2.0}]] * 2 + [[], []]


def test_one_expert_a_token_makes_no_pairs():
    records, _ = read(random_model(small_config(num_experts_per_tok=1)), random_ids(12).tolist())
    assert all(layer_summary(record)["pairs"] == [] for record in records)
