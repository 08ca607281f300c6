"""Operations with a gradient of their own against automatic differentiation of the plain formula."""

import pytest
import torch

from yuanmoe.ops import cross_entropy
from yuanmoe.ops.cross_entropy import head_cross_entropy, head_cross_entropy_reference
from yuanmoe.ops.products import wide
from yuanmoe.ops.products.grouped import grouped_linear
from yuanmoe.ops.products.linear import linear
from yuanmoe.ops.relations import CPU_BLOCK_TOKENS, relate, relate_reference


def gradients(function, inputs, upstream):
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("tokens", [0, 1, 7, CPU_BLOCK_TOKENS, 2 * CPU_BLOCK_TOKENS + 3])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_relate_has_the_gradient_of_its_formula(tokens, spread):
    inputs = [torch.randn(tokens, 12) * spread for _ in range(3)]
    upstream = torch.randn(tokens, 12)
    exact = gradients(relate_reference, [value.double() for value in inputs], upstream)
    for got, wanted in zip(gradients(relate, inputs, upstream), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-4, atol=2e-5)


def test_relate_keeps_large_products_finite():
    q, k, v = torch.full((3, 1), 50.0), torch.tensor([[40.0]] * 3), torch.randn(3, 1)
    out = relate(q.expand(3, 4).contiguous(), k.expand(3, 4).contiguous(), v.expand(3, 4).contiguous())
    torch.testing.assert_close(out, v.expand(3, 4))


def test_relate_answers_alike_with_and_without_gradients():
    q, k, v = torch.randn(3, 300, 8)
    with torch.no_grad():
        plain = relate(q, k, v)
    assert torch.equal(relate(q, k, v.requires_grad_()), plain)


@pytest.mark.parametrize("tokens", [1, 5, 8, 21])
def test_head_cross_entropy_is_the_plain_one(tokens, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_TOKENS", 8)
    inputs = [torch.randn(tokens, 6), torch.randn(17, 6)]
    targets = torch.randint(0, 17, (tokens,))
    upstream = torch.tensor(0.7)
    got = gradients(lambda *leaves: head_cross_entropy(*leaves, targets), inputs, upstream)
    wanted = gradients(lambda *leaves: head_cross_entropy_reference(*leaves, targets), inputs, upstream)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_head_cross_entropy_of_a_hopeless_target_is_large_and_finite():
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    assert head_cross_entropy(hidden, weight, torch.tensor([1])).item() == pytest.approx(600.0)


def test_head_cross_entropy_in_bfloat16_has_gradients_of_its_inputs_dtype():
    inputs = [torch.randn(20, 6).bfloat16(), torch.randn(17, 6).bfloat16()]
    targets = torch.randint(0, 17, (20,))
    loss, *found = gradients(lambda *leaves: head_cross_entropy(*leaves, targets), inputs, torch.tensor(1.0))
    exact = head_cross_entropy_reference(inputs[0].float(), inputs[1].float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.bfloat16]


def test_head_cross_entropy_never_holds_all_logits():
    tokens, vocab = 4 * cross_entropy.BLOCK_TOKENS, 3000
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocab, 8)
    hidden.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        head_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.long)).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < tokens * vocab * 4 / 2


@pytest.fixture(params=["instructions", "none", "small blocks"])
def bfloat16(request, monkeypatch):
    """CPUs with and without bfloat16 instructions, and blocks of few rows."""
    monkeypatch.setattr(wide, "has_bfloat16_matmul", lambda: request.param == "instructions")
    if request.param == "small blocks":
        monkeypatch.setattr(wide, "BLOCK_ELEMENTS", 64)


def test_bfloat16_matrices_learn_as_float32_ones_do(bfloat16):
    inputs, upstream = [torch.randn(3, 7, 24).bfloat16(), torch.randn(40, 24).bfloat16()], torch.randn(3, 7, 40)
    found = gradients(linear, inputs, upstream)
    exact = gradients(lambda x, weight: x @ weight.T, [value.float() for value in inputs], upstream.bfloat16().float())
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=5e-2)


def test_groups_of_bfloat16_matrices_learn_as_float32_ones_do(bfloat16):
    counts = torch.tensor([5, 0, 8, 3])
    inputs, upstream = [torch.randn(16, 24).bfloat16(), torch.randn(4, 40, 24).bfloat16()], torch.randn(16, 40)

    def plain(x, weight):
        return torch.cat([rows @ matrix.T for rows, matrix in zip(x.split(counts.tolist()), weight, strict=True)])

    found = gradients(lambda x, weight: grouped_linear(x, weight, counts), inputs, upstream)
    exact = gradients(plain, [value.float() for value in inputs], upstream.bfloat16().float())
    assert not found[2][1].any()
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=5e-2)
