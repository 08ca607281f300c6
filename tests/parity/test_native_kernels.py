"""The compiled kernels against sums in float64 within their stated bounds, and against themselves bit for bit.

Legend: N tokens, O outputs, I inputs, E experts, F expert width, D hidden, K chosen.
"""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from yuanmoe.errors import UsageError
from yuanmoe.ops import native
from yuanmoe.ops.native.library import VARIANTS, Kernels
from yuanmoe.ops.native.shapes import check_routing
from yuanmoe.ops.products.grouped import experts_reference
from yuanmoe.ops.quantize import groupwise as quant

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
FORMATS = [(bits, group) for bits in quant.BITS for group in quant.GROUP_SIZES]
EPSILON = 2.0**-24
"""Half a unit in the last place of a float32 near 1: the relative error of one rounding."""


def supported() -> list[Kernels]:
    found = []
    for name in VARIANTS:
        try:
            found.append(native.kernels(name))
        except UsageError:
            assert name != "portable"
    return found


def packed(*shape: int, bits: int = 4, group_size: int = 64) -> quant.PackedTensor:
    return quant.pack_weight(quant.quantize_weight(torch.randn(shape) * 0.1, bits, group_size))


def linear_bound(x, weight) -> torch.Tensor:
    """Each group is scaled with two roundings, and each addition of a group rounds once."""
    magnitude = (
        quant.round_activations(x, weight.group_size, torch.float64).abs()
        @ quant.dequantize_weight(weight, torch.float64).abs().mT
    )
    return (weight.scales.shape[-2] + 3) * EPSILON * magnitude


def assert_within(got, expected, bound) -> None:
    assert got.shape == expected.shape
    excess = (got.double() - expected).abs() - bound
    assert not len(excess) or excess.max() <= 0, f"{excess.max()} beyond the bound"


