"""LoRA against what it stands for: weights with scale B A added, in every role, kind of model, file and library."""

import dataclasses
import json

import pytest
import torch

from small_adapters import adapted, factors, settings
from small_models import VARIANTS, random_ids, random_model, small_config
from yuanmoe.checkpoint.adapters.adapter import (
    Adapter,
    adaptable_matrices,
    attach_adapter,
    base_of,
    open_adapter,
    save_adapter,
)
from yuanmoe.checkpoint.adapters.merge import merge_adapter
from yuanmoe.checkpoint.adapters.peft import CONFIG, export_peft
from yuanmoe.checkpoint.load import load_model
from yuanmoe.checkpoint.quantize.quantize import quantize_checkpoint
from yuanmoe.checkpoint.write.save import save_native, save_official
from yuanmoe.config import ModelConfig
from yuanmoe.model.lora.attach import attach, attached, detach
from yuanmoe.model.lora.targets import ROLES, ROUTER, lora_role_of
from yuanmoe.ops.products.grouped import experts_forward, experts_reference
from yuanmoe.ops.products.low_rank import Factors
from yuanmoe.ops.products.packed_linear import packed_linear
from yuanmoe.ops.quantize.groupwise import dequantize_weight, pack_weight, quantize_weight, round_activations
from yuanmoe.train.recipe.recipe import BalanceSettings
from yuanmoe.train.steps.balance import balance_loss
from yuanmoe.train.steps.step import Windows, forward_loss

KINDS = {
    "q": {}, "k": {}, "v": {}, "o": {}, "lfa": {}, "experts": {}, "head": {"tie_word_embeddings": False},
    "shared_experts": VARIANTS["shared experts"], "dense": VARIANTS["experts by layer"], ROUTER: {},
}  # fmt: skip
"""A model for each role; `head` on its own below, where it is the embedding."""


def of_role(role: str, **changes):
    return settings("q", router=True, **changes) if role == ROUTER else settings(role, **changes)


def merged(model, adapter: Adapter):
    """A model with the corrected weights themselves, of float64 sums."""
    again = random_model(model.config.replace(tie_word_embeddings=False))
    state = dict(model.state_dict())
    state["lm_head.weight"] = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    for name in adaptable_matrices(model.config):
        if f"{name}.a" in adapter.tensors:
            a, b = (adapter.tensors[f"{name}.{part}"].double() for part in "ab")
            state[name] = (state[name].double() + adapter.settings.scale * (b @ a)).float()
    again.load_state_dict({name: state[name] for name in again.state_dict()})
    return again


def test_every_role_has_a_case():
    assert set(KINDS) == {*ROLES, ROUTER}


