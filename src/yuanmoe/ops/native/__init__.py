"""Matrix products with 4-bit, 8-bit, bfloat16 and float32 weights on the CPU, at the speed of its memory.

A result is the same number, bit for bit, for any thread count, batch, neighbour in the batch and variant of the
library. Where the library is missing, quantized products go through torch (`ops.quantize.groupwise`): the same
arithmetic to within float32 rounding, much slower, and a warning says so once. `docs/kernels.md` has the layout,
bounds and measurements. Not here: gradients; training works on dequantized weights.
Legend: N tokens, O outputs, I inputs, E experts, F expert width, FF = 2 F, D hidden, K chosen, B sequences, P slots of
a page, M pages of a sequence, H heads, C head channels.
"""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from yuanmoe.errors import UsageError
from yuanmoe.ops.native.choice import available, chosen, kernels, reason, variant
from yuanmoe.ops.native.library import Kernels
from yuanmoe.ops.native.shapes import (
    PAGE_SLOTS,
    check_experts,
    check_lengths,
    check_packed_experts,
    check_routing,
    check_token_shape,
    readable,
    readable_routing,
)
from yuanmoe.ops.native.structures import DTYPES, STORED
from yuanmoe.ops.quantize import groupwise as quant
from yuanmoe.ops.quantize.groupwise import PackedTensor

__all__ = [
    "MAX_EXPERTS",
    "PAGE_SLOTS",
    "attention",
    "available",
    "bf16_linear",
    "bf16_moe",
    "kernels",
    "quantized_linear",
    "quantized_moe",
    "read_bandwidth",
    "reason",
    "single",
    "storing",
    "suits_attention",
    "suits_bf16",
    "suits_whole",
    "variant",
    "whole_linear",
    "whole_moe",
]

MAX_EXPERTS = 256
"""Whose relations the router's kernel holds on its stack (`kMaxExperts` in csrc/layout.h)."""
BF16_UP_TO_TOKENS = 4
"""Beyond, torch's matrix product is faster than a pass over the weights for each token, except with AVX-512."""
CACHED_BYTES = 1 << 19
"""Weights that a pass for each token reads from a core's cache: M32's router has 393 KB."""


def quantized_linear(x: Float[Tensor, "*N I"], weight: PackedTensor) -> Float[Tensor, "*N O"]:
    """`x` times the transposed weight, in the dtype of `x`; activations are rounded to 8 bits a group.

    Raises UsageError for shapes that do not fit and where a gradient is asked for.
    """
    check_token_shape(x, weight.in_features, weight.codes)
    if weight.codes.ndim != 3:
        raise UsageError(f"a linear layer has one matrix, this is a stack of {list(weight.codes.shape[:-3])}")
    found = _kernels_for(x)
    if found is None:
        return quant.reference_linear(x, weight).to(x.dtype)
    out = found.linear(readable(x), weight)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def quantized_moe(
    x: Float[Tensor, "N D"],
    gate_up: PackedTensor,
    down: PackedTensor,
    weights: Float[Tensor, "N K"],
    experts: Int[Tensor, "N K"],
) -> Float[Tensor, "N D"]:
    """For each token the sum over its `experts` of `weights` times expert(x); gate_up is packed as [E, 2, F, D].

    The hidden values are rounded to 8 bits a group like the tokens; the sum is in float32, in the order of `experts`.
    Raises UsageError for shapes and ids that do not fit and where a gradient is asked for.
    """
    check_token_shape(x, gate_up.in_features, gate_up.codes, down.codes)
    check_packed_experts(gate_up, down)
    check_routing(x, weights, experts)
    found = _kernels_for(x)
    if found is None:
        return quant.reference_mixture(x, gate_up, down, weights, experts).to(x.dtype)
    return found.mixture(readable(x), gate_up, down, *readable_routing(weights, experts)).to(x.dtype)