sizes = st.integers(1, 40) | st.integers(1, 300)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 30), rows=sizes, columns=sizes, form=st.sampled_from(FORMATS), seed=st.integers(0, 99))
def test_quantized_linear_is_within_its_bound_on_every_variant(tokens, rows, columns, form, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(tokens, columns), packed(rows, columns, bits=form[0], group_size=form[1])
    results = [kernels.linear(x, weight) for kernels in supported()]
    assert_within(results[0], quant.reference_linear(x, weight, torch.float64), linear_bound(x, weight))
    assert all(torch.equal(result, results[0]) for result in results), "variants differ"


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_extreme_codes_and_scales_do_not_overflow(bits, group_size):
    low = torch.full((20, 256), -(2 ** (bits - 1)), dtype=torch.int8)
    scales = torch.full((20, 256 // group_size), 65504.0).half()
    weight = quant.pack_weight(quant.QuantizedTensor(codes=low, scales=scales, bits=bits, group_size=group_size))
    x = torch.full((7, 256), -1e3)
    for kernels in supported():
        assert_within(
            kernels.linear(x, weight), quant.reference_linear(x, weight, torch.float64), linear_bound(x, weight)
        )


def test_a_token_is_the_same_alone_in_a_batch_and_on_any_number_of_threads():
    x, weight = torch.randn(23, 300), packed(150, 300)
    gate_up, down = packed(5, 2, 100, 300), packed(5, 300, 100, group_size=32)
    shares, experts = torch.rand(23, 2), torch.randint(0, 5, (23, 2))

    def run(rows: slice) -> torch.Tensor:
        mixed = native.quantized_moe(x[rows], gate_up, down, shares[rows], experts[rows])
        return torch.cat([native.quantized_linear(x[rows], weight), mixed], dim=1)

    whole = run(slice(None))
    for step in (1, 4, 9):
        assert torch.equal(torch.cat([run(slice(i, i + step)) for i in range(0, 23, step)]), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(run(slice(None)), whole)
    finally:
        torch.set_num_threads(before)


def hidden_and_error(x, gate_up, expert, group_size):
    """One expert's hidden values as the down matrix sees them, in float64, and how far a kernel's may be from them.

    The float32 rounding of gate and up (taken as 1e-4, some hundred times what it is) shifts a value a little, and to
    the neighbouring code where it is that close to a tie.
    """
    gate, up = (quant.reference_linear(x, quant.matrix_of(gate_up, expert, half), torch.float64) for half in (0, 1))
    hidden = F.silu(gate) * up
    rounded = quant.round_activations(hidden, group_size, torch.float64)
    step = quant.quantize_activations(hidden, group_size)[1].double().repeat_interleave(group_size, -2).squeeze(-1)
    step = step[..., : hidden.shape[-1]]
    near_tie = ((hidden / step - (hidden / step).floor()) - 0.5).abs() < 127e-4
    return rounded, torch.where(near_tie, step, 0.0) + 1e-4 * rounded.abs()


def mixture_and_bound(x, gate_up, down, weights, experts):
    """The sum over each token's experts in float64, and how far a kernel's may be from it."""
    out, bound = torch.zeros(2, len(x), down.out_features, dtype=torch.float64)
    for token, choice in ((n, k) for n in range(len(x)) for k in range(experts.shape[1])):
        expert, share = int(experts[token, choice]), weights[token, choice].double()
        hidden, error = hidden_and_error(x[token], gate_up, expert, down.group_size)
        matrix = quant.dequantize_weight(quant.matrix_of(down, expert), torch.float64)
        rounding = (down.scales.shape[-2] + 5) * EPSILON * hidden.abs()
        out[token] += share * (matrix @ hidden)
        bound[token] += share.abs() * (matrix.abs() @ (error + rounding))
    return out, bound


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(
    ("tokens", "chosen", "num_experts", "one"),
    [(1, 2, 4, False), (0, 2, 4, False), (9, 2, 4, False), (30, 1, 3, True), (5, 3, 1, True)],
)
def test_quantized_moe_is_within_its_bound_on_every_variant(bits, group_size, tokens, chosen, num_experts, one):
    gate_up = packed(num_experts, 2, 77, 50, bits=bits, group_size=group_size)
    down = packed(num_experts, 50, 77, bits=12 - bits, group_size=group_size)
    x, weights = torch.randn(tokens, 50), torch.randn(tokens, chosen)
    experts = torch.full((tokens, chosen), num_experts - 1) if one else torch.randint(0, num_experts, (tokens, chosen))
    results = [kernels.mixture(x, gate_up, down, weights, experts) for kernels in supported()]
    assert_within(results[0], *mixture_and_bound(x, gate_up, down, weights, experts))
    assert all(torch.equal(result, results[0]) for result in results), "variants differ"


@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, 1, 1), (0, 3, 8), (3, 37, 91), (4, 16, 64), (1, 5, 1000), (7, 37, 91), (25, 33, 96), (99, 70, 40)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_linear_is_within_its_bound_on_every_variant(dtype, tokens, rows, columns):
    x, weight = torch.randn(tokens, columns), torch.randn(rows, columns).to(dtype)
    results = [kernels.linear(x, weight) for kernels in supported()]
    bound = (columns / 32 + 7) * EPSILON * (x.double().abs() @ weight.double().abs().mT)
    assert_within(results[0], x.double() @ weight.double().mT, bound)
    assert all(torch.equal(result, results[0]) for result in results), "variants differ"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_whole_weights_a_token_has_the_same_bits_alone_and_in_company(dtype):
    x, weight = torch.randn(41, 200), torch.randn(70, 200).to(dtype)
    for kernels in supported():
        together = kernels.linear(x, weight)
        for first, last in ((0, 1), (3, 5), (7, 20)):
            assert torch.equal(kernels.linear(x[first:last], weight), together[first:last])


@pytest.mark.parametrize("tokens", [4, 50])
def test_bf16_moe_equals_every_expert_on_every_token(tokens):
    gate_up, down = torch.randn(6, 90, 40).bfloat16(), torch.randn(6, 40, 45).bfloat16()
    experts = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)])
    x, weights = torch.randn(tokens, 40), torch.randn(tokens, 2)
    results = [kernels.mixture(x, gate_up, down, weights, experts) for kernels in supported()]
    expected = experts_reference(x, gate_up.float(), down.float(), weights, experts)
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert all(torch.equal(result, results[0]) for result in results), "variants differ"
    if native.suits_bf16(x, gate_up, down):
        assert torch.equal(native.bf16_moe(x, gate_up, down, weights, experts), results[0])


def test_bfloat16_tokens_are_read_exactly_and_results_rounded_once():
    x, weight = torch.randn(5, 130).bfloat16(), packed(33, 130)
    assert torch.equal(native.quantized_linear(x, weight), native.quantized_linear(x.float(), weight).bfloat16())
    plain = torch.randn(33, 130).bfloat16()
    assert torch.equal(native.bf16_linear(x[:4], plain), native.bf16_linear(x[:4].float(), plain).bfloat16())


