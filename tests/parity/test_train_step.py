"""The parts of a training step against what they stand for: accumulation, masters, checkpointing, balance, biases."""

import math

import pytest
import torch

from small_models import random_ids, random_model, small_config
from small_runs import BATCH, LENGTH, batches, recipe, training, whole_batch
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.save import save_native, save_official
from yuanmoe.errors import UsageError
from yuanmoe.model.router import AttentionRouter, LinearRouter, choose
from yuanmoe.presets import preset
from yuanmoe.train.recipe.recipe import BalanceSettings, OptimizerSettings
from yuanmoe.train.start.model import loaded_model, new_model, on_weights
from yuanmoe.train.steps.balance import RouterBiases, auxiliary_loss, balance_loss
from yuanmoe.train.steps.loop import Training
from yuanmoe.train.steps.meter import balance
from yuanmoe.train.steps.optim import Optimizer, param_groups
from yuanmoe.train.steps.step import Windows, forward_loss, learn

NONE = BalanceSettings()


def windows(made, number=0):
    return Windows.of(batches(made)(number), "cpu")


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay_embedding", [False, True])
def test_every_parameter_is_in_one_group_and_decays_as_said(tied, decay_embedding):
    made = recipe(tied=tied, weight_decay=0.3, head_rate=2.0, decay_embedding=decay_embedding)
    model = new_model(made)
    parameters = dict(model.named_parameters())
    groups = param_groups(parameters, made.optimizer)
    names = {parameter: name for name, parameter in parameters.items()}
    assert sorted(names.values()) == sorted(names[parameter] for group in groups for parameter in group["params"])
    decaying = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    matrices = {name for name, parameter in parameters.items() if parameter.ndim > 1}
    outside = {"model.embed_tokens.weight", "lm_head.weight"}
    assert decaying == (matrices if decay_embedding else matrices - outside)
    rates = {names[parameter]: group["rate"] for group in groups for parameter in group["params"]}
    assert rates["model.embed_tokens.weight"] == 4.0
    assert rates.get("lm_head.weight", 2.0) == 2.0
    assert rates["model.norm.weight"] == 1.0


def test_parameters_that_want_no_gradient_are_left_alone():
    model = new_model(recipe())
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in Optimizer(model, recipe().optimizer).masters


# --- accumulation and precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(at_once):
    made = recipe()
    whole, parts = new_model(made), new_model(made)
    first = learn(whole, windows(made), BATCH, NONE)
    second = learn(parts, windows(made), at_once, NONE)
    torch.testing.assert_close(second.loss, first.loss)
    assert [load.tolist() for load in second.load] == [load.tolist() for load in first.load]
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_masters_take_steps_that_bfloat16_cannot():
    made = recipe(dtype="bfloat16", weight_decay=0.0)
    model = new_model(made)
    optimizer = Optimizer(model, made.optimizer)
    name = "model.norm.weight"
    for _ in range(8):
        for parameter in model.parameters():
            parameter.sum().backward()
        optimizer.step(share=1e-4 / made.optimizer.learning_rate)
        optimizer.zero_grad()
    assert optimizer.masters[name][0].item() == pytest.approx(1 - 8e-4, abs=1e-5)
    assert model.model.norm.weight[0].item() == 1.0
    assert model.model.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        model.model.embed_tokens.weight, optimizer.masters["model.embed_tokens.weight"].bfloat16()
    )


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    made = recipe(dtype="bfloat16")
    model = new_model(made)
    optimizer = Optimizer(model, made.optimizer)
    weight = model.model.norm.weight
    for scale in (1.0, *[2.0**-9] * 16):
        (weight * scale).sum().backward()
    assert weight.grad is None
    master = optimizer.masters["model.norm.weight"]
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad[0].item() == 1 + 16 * 2.0**-9


