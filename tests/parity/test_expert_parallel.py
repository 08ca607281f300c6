"""Experts spread over ranks against all of them in one process: outputs, routing, gradients, training."""

import pytest
import torch

import sharded_work as work
from ranks import on_ranks
from small_models import random_ids, small_config
from yuanmoe.train.parallel.expert_parallel import is_expert

CASES = {
    "m32": ({}, ()),
    "shared experts": ({"router": "shared-expert", "num_shared_experts": 2}, ()),
    "experts by layer": ({"num_experts": (8, 0, 4), "num_hidden_layers": 3, "tie_word_embeddings": False}, ()),
    # Everybody visits expert 0, nobody 1 to 3, so that the second of four ranks has nothing to do.
    "one busy, three idle": ({"router_bias": True}, (50.0, -50.0, -50.0, -50.0)),
    "experts of no even size": ({"moe_intermediate_size": 5, "num_experts_per_tok": 1}, ()),
}


def windows():
    return random_ids(4, 13)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_experts_on_ranks_are_those_of_one_process(case, ranks):
    changes, biases = CASES[case]
    config, ids = small_config(**changes), windows()
    model = work.steered_model(config, biases)
    loss, routings = work.rank_loss(model, ids, ids[:, 1:].numel())
    loss.backward()
    found = on_ranks(ranks, work.expert_parallel_step, config, ids, biases)
    torch.testing.assert_close(torch.cat([logits for logits, _, _ in found]), model(ids[:, :-1]).logits.detach())
    for layer, routing in enumerate(routings):
        parts = [of_rank[layer] for _, of_rank, _ in found]
        assert torch.equal(torch.cat([experts for _, experts, _ in parts]), routing.experts)
        torch.testing.assert_close(torch.cat([logits for _, _, logits in parts]), routing.logits.detach())
    for name, parameter in model.named_parameters():
        gradients = [of_rank[name] for _, _, of_rank in found]
        together = torch.cat(gradients) if is_expert(name) else torch.stack(gradients).sum(dim=0)
        torch.testing.assert_close(together, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_twenty_steps_lose_as_much_as_one_process(ranks):
    config, ids = small_config(), windows()
    alone = work.losses_alone(config, ids, 20)
    assert alone[-1] < 0.7 * alone[0]
    for losses in on_ranks(ranks, work.expert_parallel_losses, config, ids, 20):
        assert losses == pytest.approx(alone, rel=1e-4)


def test_a_rank_without_tokens_serves_those_of_others():
    config, tokens = small_config(), torch.randn(9, 16)
    layer = work.steered_model(config).model.layers[0].mlp
    x = tokens.clone().requires_grad_()
    y, _ = layer(x)
    y.square().sum().backward()
    (output, gradient, first), (nothing, no_gradient, second) = on_ranks(2, work.mixture_of_no_tokens, config, tokens)
    torch.testing.assert_close(output, y.detach())
    torch.testing.assert_close(gradient, x.grad)
    assert nothing.shape == no_gradient.shape == (0, 16)
    torch.testing.assert_close(torch.cat([first, second]), layer.experts.gate_up_proj.grad)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts": (8, 3), "num_hidden_layers": 2}, r"2 expert ranks cannot share the 3 experts of layer 1"),
        ({"num_experts": 0}, r"there are 2 expert ranks and no experts; a dense model has 1"),
    ],
)
def test_ranks_that_do_not_divide_the_experts_are_refused(changes, said):
    for kind, message in on_ranks(2, work.bad_groups, small_config(**changes)):
        assert kind == "UsageError"
        assert message.startswith(said)
