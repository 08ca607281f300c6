"""Attention of the compiled kernels against torch in float64, and against itself bit for bit.

Legend: B sequences, T slots, H heads, C head channels, N new tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.errors import UsageError
from yuanmoe.model.key_values import Slots, attend
from yuanmoe.ops import native
from yuanmoe.ops.attention import causal_attention

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
STORED = (torch.float32, torch.bfloat16, torch.int8)
BOUND = 2e-5
"""Of the distance to the exact result over the keys and values as they are stored."""


def filled(B: int, H: int, T: int, C: int, dtype: torch.dtype) -> tuple[Slots, Slots]:
    both = Slots((B, H, T, C), dtype, "cpu"), Slots((B, H, T, C), dtype, "cpu")
    rows, positions = torch.arange(B).repeat_interleave(T), torch.arange(T).repeat(B)
    for slots in both:
        slots.write(rows, positions, torch.randn(B * T, H, C))
    return both


def exact(q, keys, values, past, new):
    rows = []
    for row, (mine, before, count) in enumerate(zip(q.double().split(new), past, new, strict=True)):
        k, v = (slots.read(slice(row, row + 1), before + count, torch.float64) for slots in (keys, values))
        rows.append(causal_attention(mine[None], k, v, 0.0)[0])
    return torch.cat(rows)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 40)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    channels=st.integers(1, 80),
    dtype=st.sampled_from(STORED),
)
@torch.inference_mode()
def test_attention_is_that_of_torch_in_float64(lengths, heads, channels, dtype):
    torch.manual_seed(0)
    past, new = [before for before, _ in lengths], [count for _, count in lengths]
    if not any(new):
        return
    keys, values = filled(len(new), heads, max(map(sum, lengths)), channels, dtype)
    q = torch.randn(sum(new), heads, channels)
    assert native.suits_attention(q, keys.values, values.values)
    got = attend(q, keys, values, past, new)
    assert (got - exact(q, keys, values, past, new)).abs().max() < BOUND


@torch.inference_mode()
def test_a_query_is_the_same_alone_and_among_others_on_any_number_of_threads():
    torch.manual_seed(0)
    keys, values = filled(2, 4, 100, 64, torch.bfloat16)
    q = torch.randn(100, 4, 64)
    together = attend(q, keys, values, [40, 0], [60, 40])
    threads = torch.get_num_threads()
    for token in (0, 31, 59):
        torch.set_num_threads(3 - torch.get_num_threads() if threads < 3 else 1)
        alone = attend(q[token : token + 1], keys, values, [40 + token, 0], [1, 0])
        torch.set_num_threads(threads)
        assert torch.equal(alone[0], together[token])


def test_what_does_not_suit_is_refused_before_pointers_cross():
    keys, values = filled(1, 2, 10, 16, torch.float32)
    q = torch.randn(3, 2, 16)
    with pytest.raises(UsageError, match=r"\[4\] new tokens behind \[6\] do not fit 3 queries and \[1, 2"):
        native.attention(q, keys.values, values.values, [6], [4])
    with pytest.raises(UsageError, match=r"\[3\] new tokens behind \[8\] do not fit"):
        native.attention(q, keys.values, values.values, [8], [3])
    with pytest.raises(UsageError, match="ask suits_attention first"):
        native.attention(q.double(), keys.values, values.values, [6], [3])
    with pytest.raises(UsageError, match="does not suit the kernel"):
        native.attention(q, keys.values.to(torch.int8), values.values.to(torch.int8), [6], [3])
    assert not native.suits_attention(q.requires_grad_(), keys.values, values.values)
