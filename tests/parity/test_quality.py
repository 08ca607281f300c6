"""What is said of a quantized model's quality, against the model's own likelihoods and against counting by hand."""

import math

import pytest
import torch

from small_models import random_ids, random_model, small_config
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.errors import CheckpointError, UsageError
from yuanmoe.evals.quality import TextReading, compare, quality, read_loaded, read_streamed
from yuanmoe.evals.reading import losses

VARIANTS = {
    "m32": {},
    "untied": {"tie_word_embeddings": False},
    "dense": {"num_experts": 0, "partial_rotary_factor": 1.0},
    "shared": {"router": "shared-expert", "num_shared_experts": 1},
    "mixed": {"num_experts": (0, 5)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_checkpoint_read_layer_by_layer_is_the_model(tmp_path, changes):
    """Likelihoods, likeliest tokens and routes; windows of several lengths, each by itself."""
    config = small_config(**changes)
    save_native(random_model(config).state_dict(), config, tmp_path / "model")
    pieces = [random_ids(length).tolist() for length in (20, 7, 2)]
    streamed = read_streamed(open_checkpoint(tmp_path / "model"), pieces)
    loaded = read_loaded(load_model(tmp_path / "model"), pieces)
    torch.testing.assert_close(streamed.nats, loaded.nats, atol=1e-4, rtol=1e-4)
    assert torch.equal(streamed.likeliest, loaded.likeliest)
    assert len(streamed.routes) == len(loaded.routes) == sum(experts > 0 for experts in config.experts_per_layer)
    for one, other in zip(streamed.routes, loaded.routes, strict=True):
        assert torch.equal(one, other)
    assert len(streamed.nats) == 19 + 6 + 1


def test_the_numbers_are_those_of_the_models(tmp_path):
    config = small_config(initializer_range=0.1)
    save_native(random_model(config).state_dict(), config, tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "four", bits=4)
    ids = random_ids(200).tolist()
    heard = []
    found = quality(open_checkpoint(tmp_path / "model"), tmp_path / "four", ids, 64, heard.append)
    nats = {name: losses(load_model(tmp_path / name), ids, 64).double() for name in ("model", "four")}
    assert found["scored_tokens"] == 199
    assert found["perplexity_before"] == pytest.approx(nats["model"].mean().exp().item(), rel=1e-5)
    assert found["perplexity_after"] == pytest.approx(nats["four"].mean().exp().item(), rel=1e-5)
    assert found["perplexity_change"] == pytest.approx(
        found["perplexity_after"] / found["perplexity_before"] - 1, abs=1e-6
    )
    error = (nats["four"] - nats["model"]).std().item() / math.sqrt(199)
    assert found["standard_error"] == pytest.approx(error, rel=1e-3)
    assert sum(heard) == pytest.approx(2 * (199 + 4))


def test_comparing_counts_what_differs():
    nats = torch.tensor([1.0, 2.0, 3.0])
    routes = [torch.tensor([[0, 1], [2, 3], [1, 4]]), torch.tensor([[0, 1], [0, 1], [0, 1]])]
    others = [torch.tensor([[0, 1], [2, 4], [1, 5]]), routes[1]]
    before = TextReading(nats, torch.tensor([5, 6, 7]), routes)
    found = compare(before, TextReading(nats + math.log(2), torch.tensor([5, 6, 8]), others))
    assert found["perplexity_change"] == pytest.approx(1.0)
    assert found["top1_agreement"] == pytest.approx(2 / 3)
    assert (found["routing_changed"], found["routing_decisions"]) == (2, 6)
    assert found["routing_changed_by_layer"] == [pytest.approx(2 / 3, abs=1e-6), 0.0]
    same = compare(before, before)
    assert (same["perplexity_change"], same["top1_agreement"], same["routing_changed"]) == (0, 1, 0)


def test_a_model_without_likelihoods_is_an_error():
    good = TextReading(torch.ones(4), torch.zeros(4, dtype=torch.long), [])
    with pytest.raises(
        CheckpointError, match=r"^4 of 4 tokens have no likelihood under the quantized model; its weights"
    ):
        compare(good, good._replace(nats=torch.full((4,), torch.nan)))
    with pytest.raises(CheckpointError, match=r"under the original model"):
        compare(good._replace(nats=torch.full((4,), torch.inf)), good)


def test_one_token_is_too_little(tmp_path):
    config = small_config()
    save_native(random_model(config).state_dict(), config, tmp_path / "model")
    with pytest.raises(UsageError, match=r"1 tokens in a context of 128: at least 2 are needed"):
        quality(open_checkpoint(tmp_path / "model"), tmp_path / "model", [3])
