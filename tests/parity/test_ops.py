"""Each operation against the plainest way to say it: loops, explicit softmax, complex numbers, real convolutions."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from yuanmoe.model.attention import LocalizedFilter
from yuanmoe.model.norm import RMSNorm
from yuanmoe.model.router import attention_scores, choose
from yuanmoe.model.state.sequences import WholeSequences
from yuanmoe.ops.attention import attend_runs, causal_attention
from yuanmoe.ops.products import grouped
from yuanmoe.ops.products import linear as products
from yuanmoe.ops.products.grouped import combine, dispatch, experts_forward, experts_reference, grouped_linear
from yuanmoe.ops.rotary import rotary_tables, rotate


def _random_experts(N, D, E, F_, K, dtype=torch.float32, only=None):
    """Inputs of `experts_forward`; `only` sends every token to the experts from that one on."""
    x = torch.randn(N, D, dtype=dtype)
    gate_up, down = torch.randn(E, 2 * F_, D, dtype=dtype) / D**0.5, torch.randn(E, D, F_, dtype=dtype) / F_**0.5
    logits = torch.randn(N, E)
    if only is not None:
        logits[:, only : only + K] += 100
    routing = choose(logits, K)
    return x, gate_up, down, routing.weights, routing.experts


SIZES = [
    pytest.param({"N": 0, "D": 8, "E": 4, "F_": 4, "K": 2}, id="no tokens"),
    pytest.param({"N": 1, "D": 8, "E": 4, "F_": 4, "K": 2}, id="one token"),
    pytest.param({"N": 4, "D": 16, "E": 32, "F_": 8, "K": 2}, id="few tokens, most experts idle"),
    pytest.param({"N": 33, "D": 16, "E": 8, "F_": 12, "K": 2}, id="aligned"),
    pytest.param({"N": 33, "D": 13, "E": 5, "F_": 7, "K": 3}, id="odd sizes"),
    pytest.param({"N": 9, "D": 8, "E": 1, "F_": 4, "K": 1}, id="one expert"),
    pytest.param({"N": 40, "D": 8, "E": 6, "F_": 4, "K": 2, "only": 3}, id="all tokens on the same experts"),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("grad", [False, True], ids=["gathered when few", "grouped"])
def test_experts_compute_the_mixture(sizes, grad):
    inputs = _random_experts(**sizes)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(experts_forward(*inputs), experts_reference(*inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_experts_compute_the_mixture_in_every_dtype(dtype):
    inputs = _random_experts(N=20, D=16, E=4, F_=8, K=2, dtype=dtype)
    exact = experts_reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    error = (experts_forward(*inputs).double() - exact).abs().max() / exact.std()
    # The weights and their sum are float32 even for float64 experts.
    assert error < max(1e-6, 4 * torch.finfo(dtype).eps)


def test_the_gathered_path_is_the_one_for_few_tokens(monkeypatch):
    inputs = _random_experts(N=grouped.GATHERED_UP_TO_TOKENS, D=8, E=4, F_=4, K=2)
    expected = experts_reference(*inputs)
    monkeypatch.setattr(grouped, "dispatch", None)
    with torch.no_grad():
        torch.testing.assert_close(experts_forward(*inputs), expected)


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("D", [16, 13], ids=["grouped matmul", "loop over experts"])
@pytest.mark.parametrize("N", [6, 70], ids=["small groups", "large groups"])
def test_bfloat16_experts_stay_within_rounding(monkeypatch, widened, D, N):
    monkeypatch.setattr(products, "has_bfloat16_matmul", lambda: not widened)
    inputs = _random_experts(N=N, D=D, E=4, F_=8, K=2, dtype=torch.bfloat16)
    exact = experts_reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    with torch.no_grad():
        error = (experts_forward(*inputs).double() - exact).abs().max()
    assert error < 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("D", [16, 13], ids=["grouped matmul", "loop over experts"])
def test_gradients_of_the_experts_are_those_of_the_reference(D):
    inputs = _random_experts(N=24, D=D, E=6, F_=8, K=2)  # Some experts stay without tokens in some draws.
    towards = torch.randn(24, D)

    def gradients(function):
        leaves = [t.detach().requires_grad_() for t in inputs[:4]]
        function(*leaves, inputs[4]).backward(towards)
        return [leaf.grad for leaf in leaves]

    for fast, plain in zip(gradients(experts_forward), gradients(experts_reference), strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)


def test_an_idle_expert_has_a_zero_gradient():
    x, gate_up, down, weights, experts = _random_experts(N=12, D=8, E=6, F_=4, K=2, only=2)
    gate_up.requires_grad_()
    experts_forward(x, gate_up, down, weights, experts).sum().backward()
    idle = [0, 1, 4, 5]
    assert not gate_up.grad[idle].any()
    assert all(gate_up.grad[e].any() for e in (2, 3))


@pytest.mark.parametrize("D", [16, 13], ids=["grouped matmul", "loop over experts"])
def test_grouped_linear_gives_each_group_its_matrix(D):
    counts = torch.tensor([0, 3, 0, 1, 5, 0])
    x, weight = torch.randn(9, D), torch.randn(6, 8, D)
    owner = torch.arange(6).repeat_interleave(counts)
    expected = torch.stack([weight[e] @ row for row, e in zip(x, owner, strict=True)])
    torch.testing.assert_close(grouped_linear(x, weight, counts), expected)


@given(st.data())
def test_combine_is_the_inverse_of_dispatch(data):
    N, K, E = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 3)), data.draw(st.integers(3, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(N, 4, generator=generator)
    experts = torch.rand(N, E, generator=generator).argsort(dim=-1)[:, :K]
    sent = dispatch(x, experts, E)
    assert sent.counts.tolist() == [int((experts == e).sum()) for e in range(E)]
    groups = sent.tokens.split(sent.counts.tolist())
    for e, group in enumerate(groups):
        assert torch.equal(group, x[(experts == e).any(dim=1)]), "first tokens first"
    torch.testing.assert_close(combine(sent.tokens, sent.order, torch.full((N, K), 1 / K)), x)


@pytest.mark.parametrize("rotary_dim", [8, 4, 2])
def test_rotation_is_a_product_of_complex_numbers(rotary_dim):
    N, H, C, theta = 5, 3, 8, 10000.0
    positions = torch.tensor([0, 1, 7, 300, 4095])
    x = torch.randn(N, H, C)
    out = rotate(x, rotary_tables(positions, rotary_dim, theta, "float32"))
    half = rotary_dim // 2
    for n in range(N):
        for h in range(H):
            for i in range(half):
                angle = positions[n].item() * theta ** (-2 * i / rotary_dim)
                turned = complex(x[n, h, i], x[n, h, i + half]) * cmath.exp(1j * angle)
                assert out[n, h, i].item() == pytest.approx(turned.real, abs=5e-4)
                assert out[n, h, i + half].item() == pytest.approx(turned.imag, abs=5e-4)
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])


def test_bfloat16_angles_forget_neighbouring_positions():
    cos, _ = rotary_tables(torch.arange(4096), 128, 10000.0, "bfloat16")
    assert len(cos.unique(dim=0)) <= 769  # All positions that bfloat16 can tell apart up to 4096 (spec 1.5).
    exact, _ = rotary_tables(torch.arange(4096), 128, 10000.0, "float32")
    assert len(exact.unique(dim=0)) == 4096


def _softmax_attention(q, k, v):
    """The last S of T positions over everything up to themselves, one head and query at a time."""
    B, S, H, C = q.shape
    T = k.shape[1]
    out = torch.empty_like(q)
    for b in range(B):
        for h in range(H):
            for s in range(S):
                seen = T - S + s + 1
                scores = (k[b, :seen, h] @ q[b, s, h]) / math.sqrt(C)
                out[b, s, h] = scores.softmax(dim=0) @ v[b, :seen, h]
    return out


@pytest.mark.parametrize(("S", "T"), [(1, 1), (1, 9), (6, 6), (4, 9), (8, 9)])
def test_attention_is_an_explicit_softmax(S, T):
    q, k, v = torch.randn(2, S, 3, 5), torch.randn(2, T, 3, 5), torch.randn(2, T, 3, 5)
    torch.testing.assert_close(causal_attention(q, k, v), _softmax_attention(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 6, 5], [12]])
def test_runs_do_not_see_one_another(lengths):
    q, k, v = torch.randn(3, 12, 2, 4)
    together = attend_runs(q, k, v, lengths)
    pieces = zip(*(t[:, None].split(lengths) for t in (q, k, v)), strict=True)
    alone = [_softmax_attention(*(t.transpose(0, 1) for t in piece))[0] for piece in pieces]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 40), (3, 7, 40), (700, 40)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_elements", [1, 40 * 9, 1 << 20], ids=["row by row", "uneven blocks", "one block"])
def test_widened_products_are_rounded_once(monkeypatch, shape, bias, block_elements):
    monkeypatch.setattr(products, "has_bfloat16_matmul", lambda: False)
    monkeypatch.setattr(products.native, "suits_bf16", lambda *_: False)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", block_elements)
    x, weight = torch.randn(shape, dtype=torch.bfloat16), torch.randn(23, 40, dtype=torch.bfloat16)
    b = torch.randn(23, dtype=torch.bfloat16) if bias else None
    assert products.widens(x, weight)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    half_step = torch.finfo(torch.bfloat16).eps / 2  # Rounding once is off by at most half a unit in the last place.
    error = (products.linear(x, weight, b).double() - exact).abs()
    assert bool((error <= exact.abs() * half_step * 1.01 + 1e-5).all())


def test_products_are_widened_only_where_that_is_exact_and_faster(monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16_matmul", lambda: False)
    x, weight = torch.randn(12, 8, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    assert products.widens(x, weight)
    assert not products.widens(x[:11], weight)
    assert not products.widens(x.float(), weight.float())
    assert not products.widens(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert products.widens(x, weight.clone().requires_grad_())
    monkeypatch.setattr(products, "has_bfloat16_matmul", lambda: True)
    assert not products.widens(x, weight)


def test_the_norm_is_rounded_once():
    norm = RMSNorm(64, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        x = 3 * torch.randn(50, 64, dtype=torch.bfloat16)
        wide = x.double()
        exact = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
        error = (norm(x).double() - exact).abs()
    assert bool((error <= exact.abs() * torch.finfo(torch.bfloat16).eps / 2 * 1.01).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_router_scores_are_a_triple_loop(dtype):
    N, E = 4, 5
    projected = torch.randn(N, 3 * E).to(dtype)
    out = attention_scores(projected)
    assert out.dtype == torch.float32
    for n in range(N):
        q, k, v = projected[n].double().view(3, E).tolist()
        for i in range(E):
            shares = [math.exp(q[i] * k[j]) for j in range(E)]
            score = sum(share * v[j] for j, share in enumerate(shares)) / sum(shares)
            assert out[n, i].item() == pytest.approx(score, abs=2e-6)


def test_ties_go_to_the_lowest_expert():
    routing = choose(torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 5.0, 1.0]]), 2)
    assert routing.experts.tolist() == [[1, 2], [0, 1], [2, 1]]
    # Experts with equal queries score exactly equally, whatever else differs.
    projected = torch.randn(7, 3, 16)
    projected[:, 0, :] = projected[:, 0, :1]
    assert (choose(attention_scores(projected.flatten(1)), 3).experts == torch.arange(3)).all()


def test_routing_weights_are_a_softmax_over_the_chosen():
    logits = torch.randn(9, 6)
    routing = choose(logits, 2)
    top = torch.sort(logits, descending=True).values[:, :2]
    torch.testing.assert_close(routing.weights, top.exp() / top.exp().sum(dim=1, keepdim=True))
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(9))


def _filter_with_convolutions(lfa, x):
    """The filter as published: two convolutions over [D, S, 1], a zero token inserted before each (spec 1.3)."""
    D = x.shape[-1]

    def convolution(module, rows):  # [S, I] to [S, O]
        weight = torch.stack(module.weight.chunk(2, dim=1), dim=-1)[..., None]  # [O, I, 2 taps, 1]
        padded = F.pad(rows.T[None, :, :, None], (0, 0, 1, 0))
        return F.conv2d(padded, weight, module.bias)[0, :, :, 0].T

    mixed = convolution(lfa.conv2, convolution(lfa.conv1, x)) + x
    return F.rms_norm(mixed, (D,), lfa.norm.weight, 1e-6)


@torch.no_grad()
def test_the_filter_is_two_convolutions_with_a_zero_before_each():
    D, S = 6, 7
    lfa = LocalizedFilter(0, D, 1e-6)
    x = torch.randn(2 * S, D)
    out = lfa(x, WholeSequences(2, S))
    for row in range(2):
        expected = _filter_with_convolutions(lfa, x[row * S : (row + 1) * S])
        torch.testing.assert_close(out[row * S : (row + 1) * S], expected)


@torch.no_grad()
def test_before_the_first_token_the_first_convolution_is_zero_and_not_its_bias():
    D = 6
    lfa = LocalizedFilter(0, D, 1e-6)
    x = torch.randn(1, D)
    out = lfa(x, WholeSequences(1, 1))
    current1, current2 = lfa.conv1.weight[:, D:], lfa.conv2.weight[:, D // 2 :]
    mixed = (x @ current1.T + lfa.conv1.bias) @ current2.T + lfa.conv2.bias + x
    torch.testing.assert_close(out, lfa.norm(mixed))
    wrong = lfa.norm(mixed + lfa.conv1.bias @ lfa.conv2.weight[:, : D // 2].T)
    assert not torch.allclose(out, wrong, atol=1e-2), "the test could not tell a zero from the bias"
