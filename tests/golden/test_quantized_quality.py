"""What quantizing does to a model that learned something: small bounds on perplexity, the same on every run.

A model of bytes, trained for some seconds on one module of the standard library and measured on another.
"""

import argparse
import functools
import optparse
from pathlib import Path

import pytest
import torch

from small_models import random_model, small_config
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native
from yuanmoe.evals.quality import quality

CONFIG = small_config(
    vocab_size=256,
    hidden_size=64,
    head_dim=32,
    moe_intermediate_size=64,
    initializer_range=0.05,
    max_position_embeddings=128,
)
STEPS, BATCH, LENGTH = 100, 8, 48
LARGEST_CHANGE = {(8, "rtn"): 0.005, (8, "mse"): 0.005, (4, "rtn"): 0.04, (4, "mse"): 0.025, (4, "gptq"): 0.025}
"""Of perplexity, by bits and method, in groups of 64."""


def read(module) -> list[int]:
    return list(Path(module.__file__).read_bytes())


@functools.cache
def trained():
    """A state that learned something of how Python is written."""
    model, ids = random_model(CONFIG).train(), torch.tensor(read(argparse))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        windows = torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])
        logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("bits", "method"), LARGEST_CHANGE)
def test_perplexity_hardly_changes(tmp_path, bits, method):
    save_native(trained(), CONFIG, tmp_path / "src")
    calibration = read(argparse)[:4000] if method == "gptq" else []
    quantize_checkpoint(
        tmp_path / "src", tmp_path / "dst", bits=bits, group_size=64, method=method, calibration=calibration
    )
    found = quality(open_checkpoint(tmp_path / "src"), tmp_path / "dst", read(optparse)[:3000], LENGTH)
    assert found["perplexity_before"] < 40  # 256 would be guessing
    assert abs(found["perplexity_change"]) < LARGEST_CHANGE[bits, method]
    assert found["top1_agreement"] > (0.95 if bits == 8 else 0.8)
    assert found["routing_changed"] < found["routing_decisions"] * (0.05 if bits == 8 else 0.15)
