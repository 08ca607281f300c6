"""Attention of the compiled kernels against torch in float64, and against itself bit for bit.

Legend: B sequences, T slots, H heads, C head channels, N new tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.errors import UsageError
from yuanmoe.model.state.key_values import Slots, attend
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
    channels=st.integers(1, 80) | st.sampled_from((128, 256, 288)),
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


def in_pages(slots: Slots, size: int, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The slots [B, H, T, C] as pages of `size` slots, page i of them at place order[i]."""

    def paged(whole: torch.Tensor) -> torch.Tensor:
        pages = whole.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
        return torch.empty_like(pages).index_copy_(0, order, pages).contiguous()

    return paged(slots.values), None if slots.scales is None else paged(slots.scales)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [32, 64, 192])
@torch.inference_mode()
def test_pages_in_any_order_give_the_very_numbers_of_one_run_of_memory(dtype, size):
    torch.manual_seed(0)
    keys, values = filled(3, 2, 192, 40, dtype)
    past, new = [100, 0, 31], [70, 33, 2]
    q = torch.randn(sum(new), 2, 40)
    whole = attend(q, keys, values, past, new)
    order = torch.randperm(3 * 192 // size)
    (k, k_scales), (v, v_scales) = (in_pages(slots, size, order) for slots in (keys, values))
    table = order.view(3, -1).to(torch.int32)
    for row, length in enumerate(map(sum, zip(past, new, strict=True))):
        table[row, -(-length // size) :] = -1  # nobody reads these
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    assert torch.equal(native.attention(q, k, v, past, new, scales, table), whole)


def test_page_tables_that_do_not_fit_are_refused():
    q, storage = torch.randn(3, 2, 16), torch.randn(4, 2, 32, 16)

    def attention(table, kv=storage, past=(40,)):
        return native.attention(q, kv, kv, past, [3], None, table)

    table = torch.tensor([[3, 1]], dtype=torch.int32)
    assert attention(table).isfinite().all()
    for bad in (torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([[-1, 1]], dtype=torch.int32)):
        with pytest.raises(UsageError, match=r"a page or slot is outside 0\.\.3 x 0\.\.31"):
            attention(bad)
    with pytest.raises(UsageError, match=r"a page table \[1, 2\] of torch.int64 on cpu; it must be"):
        attention(table.long())
    with pytest.raises(UsageError, match="pages of 20 slots; several pages a sequence must hold a multiple of 32"):
        attention(table, storage[:, :, :20].contiguous())
    with pytest.raises(UsageError, match=r"\[3\] new tokens behind \[62\] do not fit 3 queries and 1 x 64 slots"):
        attention(table, past=(62,))


def test_what_does_not_suit_is_refused_before_pointers_cross():
    keys, values = filled(1, 2, 10, 16, torch.float32)
    q = torch.randn(3, 2, 16)
    with pytest.raises(UsageError, match=r"\[4\] new tokens behind \[6\] do not fit 3 queries and 1 x 10"):
        native.attention(q, keys.values, values.values, [6], [4])
    with pytest.raises(UsageError, match=r"\[3\] new tokens behind \[8\] do not fit"):
        native.attention(q, keys.values, values.values, [8], [3])
    with pytest.raises(UsageError, match="ask suits_attention first"):
        native.attention(q.double(), keys.values, values.values, [6], [3])
    with pytest.raises(UsageError, match="does not suit the kernel"):
        native.attention(q, keys.values.to(torch.int8), values.values.to(torch.int8), [6], [3])
    assert not native.suits_attention(q.requires_grad_(), keys.values, values.values)