def test_bfloat16_training_follows_float32():
    def losses(dtype):
        made = recipe(dtype=dtype)
        return [step.loss for step in Training(new_model(made), made, batches(made))]

    exact, rounded = losses("float32"), losses("bfloat16")
    assert rounded[-1] < rounded[0]
    assert rounded == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_computing_layers_twice_changes_no_gradient(dropout):
    made = recipe(model=preset("tiny", vocab_size=64, attention_dropout=dropout), max_tokens=2 * LENGTH * BATCH)
    balanced = {"balance": BalanceSettings(auxiliary_loss=0.1, z_loss=0.1)}
    plain = recipe(**vars_of(made), **balanced)
    again = recipe(**vars_of(made), **balanced, activation_checkpointing=True)
    models = [new_model(each) for each in (plain, again)]
    steps = [list(Training(model, each, batches(each))) for model, each in zip(models, (plain, again), strict=True)]
    assert [step.loss for step in steps[0]] == [step.loss for step in steps[1]]
    assert [step.gradient_norm for step in steps[0]] == [step.gradient_norm for step in steps[1]]
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_attention_half_is_what_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    made = recipe(compile=True, activation_checkpointing=True, max_tokens=LENGTH * BATCH)
    model = new_model(made)
    assert [function.__name__ for function in compiled] == ["attend"] * 2
    assert list(model.state_dict()) == list(new_model(recipe()).state_dict())
    assert next(iter(Training(model, made, batches(made)))).loss == next(iter(training(recipe()))).loss


def vars_of(made):
    return {"model": made.model, "max_tokens": made.schedule.max_tokens}


# --- balance ----------------------------------------------------------------------------------------------------------


def routed(logits, chosen=2):
    return choose(logits, chosen)


def test_the_auxiliary_loss_is_that_of_the_paper():
    shares, experts = torch.rand(7, 5).softmax(dim=-1), torch.randint(0, 5, (7, 2))
    load = [sum(int(choice) == expert for choice in experts.flatten()) / 14 for expert in range(5)]
    by_hand = 5 * sum(load[expert] * shares[:, expert].mean().item() for expert in range(5))
    assert auxiliary_loss(shares, experts).item() == pytest.approx(by_hand)
    even = torch.full((8, 4), 0.25)
    assert auxiliary_loss(even, torch.randint(0, 4, (8, 2))).item() == pytest.approx(1)


def test_balance_losses_take_one_softmax_of_the_logits():
    logits = torch.randn(2, 9, 6)
    settings = BalanceSettings(auxiliary_loss=0.3, z_loss=0.7)
    found = balance_loss([routed(layer) for layer in logits], settings)
    expected = sum(
        0.3 * auxiliary_loss(layer.softmax(dim=-1), routed(layer).experts)
        + 0.7 * layer.logsumexp(dim=-1).square().mean()
        for layer in logits
    )
    torch.testing.assert_close(found, expected)
    assert balance_loss([routed(logits[0])], NONE) is None


@pytest.mark.parametrize("settings", [BalanceSettings(auxiliary_loss=1.0), BalanceSettings(z_loss=1.0)])
@pytest.mark.parametrize("router", ["attention", "linear"])
def test_balance_losses_reach_the_router_and_what_is_before_it(settings, router):
    model = random_model(small_config(router=router)).double().train()
    ids = random_ids(2, 12)

    def loss():
        found = balance_loss(model.read(ids)[1], settings)
        assert found is not None
        return found

    loss().backward()
    for layer in (0, 1):
        weight = model.model.layers[layer].mlp.router.weight
        assert weight.grad is not None
        place = int(weight.grad.abs().argmax())
        step, flat, measured = 1e-3, weight.data.view(-1), []
        for sign in (1, -1):
            flat[place] += sign * step
            measured.append(loss().item())
            flat[place] -= sign * step
        slope = (measured[0] - measured[1]) / (2 * step)
        assert slope == pytest.approx(weight.grad.view(-1)[place].item(), rel=2e-2, abs=1e-4)
    assert model.model.embed_tokens.weight.grad.any()


def busiest(routing):
    """The load of the busiest expert, as a multiple of an even share."""
    return balance(torch.bincount(routing.experts.flatten(), minlength=8).tolist()).max_over_mean


@pytest.mark.parametrize("kind", [AttentionRouter, LinearRouter])
def test_the_auxiliary_loss_evens_the_load(kind):
    router, x = kind(16, 8, 2), torch.randn(512, 16) + torch.randn(16)
    torch.nn.init.normal_(router.weight)
    before = busiest(router(x))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = balance_loss([router(x)], BalanceSettings(auxiliary_loss=1.0))
        loss.backward()
        optimizer.step()
    assert busiest(router(x)) < 0.8 * before


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_the_bias_evens_the_load(kind):
    model = random_model(small_config(router=kind, router_bias=True))
    router, x = model.model.layers[0].mlp.router, torch.randn(512, 16) + torch.randn(16)
    before, biases, loads = busiest(router(x)), RouterBiases(model, rate=2e-3), []
    for _ in range(300):
        loads.append(torch.bincount(router(x).experts.flatten(), minlength=8))
        biases.update([loads[-1]] * 2)
    # It moves around the balance: what experts do is their mean over some steps.
    assert balance(torch.stack(loads[-50:]).sum(dim=0).tolist()).max_over_mean < min(1.2, 0.9 * before)