@pytest.mark.parametrize("tokens", [1, 3, 12], ids=["one by one", "few", "grouped"])
@pytest.mark.parametrize("role", KINDS)
def test_factors_equal_the_weights_that_they_stand_for(role, tokens):
    config = small_config(**KINDS[role])
    model, adapter = adapted(config, of_role(role, rslora=role == "o"))
    assert {lora_role_of(name) for name in attached(model)} == {role} | ({"q"} if role == ROUTER else set())
    ids = random_ids(1, tokens)
    with torch.no_grad():
        expected, plain = merged(model, adapter)(ids), random_model(config)(ids)
        torch.testing.assert_close(model(ids).logits, expected.logits, rtol=1e-4, atol=1e-5)
    grouped = model(ids)
    torch.testing.assert_close(grouped.logits, expected.logits, rtol=1e-4, atol=1e-5)
    if tokens > 1 or role not in ("q", "k", "lfa"):  # a token alone attends to itself, whatever its query
        assert not torch.allclose(expected.logits, plain.logits, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_learns_also_where_it_is_the_embedding(tied):
    model, adapter = adapted(small_config(tie_word_embeddings=tied), settings("head"))
    windows = random_ids(2, 9)
    loss, _ = forward_loss(model, Windows(windows))
    loss.backward()
    logits = merged(model, adapter)(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert model.head_lora.a.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_new_adapter_changes_no_bit_and_a_detached_one_leaves_none(kind):
    config = small_config(**VARIANTS[kind])
    roles = {lora_role_of(name) for name in adaptable_matrices(config)} - {ROUTER}
    made = settings(*sorted(roles), router=config.is_moe)
    plain, ids = random_model(config), random_ids(2, 11)
    model, _ = adapted(config, made, b_std=0.0)
    with torch.no_grad():
        for tokens in (ids, ids[:1, :2]):
            expected = plain(tokens).logits
            assert model(tokens).logits.equal(expected)
            attach(model, factors(model, made), made)
            assert not model(tokens).logits.equal(expected)
            detach(model)
            assert model(tokens).logits.equal(expected)
            attach(model, factors(model, made, b_std=0.0), made)
    detach(model)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_gradients_reach_every_expert_that_was_routed_to_and_no_other():
    config = small_config(num_experts=8, num_experts_per_tok=2)
    model, _ = adapted(config, settings("experts"))
    loss, routings = forward_loss(model, Windows(random_ids(1, 4)))
    loss.backward()
    for layer, routing in zip(model.model.layers, routings, strict=True):
        routed = set(routing.experts.flatten().tolist())
        assert 1 < len(routed) < 8, "the case tells nothing"
        for slot in (layer.mlp.experts.gate_up_proj_lora, layer.mlp.experts.down_proj_lora):
            for factor in (slot.a, slot.b):
                reached = {expert for expert in range(8) if factor.grad[expert].abs().sum() > 0}
                assert reached == routed
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("router", [False, True])
def test_routers_learn_only_when_asked(router):
    model, _ = adapted(made=settings("experts", router=router))
    loss, routings = forward_loss(model, Windows(random_ids(1, 9)))
    extra = balance_loss(routings, BalanceSettings(auxiliary_loss=0.1))
    (loss + extra).backward()
    routers = [layer.mlp.router for layer in model.model.layers]
    assert all(each.weight.grad is None for each in routers)
    assert [each.lora is not None for each in routers] == [router] * 2
    if router:
        assert all(each.lora.b.grad.abs().sum() > 0 for each in routers)


def test_dropout_works_in_training_alone():
    model, _ = adapted(made=settings("v", "experts", dropout=0.5))
    ids = random_ids(1, 9)
    assert model(ids).logits.equal(model(ids).logits)
    model.train()
    assert not model(ids).logits.equal(model(ids).logits)


# --- quantized bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_gradient_through_packed_weights_is_that_of_their_numbers(bits, lead):
    torch.manual_seed(0)
    weight, x = (
        pack_weight(quantize_weight(torch.randn(*lead, 40, 70), bits, 32)),
        torch.randn(5, 70, requires_grad=True),
    )
    out = packed_linear(x, weight)
    above = torch.randn_like(out)
    out.backward(above)
    matrix = dequantize_weight(weight).flatten(0, -2)
    torch.testing.assert_close(x.grad, above @ matrix)
    torch.testing.assert_close(out, round_activations(x, 32, torch.float32) @ matrix.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 9])
def test_packed_experts_pass_gradients_on_as_their_parts_do(tokens):
    """Expert 1 is visited by nobody."""
    torch.manual_seed(0)
    x, weights = torch.randn(tokens, 32, requires_grad=True), torch.rand(tokens, 2)
    experts = torch.tensor([[2, 0], [3, 2], [0, 3]]).repeat(3, 1)[:tokens]
    gate_up, down = (pack_weight(quantize_weight(torch.randn(shape), 4, 32)) for shape in ((4, 2, 32, 32), (4, 32, 32)))
    factors = Factors(torch.randn(4, 3, 32), torch.randn(4, 64, 3), 0.1), Factors(*torch.randn(2, 4, 3, 32), 0.1)
    factors = factors[0], factors[1]._replace(b=factors[1].b.mT)
    out = experts_forward(x, gate_up, down, weights, experts, *factors)
    whole = dequantize_weight(gate_up).flatten(1, 2), dequantize_weight(down)
    expected = experts_reference(x, *whole, weights, experts, *factors)
    assert (out - expected).norm() < 0.02 * expected.norm()  # activations in 8 bits
    above = torch.randn_like(out)
    (got,), (wanted,) = (torch.autograd.grad(each, x, above) for each in (out, expected))
    assert (got - wanted).norm() < 0.03 * wanted.norm()
    with torch.no_grad():
        torch.testing.assert_close(experts_forward(x, gate_up, down, weights, experts, *factors), out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in full precision and the same in 4 bits."""
    folder = tmp_path_factory.mktemp("bases")
    config = small_config(hidden_size=32, head_dim=16)
    state = {name: tensor.bfloat16() for name, tensor in random_model(config).state_dict().items()}
    save_native(state, config, folder / "whole")
    save_official(state, config, folder / "official")
    quantize_checkpoint(folder / "whole", folder / "four", bits=4)
    return folder


@pytest.mark.parametrize("base", ["four", "whole"])
def test_an_adapter_learns_a_text_on_a_frozen_base(folders, base):
    model = load_model(folders / base, dtype=torch.float32)
    made = settings("q", "v", "lfa", "experts", "head", router=True)
    attach(model, factors(model, made, b_std=0.0), made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    windows = random_ids(2, 17)
    optimizer = torch.optim.Adam(
        [parameter for low in attached(model).values() for parameter in low.parameters()], 0.02
    )
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = forward_loss(model, Windows(windows))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items() if name in before)


def test_a_new_adapter_on_four_bits_changes_next_to_nothing(folders):
    model, ids = load_model(folders / "four"), random_ids(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        attach(model, factors(model, settings("q", "experts"), b_std=0.0), settings("q", "experts"))
        # The experts' kernel is fused where they are not adapted; the numbers are those of its parts.
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        detach(model)
        assert model(ids).logits.equal(expected)


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_and_fits_its_base_in_any_precision(folders, tmp_path):
    model = load_model(folders / "four")
    made = settings("q", "lfa", "experts", "head", alpha=3.5, rslora=True, dropout=0.1)
    attach(model, factors(model, made), made)
    adapter = Adapter(settings=made, base=base_of(model, "four"), tensors={})
    adapter = dataclasses.replace(adapter, tensors=factors(model, made))
    save_adapter(adapter, tmp_path / "adapter")
    again = open_adapter(tmp_path / "adapter")
    assert (again.settings, again.base) == (made, adapter.base)
    assert all(tensor.equal(again.tensors[name]) for name, tensor in adapter.tensors.items())
    ids = random_ids(1, 6)
    for base, dtype in (("four", None), ("whole", None), ("whole", torch.float32), ("official", torch.float16)):
        other = load_model(folders / base, dtype=dtype)
        plain = other(ids).logits
        attach_adapter(other, again, base)
        assert not other(ids).logits.equal(plain)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_adapted_model(tmp_path, tied):
    config = small_config(tie_word_embeddings=tied)
    roles = ("q", "k", "v", "o", "lfa", "experts", "head")
    model, adapter = adapted(config, settings(*roles, router=True))
    save_native(random_model(config).state_dict(), config, tmp_path / "base")
    save_adapter(adapter, tmp_path / "adapter")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", shard_bytes=4000)
    again, ids = load_model(tmp_path / "merged"), random_ids(2, 9)
    assert not again.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert load_model(tmp_path / "base")(ids).logits.equal(random_model(config)(ids).logits)


def peft_logits(config: ModelConfig, folder, adapter: Adapter, ids):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from yuanmoe.hosts.hf import YuanForCausalLM

    transformers.logging.disable_progress_bar()
    save_official(random_model(config).state_dict(), config, folder / "base")
    export_peft(adapter, folder / "peft")
    base = YuanForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder / "peft").eval()(ids).logits


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("roles", "router", "kind"),
    [
        (("q", "k", "v", "o", "lfa"), False, "m32"),
        (("q", "experts"), True, "m32"),
        (("shared_experts", "experts"), False, "shared experts"),
        (("dense", "v"), False, "dense"),
        (("head", "o"), False, "untied, one expert a token"),
    ],
)
def test_peft_computes_the_same_from_what_we_export(tmp_path, roles, router, kind):
    config = small_config(**VARIANTS[kind])
    model, adapter = adapted(config, settings(*roles, router=router, rslora=kind == "dense", dropout=0.1))
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(peft_logits(config, tmp_path, adapter, ids), expected, rtol=1e-4, atol=1e-5)
    said = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert bool(said["target_parameters"]) == ("experts" in roles)
    assert said["base_model_name_or_path"] is None
    export_peft(adapter, tmp_path / "named", base="models/Yuan2-2B")
    assert json.loads((tmp_path / "named" / CONFIG).read_text())["base_model_name_or_path"] == "models/Yuan2-2B"
