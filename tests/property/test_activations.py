"""The count of what the backward pass needs, against what torch keeps for it."""

import pytest
import torch

from yuanmoe.config import ModelConfig
from yuanmoe.model.decoder import CausalLM
from yuanmoe.ops.cross_entropy import BLOCK_TOKENS
from yuanmoe.plan.activations import CHECKPOINTING, LOSS_BLOCK, kept_bytes
from yuanmoe.presets import preset

TOKENS = 64


def kept_by_torch(config: ModelConfig) -> int:
    """Bytes of all tensors saved in a forward pass, each storage once, parameters not."""
    model = CausalLM(config).to(torch.bfloat16)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model.initialize().read(torch.randint(5, config.vocab_size, (1, TOKENS)))
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0, "intermediate_size": 192},
        {"num_experts": 8},
        {"num_experts": 32},
        {"num_experts": 8, "router": "linear"},
        {"num_experts": 8, "router": "shared-expert", "num_shared_experts": 2},
        {"num_experts": 8, "localized_filtering": False},
    ],
)
def test_a_layer_keeps_what_is_counted(changes: dict) -> None:
    torch.manual_seed(0)
    config = preset("nano", **changes)
    layer = kept_by_torch(config.replace(num_hidden_layers=2)) - kept_by_torch(config.replace(num_hidden_layers=1))
    num_experts = config.experts_per_layer[0]
    assert TOKENS * kept_bytes(config, num_experts, "none", fused_norms=False) == pytest.approx(layer, rel=0.04)


@pytest.mark.parametrize("num_experts", [0, 8, 32])
def test_checkpointing_keeps_less(num_experts: int) -> None:
    config = preset("nano", intermediate_size=192)
    none, selective, full = (kept_bytes(config, num_experts, kind) for kind in CHECKPOINTING)
    assert none > selective > full == 2 * config.hidden_size


def test_the_loss_has_the_blocks_of_training() -> None:
    assert LOSS_BLOCK == BLOCK_TOKENS