def suits_bf16(x: Tensor, *weights: Tensor) -> bool:
    """Whether the bfloat16 kernels take these: few tokens, contiguous bfloat16 on the CPU, no gradient, a library.

    Any number of tokens with AVX-512; and of float32 ones over weights that stay in the cache of a core, such as a
    router's: in a quantized model the experts of a token must not depend on how many tokens were computed with it.
    """
    few = x.numel() <= BF16_UP_TO_TOKENS * x.shape[-1]
    cached = x.dtype == torch.float32 and sum(weight.nbytes for weight in weights) <= CACHED_BYTES
    if not (few or cached) and not _multiplies_tiles():
        return False
    gradient = torch.is_grad_enabled()
    if not x.is_cpu or (gradient and x.requires_grad):
        return False
    for weight in weights:  # a loop, as all() takes longer than the rest of this
        if weight.dtype != torch.bfloat16 or not weight.is_cpu or not weight.is_contiguous():
            return False
        if gradient and weight.requires_grad:
            return False
    return chosen() is not None


def bf16_linear(x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*N O"]:
    """`x` times the transposed bfloat16 weight, summed in float32, for what `suits_bf16`."""
    _check_bf16(x, weight)
    return whole_linear(x, weight)


def bf16_moe(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E FF D"],
    down: Float[Tensor, "E D F"],
    weights: Float[Tensor, "N K"],
    experts: Int[Tensor, "N K"],
) -> Float[Tensor, "N D"]:
    """`quantized_moe` with bfloat16 weights and hidden values in float32, for what `suits_bf16`."""
    _check_bf16(x, gate_up, down)
    return whole_moe(x, gate_up, down, weights, experts)


def suits_whole(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels for whole weights take these: float32 or bfloat16 on the CPU, contiguous, no gradient.

    They take any number of tokens; for many of them `torch` is faster, but its sums depend on how many there are.
    """
    gradient = torch.is_grad_enabled()
    if not x.is_cpu or x.dtype not in DTYPES or (gradient and x.requires_grad):
        return False
    for weight in weights:
        if weight.dtype not in DTYPES or not weight.is_cpu or not weight.is_contiguous():
            return False
        if gradient and weight.requires_grad:
            return False
    return chosen() is not None


def whole_linear(x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*N O"]:
    """`x` times the transposed weight, bfloat16 or float32, for what `suits_whole`."""
    check_token_shape(x, weight.shape[1], weight)
    return _kernels_for_whole(x, weight).linear(readable(x), weight).to(x.dtype)


def whole_moe(
    x: Float[Tensor, "N D"],
    gate_up: Float[Tensor, "E FF D"],
    down: Float[Tensor, "E D F"],
    weights: Float[Tensor, "N K"],
    experts: Int[Tensor, "N K"],
) -> Float[Tensor, "N D"]:
    """`quantized_moe` with whole weights and hidden values in float32, for what `suits_whole`."""
    check_token_shape(x, gate_up.shape[2], gate_up, down)
    check_experts((gate_up.shape[1] // 2, gate_up.shape[2]), (down.shape[1], down.shape[2]))
    check_routing(x, weights, experts)
    found = _kernels_for_whole(x, gate_up, down)
    return found.mixture(readable(x), gate_up, down, *readable_routing(weights, experts)).to(x.dtype)


def suits_attention(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel takes these: float32 or bfloat16 on the CPU, int8 keys and values too, no gradient."""
    return (
        q.is_cpu
        and q.dtype in DTYPES
        and keys.dtype == values.dtype
        and keys.dtype in STORED
        and keys.is_contiguous()
        and values.is_contiguous()
        and not (torch.is_grad_enabled() and q.requires_grad)
        and available()
    )


def attention(
    q: Float[Tensor, "N H C"],
    keys: Shaped[Tensor, "pages H P C"],
    values: Shaped[Tensor, "pages H P C"],
    past: Sequence[int],
    new: Sequence[int],
    scales: tuple[Float[Tensor, "pages H P"], Float[Tensor, "pages H P"]] | None = None,
    pages: Int[Tensor, "B M"] | None = None,
) -> Float[Tensor, "N H C"]:
    """Causal attention of the last `new[b]` tokens of each sequence to all its slots, for what `suits_attention`.

    Slot t of sequence b is slot t % P of page `pages[b, t // P]`; the table is int32, contiguous and on the CPU, its
    entries behind the last filled slot are not read, and sequences may share pages. P is a multiple of PAGE_SLOTS,
    unless no sequence has more than one page. Without a table page b is sequence b. Slots `past[b]` to
    `past[b] + new[b]` hold the new tokens themselves; int8 keys and values have a scale each. A query's result is the
    same number, bit for bit, whatever is computed with it and however its slots lie.
    Raises UsageError for what does not fit, pages outside the storage included.
    """
    if not suits_attention(q, keys, values) or (keys.dtype == torch.int8) != (scales is not None):
        raise UsageError(
            f"{q.dtype} over {keys.dtype} on {q.device} does not suit the kernel; ask suits_attention first"
        )
    check_lengths(len(q), keys.shape, past, new, pages)
    found = chosen()
    assert found is not None, "suits_attention asks for the library"
    return found.attention(q.contiguous(), keys, values, scales, past, new, pages)


def single(*tensors: Tensor) -> Kernels | None:
    """The kernels for what is done to single tokens (`rms_norm`, `rotate`, `relate`, `choose`), if they take these.

    They take one of float32 and bfloat16 on the CPU, contiguous, without a gradient; they check nothing themselves. In
    float32 throughout, rounded once; a token's result does not depend on what is computed with it.
    """
    dtype, gradient = tensors[0].dtype, torch.is_grad_enabled()
    if dtype not in DTYPES:
        return None
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return None
        if gradient and tensor.requires_grad:
            return None
    return chosen()


def storing(x: Tensor, slots: Tensor) -> Kernels | None:
    """The same for putting `x` into `slots` (`store`), which may be int8 too."""
    suits = slots.dtype in STORED and slots.is_cpu and slots.is_contiguous()
    return single(x) if suits else None


def read_bandwidth(size_bytes: int = 1 << 29, runs: int = 5) -> list[float]:
    """Bytes a second at which all threads read memory, `runs` times.

    Raises UsageError where the library is not used.
    """
    found = chosen()
    if found is None:
        raise UsageError(f"the read bandwidth is measured by the compiled kernels: {reason()}")
    data = torch.ones(size_bytes, dtype=torch.uint8)
    rates = []
    for _ in range(runs):
        start = time.perf_counter()
        found.read(data)
        rates.append(size_bytes / (time.perf_counter() - start))
    return rates


def _multiplies_tiles() -> bool:
    """Whether a bfloat16 weight that was read meets several tokens at once (`kWholeTile`, six of them)."""
    return variant() == "avx512vnni"


def _kernels_for(x: Tensor) -> Kernels | None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UsageError("quantized products have no gradient; train on dequantized weights, or run under no_grad")
    return chosen() if x.is_cpu else None


def _check_bf16(x: Tensor, *weights: Tensor) -> None:
    if not suits_bf16(x, *weights):
        raise UsageError(
            f"{x.numel() // x.shape[-1]} tokens on {x.device} do not suit the bfloat16 kernels, which take up to "
            f"{BF16_UP_TO_TOKENS} (with AVX-512 any number) on the CPU without gradients and contiguous bfloat16 "
            "weights; ask suits_bf16 first"
        )


def _kernels_for_whole(x: Tensor, *weights: Tensor) -> Kernels:
    found = chosen()
    if found is None or any(weight.dtype not in DTYPES or not weight.is_contiguous() for weight in weights):
        dtypes = ", ".join(str(weight.dtype) for weight in weights)
        raise UsageError(
            f"weights in {dtypes} on {x.device} do not suit the kernels for whole weights, which take contiguous "
            "bfloat16 and float32 on the CPU; ask suits_whole first"
        )
    return found