def test_a_bias_moves_by_the_sign_of_the_load_and_no_gradient():
    model = random_model(small_config(router_bias=True))
    biases = RouterBiases(model, rate=0.25)
    load = torch.tensor([9, 1, 4, 4, 4, 4, 4, 2])
    biases.update([load, load])
    moved = model.model.layers[1].mlp.router.bias
    assert moved.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]
    assert not moved.requires_grad
    assert all("router.bias" not in name for name, _ in model.named_parameters())
    saved = {name: tensor.clone() for name, tensor in biases.tensors().items()}
    biases.update([load, load])
    biases.load(saved)
    assert moved.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]


def test_a_bias_counts_in_the_choice_and_not_in_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    chosen = choose(logits, 2, torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert chosen.experts.tolist() == [[3, 0]]
    torch.testing.assert_close(chosen.weights, torch.tensor([[-1.0, 2.0]]).softmax(dim=-1))


def test_biases_survive_every_layout(tmp_path):
    model = random_model(small_config(router_bias=True))
    model.model.layers[0].mlp.router.bias += torch.linspace(-1, 1, 8)
    ids = random_ids(1, 12)
    save_official(model.state_dict(), model.config, tmp_path / "official")
    source = open_checkpoint(tmp_path / "official")
    save_native(source, source.config, tmp_path / "native")
    for name in ("official", "native"):
        made = on_weights(recipe(), open_checkpoint(tmp_path / name).config)
        again = loaded_model(made, open_checkpoint(tmp_path / name)).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)


# --- starting from weights --------------------------------------------------------------------------------------------


def test_weights_from_elsewhere_give_the_sizes_and_the_recipe_how_to_compute(tmp_path):
    model = random_model(small_config(rope_theta=500.0, max_position_embeddings=64))
    save_official(model.state_dict(), model.config, tmp_path / "weights")
    source = open_checkpoint(tmp_path / "weights")
    own = preset("tiny", attention_dropout=0.1, router_bias=True)
    made = on_weights(recipe(model=own), source.config)
    assert made.model.hidden_size == 16
    assert (made.model.rope_theta, made.model.attention_dropout) == (500.0, 0.1)
    assert made.model.max_position_embeddings == 256
    started = loaded_model(made, source)
    assert not started.model.layers[0].mlp.router.bias.any()
    ids = random_ids(1, 12)
    assert torch.equal(started.eval()(ids).logits, model(ids).logits)
    loss, _ = forward_loss(started, Windows(random_ids(2, 9)))
    loss.backward()
    assert all(parameter.grad is not None for parameter in started.parameters())
    with pytest.raises(UsageError, match="do not fit the recipe's model, whose sizes differ"):
        loaded_model(recipe(), source)


def test_the_file_that_was_started_from_is_not_written_to(tmp_path):
    model = random_model(small_config())
    save_native(model.state_dict(), model.config, tmp_path / "weights")
    before = (tmp_path / "weights" / "model.safetensors").read_bytes()
    made = on_weights(recipe(max_tokens=LENGTH * BATCH), open_checkpoint(tmp_path / "weights").config)
    started = loaded_model(made, open_checkpoint(tmp_path / "weights"))
    batch = whole_batch(random_ids(BATCH, LENGTH + 1).numpy())
    list(Training(started, made, lambda _: batch))
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == before


def test_adamw_is_the_textbook_one():
    settings = OptimizerSettings(learning_rate=0.1, weight_decay=0.5, betas=(0.8, 0.9), epsilon=1e-3)
    model = torch.nn.ParameterDict({"matrix": torch.nn.Parameter(torch.tensor([[2.0]]))})
    optimizer, value, mean, square = Optimizer(model, settings), 2.0, 0.0, 0.0
    for step in range(1, 4):
        (model["matrix"] * 3.0).sum().backward()
        optimizer.step(share=0.5)
        optimizer.zero_grad()
        mean, square = 0.8 * mean + 0.2 * 3, 0.9 * square + 0.1 * 9
        corrected = mean / (1 - 0.8**step) / (math.sqrt(square / (1 - 0.9**step)) + 1e-3)
        value = value * (1 - 0.05 * 0.5) - 0.05 * corrected
        assert model["matrix"].item() == pytest.approx(value, rel=1e-5)