def test_other_dtypes_and_leading_dimensions():
    x, weight = torch.randn(2, 3, 64).half(), packed(16, 64)
    got = native.quantized_linear(x, weight)
    assert got.dtype == torch.float16
    assert torch.equal(got, native.quantized_linear(x.float().reshape(6, 64), weight).view(2, 3, 16).half())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_becomes_a_plausible_number(value):
    x, weight = torch.randn(2, 128), packed(16, 128)
    x[1, 70] = value
    for kernels in supported():
        out = kernels.linear(x, weight)
        assert out[0].isfinite().all()
        assert out[1].isnan().all()
    assert quant.reference_linear(x, weight)[1].isnan().all()


def test_tiny_and_zero_groups_count_as_zeros():
    x, weight = torch.zeros(2, 64), packed(16, 64)
    x[1] = 1e-36
    for kernels in supported():
        assert not kernels.linear(x, weight).any()
    assert not quant.reference_linear(x, weight).any()


def test_what_does_not_fit_is_refused_before_pointers_cross():
    x, weight = torch.randn(2, 64), packed(16, 64)
    gate_up, down, shares, ids = (
        packed(3, 2, 40, 64),
        packed(3, 64, 40),
        torch.rand(2, 2),
        torch.tensor([[0, 1], [2, 3]]),
    )
    with pytest.raises(UsageError, match="tokens have 63 channels, the weight takes 64"):
        native.quantized_linear(x[:, 1:], weight)
    with pytest.raises(UsageError, match=r"a linear layer has one matrix, this is a stack of \[3\]"):
        native.quantized_linear(x[:, :40], down)
    with pytest.raises(UsageError, match="quantized products have no gradient"):
        native.quantized_linear(x.requires_grad_(), weight)
    with pytest.raises(UsageError, match=r"an expert id is outside 0\.\.2"):
        native.quantized_moe(x.detach(), gate_up, down, shares, ids)
    with pytest.raises(UsageError, match=r"expert id 3 is outside 0\.\.2"):
        quant.reference_mixture(x.detach(), gate_up, down, shares, ids)
    with pytest.raises(UsageError, match=r"pack them as \[E, 2, F, D\]"):
        native.quantized_moe(x.detach(), packed(3, 80, 64), down, shares, ids)
    with pytest.raises(UsageError, match=r"they must be \[F, D\] and \[D, F\]"):
        native.quantized_moe(x.detach(), gate_up, packed(3, 64, 41), shares, ids)
    with pytest.raises(UsageError, match=r"they must be \[N, D\], \[N, K\] and \[N, K\]"):
        check_routing(x, shares[:1], ids)
    with pytest.raises(UsageError, match="5 tokens on cpu do not suit the bfloat16 kernels, which take up to 4"):
        native.bf16_linear(torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(3, 8).bfloat16())


def test_forced_variants_and_a_missing_library(tmp_path):
    with pytest.raises(UsageError, match="'neon' names no kernels; it must be off, portable, avx2, avx512vnni"):
        native.kernels("neon")
    with pytest.raises(UsageError, match=r"gone\.so were not built.*install g\+\+ and then yuanmoe again"):
        native.kernels("portable", tmp_path / "gone.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(UsageError, match=r"broken\.so do not load.*install yuanmoe again"):
        native.kernels("portable", tmp_path / "broken.so")
    for name in set(VARIANTS) - {kernels.variant for kernels in supported()}:
        with pytest.raises(UsageError, match=f"this CPU cannot run the {name} kernels"):
            native.kernels(name)


SCRIPT = """
import torch, warnings
from yuanmoe.ops import native
from yuanmoe.ops.quantize import groupwise as quant
torch.manual_seed(0)
weight = quant.pack_weight(quant.quantize_weight(torch.randn(20, 70), 4, 32))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = [native.quantized_linear(torch.ones(1, 70), weight) for _ in range(2)][0]
print(native.variant(), len(caught), *[w.message for w in caught])
assert torch.allclose(out, quant.reference_linear(torch.ones(1, 70), weight), atol=1e-4)
"""


@pytest.mark.parametrize(
    ("forced", "said"),
    [
        ("portable", "portable 1 this CPU has no AVX2 (or YUANMOE_NATIVE asks for portable)"),
        ("off", "torch 1 YUANMOE_NATIVE=off keeps the compiled kernels out; unset it to use them"),
    ],
)
def test_a_slow_path_is_said_once(forced, said, monkeypatch):
    monkeypatch.setenv("YUANMOE_NATIVE", forced)
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(said), result.stdout


def test_read_bandwidth_is_a_rate():
    rates = native.read_bandwidth(1 << 22, runs=2)
    assert len(rates) == 2
    assert min(rates) > 1e6
