"""The greedy answers of the golden checkpoints, however the work is cut."""

import pytest
from safetensors.torch import load_file

from yuanmoe.checkpoint.load import load_model
from yuanmoe.engine.generate import Generation
from yuanmoe.engine.sampling import SamplingParams

PROMPT_TOKENS = 7


@pytest.mark.parametrize("name", ["moe-tiny", "moe-32x2", "dense-tiny"])
@pytest.mark.parametrize(("together", "chunk_size"), [(True, 2048), (True, 2), (False, 2048)])
def test_greedy_tokens_are_the_official_ones(shared_dir, name, together, chunk_size):
    folder = shared_dir / "golden" / name
    model = load_model(folder)
    rows = load_file(folder / "expected.safetensors")["greedy"].tolist()
    params = SamplingParams(max_new_tokens=len(rows[0]) - PROMPT_TOKENS)
    said = [list(row[:PROMPT_TOKENS]) for row in rows]
    for batch in [range(len(rows))] if together else [[row] for row in range(len(rows))]:
        prompts = [rows[row][:PROMPT_TOKENS] for row in batch]
        for token in Generation(model, prompts, params, chunk_size=chunk_size):
            said[batch[token.sequence]].append(token.token_id)
    assert said == rows
