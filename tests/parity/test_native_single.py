"""What the kernels do to single tokens, against the plain formulas, and against themselves bit for bit.

Legend: N tokens, D hidden, H heads, C head channels, E experts, K chosen.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.errors import UsageError
from yuanmoe.model.norm import RMSNorm
from yuanmoe.model.router import attention_scores, choose
from yuanmoe.model.state.key_values import Slots
from yuanmoe.ops import native
from yuanmoe.ops.native.library import Kernels
from yuanmoe.ops.relations import relate_reference
from yuanmoe.ops.rotary import rotary_tables, rotate

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture
def without_kernels(monkeypatch):
    """Makes the model compute as it does where there is no library."""
    return lambda: monkeypatch.setattr(native, "single", lambda *_: None)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), width=st.integers(1, 90), dtype=dtypes)
def test_a_norm_is_that_of_torch_and_of_each_token_alone(tokens, width, dtype):
    torch.manual_seed(0)
    norm = RMSNorm(width, 1e-6).to(dtype).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(tokens, width).to(dtype)
    got = norm(x)
    expected = F.rms_norm(x.double(), (width,), norm.weight.double(), 1e-6)
    assert (got.double() - expected).abs().le(expected.abs() * torch.finfo(dtype).eps * 3 + 1e-12).all()
    assert all(torch.equal(norm(row[None])[0], alone) for row, alone in zip(x, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles", [0, 8, 24])
def test_a_rotation_is_the_very_same(dtype, angles, without_kernels):
    x = torch.randn(20, 3, 24).to(dtype)
    tables = rotary_tables(torch.arange(20), angles, 1e4, "float32")
    got = rotate(x, tables)
    without_kernels()
    assert torch.equal(got, rotate(x, tables))


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), experts=st.integers(1, 64), dtype=dtypes)
def test_relations_of_experts_follow_the_formula(tokens, experts, dtype):
    torch.manual_seed(0)
    projected = torch.randn(tokens, 3 * experts).to(dtype)
    expected = relate_reference(*projected.double().chunk(3, dim=-1))
    got = attention_scores(projected)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_more_experts_than_the_kernel_holds_are_related_all_the_same():
    projected = torch.randn(2, 3 * (native.MAX_EXPERTS + 1))
    expected = relate_reference(*projected.chunk(3, dim=-1))
    torch.testing.assert_close(attention_scores(projected), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), experts=st.integers(1, 12), data=st.data())
def test_the_choice_is_that_of_a_stable_sort(tokens, experts, data):
    chosen = data.draw(st.integers(1, experts))
    logits = torch.randint(-2, 3, (tokens, experts)).float()  # many equals
    routing = choose(logits, chosen)
    order = logits.argsort(dim=-1, descending=True, stable=True)[:, :chosen]
    assert torch.equal(routing.experts, order)
    torch.testing.assert_close(routing.weights, logits.gather(1, order).softmax(dim=-1))


def test_what_is_not_a_number_is_chosen_and_seen():
    logits = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan] * 3, [0.0, 2.0, 1.0]])
    routing = choose(logits, 2)
    assert routing.experts.tolist() == [[1, 2], [0, 1], [1, 2]]
    assert routing.weights.isnan().all(dim=1).tolist() == [True, True, False]
    assert attention_scores(logits.repeat(1, 3)).isnan().any(dim=1).tolist() == [True, True, False]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_torch_would_store(stored, dtype, without_kernels):
    ours, theirs = (Slots((3, 2, 7, 21), stored, "cpu") for _ in range(2))
    for slots in (ours, theirs):
        slots.values.zero_()
    rows, positions = torch.tensor([2, 0, 0, 1]), torch.tensor([6, 0, 3, 4])
    x = torch.randn(4, 2, 21).to(dtype)
    ours.write(rows, positions, x)
    without_kernels()
    theirs.write(rows, positions, x)
    assert torch.equal(ours.values, theirs.values)
    if ours.scales is not None and theirs.scales is not None:
        assert torch.equal(ours.scales[rows, :, positions], theirs.scales[rows, :, positions])


def test_slots_that_are_not_there_are_refused():
    slots = Slots((3, 2, 7, 21), torch.bfloat16, "cpu")
    for row, position in ((3, 0), (-1, 0), (0, 7), (0, -1)):
        with pytest.raises(UsageError, match=r"a page or slot is outside 0\.\.2 x 0\.\.6, what is stored"):
            slots.write(torch.tensor([row]), torch.tensor([position]), torch.randn(1, 2, 21))


def test_what_the_kernels_do_not_take_is_left_to_torch():
    x = torch.randn(4, 6)
    assert isinstance(native.single(x, x), Kernels)
    assert native.single(x.double()) is None
    assert native.single(x, x.bfloat16()) is None
    assert native.single(x.T) is None
    assert native.single(x.to("meta")) is None
    assert native.single(x, torch.ones(6, requires_grad=True)) is None
    with torch.no_grad():
        assert native.single(x, torch.ones(6, requires_grad=True)) is not None
    assert native.storing(x, torch.empty(2, 2, dtype=torch.int16)) is None
