"""The greedy answers of the golden checkpoints, however the work is cut."""

import pytest
import torch
from safetensors.torch import load_file

from yuanmoe.checkpoint.load import load_model
from yuanmoe.engine.generate import Generation
from yuanmoe.engine.sampling import SamplingParams

PROMPT_TOKENS = 7
ROUNDING = 4e-6
"""Of the spread of a router's scores: experts closer than this are told apart by the order in which sums are taken."""


@torch.inference_mode()
def decided(model, row: list[int]) -> int:
    """How many tokens of a row do not hang on rounding: those up to the first with a tie of experts."""
    tied = torch.zeros(len(row), dtype=torch.bool)
    for routing in model(torch.tensor([row])).routings:
        ranked, K = routing.logits.sort(dim=-1, descending=True).values, routing.experts.shape[1]
        tied |= ranked[:, K - 1] - ranked[:, K] < ROUNDING * routing.logits.std()
    return int(tied.nonzero()[0]) + 1 if tied.any() else len(row)


@pytest.mark.parametrize("name", ["moe-tiny", "moe-32x2", "dense-tiny"])
@pytest.mark.parametrize(("together", "chunk_size"), [(True, 2048), (True, 2), (True, 3), (False, 2048)])
@pytest.mark.usefixtures("exact_weights")
def test_greedy_tokens_are_the_official_ones(golden, name, together, chunk_size):
    folder = golden / name
    model = load_model(folder)
    rows = load_file(folder / "expected.safetensors")["greedy"].tolist()
    params = SamplingParams(max_new_tokens=len(rows[0]) - PROMPT_TOKENS)
    said = [list(row[:PROMPT_TOKENS]) for row in rows]
    for batch in [range(len(rows))] if together else [[row] for row in range(len(rows))]:
        prompts = [rows[row][:PROMPT_TOKENS] for row in batch]
        for token in Generation(model, prompts, params, chunk_size=chunk_size):
            said[batch[token.sequence]].append(token.token_id)
    lengths = [decided(model, row) for row in rows]
    assert [row[:length] for row, length in zip(said, lengths, strict=True)] == [
        row[:length] for row, length in zip(rows, lengths, strict=True)
    ]
    # Two of the nine rows have such a tie: gaps of 9e-7 and 3.6e-6 of the spread, the next smallest is 1.2e-5.
    assert sum(lengths) > 0.7 * sum(map(len, rows))
