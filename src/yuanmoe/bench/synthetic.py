"""A quantized model of any preset with random weights, made directly in the packed layout: no files, no larger copy.

Codes are uniform and scales of one size, such that weights vary as at the start of training: activations stay finite,
and tokens choose their experts about evenly. What it says is noise, what it costs is what a real model costs.
"""

import math

import torch
from torch import Tensor

from yuanmoe.checkpoint.formats.packed_weight import packed_formats
from yuanmoe.config import ModelConfig
from yuanmoe.model.quantized.build import QuantizedYuan, quantized_model
from yuanmoe.ops.quantize.groupwise import PackedTensor
from yuanmoe.ops.quantize.packed_format import PackedFormat
from yuanmoe.plan.cost import Precision


def synthetic_model(config: ModelConfig, precision: Precision) -> QuantizedYuan:
    """A model as `checkpoint.load` would map it: float32 activations and vectors, whole matrices in bfloat16.

    Uses torch's global generator.
    """
    formats = packed_formats(config, precision)
    with torch.device("meta"):
        model = quantized_model(config, formats, torch.float32)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, form in formats.items():
        packed = random_packed(form, config.initializer_range)
        state |= {f"{name}.codes": packed.codes, f"{name}.scales": packed.scales}
    for name, shape in shapes.items():
        if name not in state:
            state[name] = _random_whole(name, shape, config.initializer_range)
    model.load_state_dict(state, assign=True)
    return model.eval()


def random_packed(form: PackedFormat, deviation: float = 0.02) -> PackedTensor:
    """Weights of a format with this standard deviation."""
    codes = torch.empty(form.codes_shape, dtype=torch.uint8)
    codes.view(torch.int64).random_()  # eight at a time: six times as fast
    scale = deviation / math.sqrt((4**form.bits - 1) / 12)
    # Of both signs: codes are -0.5 on average, and a sum of such weights would send all tokens to the same experts.
    signs = torch.randint(0, 2, form.scales_shape, dtype=torch.float16)
    return form.tensor(codes, signs.mul_(2 * scale).sub_(scale))


def _random_whole(name: str, shape: torch.Size, deviation: float) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if len(shape) == 1:
        return torch.zeros(shape)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, deviation)
