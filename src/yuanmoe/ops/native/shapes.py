"""What fits together: checks of tokens, weights and routing before pointers cross into the library.

Legend: N tokens, D hidden, E experts, F expert width, K chosen, B sequences, P slots of a page.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from yuanmoe.errors import UsageError
from yuanmoe.ops.native.structures import DTYPES
from yuanmoe.ops.quantize.groupwise import PackedTensor

PAGE_SLOTS = 32
"""Pages hold a multiple of so many keys, which the attention kernel takes at once (`kKeysAtOnce` in csrc/layout.h)."""


def check_token_shape(x: Tensor, in_features: int, *weights: Tensor) -> None:
    """Raises UsageError unless `x` has `in_features` channels and lies where `weights` do."""
    if x.shape[-1] != in_features:
        raise UsageError(f"tokens have {x.shape[-1]} channels, the weight takes {in_features}")
    for weight in weights:
        if weight.device != x.device:
            raise UsageError(f"tokens are on {x.device}, the weight is on {weight.device}; move one to the other")


def check_packed_experts(gate_up: PackedTensor, down: PackedTensor) -> None:
    """Raises UsageError unless these are stacks of E x 2 and E matrices that fit."""
    stacks = gate_up.codes.shape[:-3], down.codes.shape[:-3]
    if len(stacks[1]) != 1 or stacks[0] != (*stacks[1], 2):
        raise UsageError(
            f"gate_up is {list(stacks[0])} matrices and down {list(stacks[1])}; pack them as [E, 2, F, D] and [E, D, F]"
        )
    check_experts((gate_up.out_features, gate_up.in_features), (down.out_features, down.in_features))


def check_experts(gate: tuple[int, int], down: tuple[int, int]) -> None:
    """Raises UsageError unless gate is [F, D] and down [D, F]."""
    if gate != down[::-1]:
        raise UsageError(f"experts of {list(gate)} up and {list(down)} down; they must be [F, D] and [D, F]")


def check_routing(x: Tensor, weights: Tensor, experts: Tensor) -> None:
    """Raises UsageError unless each of the N tokens has K experts and K weights."""
    if x.ndim != 2 or weights.shape != experts.shape or weights.ndim != 2 or len(weights) != len(x):
        raise UsageError(
            f"tokens {list(x.shape)}, weights {list(weights.shape)} and experts {list(experts.shape)} do not fit; "
            "they must be [N, D], [N, K] and [N, K]"
        )


def check_lengths(
    tokens: int, storage: Sequence[int], past: Sequence[int], new: Sequence[int], pages: Tensor | None
) -> None:
    """Raises UsageError unless `new` tokens behind `past` are all tokens and fit the storage [pages, H, P, C]."""
    slots = storage[2]
    if pages is not None:
        if (pages.dtype, pages.device.type, pages.ndim) != (torch.int32, "cpu", 2) or not pages.is_contiguous():
            raise UsageError(
                f"a page table {list(pages.shape)} of {pages.dtype} on {pages.device}; "
                "it must be [sequences, pages], int32, contiguous and on the CPU"
            )
        if slots % PAGE_SLOTS and pages.shape[1] > 1:
            raise UsageError(f"pages of {slots} slots; several pages a sequence must hold a multiple of {PAGE_SLOTS}")
        slots *= pages.shape[1]
    sequences = storage[0] if pages is None else len(pages)
    longest = max((before + count for before, count in zip(past, new, strict=True)), default=0)
    if sum(new) != tokens or len(new) != sequences or longest > slots or min((*past, *new), default=0) < 0:
        raise UsageError(
            f"{list(new)} new tokens behind {list(past)} do not fit {tokens} queries and {sequences} x {slots} slots"
        )


def readable(x: Tensor) -> Tensor:
    """`x` as the kernels read it: contiguous, float32 or bfloat16."""
    if x.dtype not in DTYPES:
        x = x.float()
    return x if x.is_contiguous() else x.contiguous()


def readable_routing(weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Routing as the kernels read it: contiguous float32 and int64."""
    return weights.to(torch.float32).contiguous(), experts.to(torch.int64).contiguous()
