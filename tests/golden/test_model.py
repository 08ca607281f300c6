"""Numbers that every variant of the model must keep giving: weights by a formula, so that no random generator matters.

The variants that the released code knows were right when these were written: `parity/test_golden.py` holds the same
code to the official arithmetic. A change of `model.json` is a change of numerics, and belongs in the changelog. To
write it anew: `PYTHONPATH=tests python tests/golden/test_model.py`.
"""

import itertools
import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from small_models import route_gap
from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM, ModelOutput

GOLDEN = Path(__file__).with_name("model.json")
TOLERANCE = 1e-4
SIZES = {
    "vocab_size": 24,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 12,
    "intermediate_size": 10,
    "num_experts": 6,
    "moe_intermediate_size": 8,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    **dict.fromkeys(("eod_token_id", "sep_token_id", "pad_token_id"), 0),
}
CASES = {
    "m32": {},
    "rope base 40890": {"rope_theta": 40890.0},
    "bfloat16 angles": {"rope_angles": "bfloat16"},
    "megatron packing": {"packing": "megatron"},
    "hf-mask packing": {"packing": "hf-mask"},
    "isolated packing": {"packing": "isolated"},
    "linear router": {"router": "linear"},
    "shared experts": {"router": "shared-expert", "num_shared_experts": 2},
    "no LFA": {"localized_filtering": False},
    "dense, untied": {"num_experts": 0, "partial_rotary_factor": 1.0, "tie_word_embeddings": False},
    "experts by layer, three a token": {"num_experts": [4, 0, 7], "num_hidden_layers": 3, "num_experts_per_tok": 3},
}
POSITIONS, ENTRIES = [0, 1, 2, 4, 5, 9, 47], 6
"""The tokens whose first logits are kept: the start, both sides of an `<eod>`, after a second one, the end."""


def sequence() -> Tensor:
    ids = torch.arange(48) ** 2 % 23 + 1
    ids[[4, 8]] = 0
    return ids[None]


def model_of(changes: dict) -> CausalLM:
    model = CausalLM(ModelConfig(**SIZES | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = torch.arange(parameter.numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 1000
            noise = torch.frac(torch.sin(12.9898 * place) * 43758.5453)  # In -1 .. 1, without any pattern that matters.
            parameter.copy_((1 + 0.3 * noise if "norm" in name else 0.6 * noise).view(parameter.shape))
    return model.eval()


def run(changes: dict) -> ModelOutput:
    with torch.no_grad():
        return model_of(changes)(sequence())


def kept(output: ModelOutput) -> dict:
    rows = output.logits[0, POSITIONS, :ENTRIES].tolist()
    routes = [routing.experts[POSITIONS].tolist() for routing in output.routings]
    return {"logits": [[round(value, 5) for value in row] for row in rows], "experts": routes}


@pytest.mark.parametrize("case", CASES)
def test_numbers_stay(case):
    output, golden = run(CASES[case]), json.loads(GOLDEN.read_text())[case]
    torch.testing.assert_close(
        output.logits[0, POSITIONS, :ENTRIES], torch.tensor(golden["logits"]), atol=TOLERANCE, rtol=TOLERANCE
    )
    assert kept(output)["experts"] == golden["experts"]


def test_every_case_computes_something_else():
    rows = [torch.tensor(case["logits"]) for case in json.loads(GOLDEN.read_text()).values()]
    assert len(rows) == len(CASES)
    for one, other in itertools.combinations(rows, 2):
        assert (one - other).abs().max().item() > 10 * TOLERANCE


if __name__ == "__main__":
    outputs = {case: run(changes) for case, changes in CASES.items()}
    # Below that another machine's rounding could choose other experts.
    assert all(route_gap(routing) > 1e-5 for output in outputs.values() for routing in output.routings)
    cases = {case: kept(output) for case, output in outputs.items()}
    GOLDEN.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items()) + "\n}\n")
