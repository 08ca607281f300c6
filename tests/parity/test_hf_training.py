"""What transformers and PEFT may ask of a model beside its logits: loss, checkpointing, LoRA; and what is refused."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from checkpoint_writers import random_state
from small_models import random_ids, small_config
from yuanmoe.checkpoint.formats.official_config import official_config
from yuanmoe.errors import UsageError
from yuanmoe.hosts.hf import YuanConfig, YuanForCausalLM
from yuanmoe.model.decoder import CausalLM as NativeModel

# transformers warns of names that it renamed while PEFT and older versions still need them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing:FutureWarning")

load = AutoModelForCausalLM.from_pretrained
MOE = small_config(num_experts=4)


def new_model(config=MOE) -> YuanForCausalLM:
    return YuanForCausalLM(YuanConfig(**official_config(config, torch.float32)))


def test_new_models_have_the_published_random_weights():
    torch.manual_seed(0)
    model = new_model(small_config(hidden_size=64, num_experts=8, tie_word_embeddings=False))
    state = model.state_dict()
    assert all(torch.all(tensor == 1) for name, tensor in state.items() if name.endswith("norm.weight"))
    for part, std in (
        ("embed", 0.3),
        ("lm_head", 0.3),
        ("q_proj", 0.3),
        ("router", 0.3),
        ("o_proj", 0.15),
        ("down_proj", 0.15),
    ):
        values = torch.cat([tensor.flatten() for name, tensor in state.items() if part in name])
        assert values.std().item() == pytest.approx(std, rel=0.1), part
    assert state["model.layers.0.self_attn.lfa.conv1.weight"].abs().max() <= 128**-0.5


def test_logits_to_keep_loss_and_outputs():
    model = new_model().eval()
    ids = random_ids(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    logits = out.logits
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    kept = torch.tensor([[0, 5], [3, 2]])
    for keep, expected in (
        (2, logits[:, -2:]),
        (torch.tensor([1, 3]), logits[:, [1, 3]]),
        (kept, torch.stack([logits[0, kept[0]], logits[1, kept[1]]])),
        (mask == 1, logits[mask == 1]),
    ):
        torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=keep).logits, expected)
    assert [tuple(route.shape) for route in out.router_logits] == [(12, 4)] * 2
    assert torch.equal(out.router_logits[0].view(2, 6, 4)[1, :2], torch.zeros(2, 4)), "zero at padding"
    as_tuple = model(ids, attention_mask=mask, return_dict=False)
    assert torch.equal(as_tuple[0], logits)
    model.config.router_aux_loss_coef = 0.5
    balanced = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    torch.testing.assert_close(balanced.loss, out.loss + 0.5 * out.aux_loss)
    assert out.aux_loss >= 1, "the loss of perfectly balanced experts is their number times 2 / number / 2"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = new_model().train()
    ids = random_ids(2, 6)

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids, output_router_logits=True)
        (out.loss + out.aux_loss).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    # Reentrant checkpointing runs forward without gradients, through kernels that round in another order.
    torch.testing.assert_close(
        gradients(), expected, atol=1e-6 if use_reentrant else 0, rtol=1e-5 if use_reentrant else 0
    )
    assert len(calls) == 2
    with pytest.raises(UsageError, match="takes no past_key_values"):
        model(ids, past_key_values=DynamicCache(config=model.config))


def test_embeddings_can_be_resized(tmp_path):
    for tied in (True, False):
        model = new_model(small_config(tie_word_embeddings=tied)).eval()
        ids = random_ids(1, 5)
        before = model(ids).logits
        model.resize_token_embeddings(40, mean_resizing=False)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        after = model(ids, labels=ids)
        assert after.logits.shape[-1] == 40
        torch.testing.assert_close(after.logits[..., :32], before)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert again.config.to_native().vocab_size == 40
        assert torch.equal(again(ids).logits, after.logits)


def test_what_this_model_does_not_do_is_refused():
    model = new_model().eval()
    ids = random_ids(2, 6)
    with pytest.raises(UsageError, match="output_attentions cannot be true"):
        model(ids, output_attentions=True)
    with pytest.raises(UsageError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(
        UsageError, match=r"attention_mask has shape \(2, 5\); 2 rows of 0 cached and 6 new tokens need \(2, 6\)"
    ):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(UsageError, match="hides all 2 x 6 tokens"):
        model(ids, attention_mask=torch.zeros(2, 6), use_cache=False)
    with pytest.raises(UsageError, match=r"DynamicCache \(no layers\), .*pass DynamicCache\(config=model\.config\)"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(UsageError, match="StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # the constructor needs a GPU for it
    with pytest.raises(UsageError, match="an offloaded cache does not keep the filters' state"):
        model(ids, past_key_values=offloaded)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        model.set_attn_implementation("flash_attention_2")
    for packing, padding in (("megatron", "not defined for padded rows"), ("isolated", "give input_ids")):
        packed = new_model(replace(MOE, packing=packing))
        embeds = packed.get_input_embeddings()(ids)
        arguments = {"input_ids": ids} if packing == "megatron" else {"inputs_embeds": embeds}
        with pytest.raises(UsageError, match=padding):
            packed(**arguments, attention_mask=torch.tensor([[0] * 3 + [1] * 3] * 2))


@torch.no_grad()
def test_packing_restarts_documents_in_training_and_not_in_generation():
    ids = torch.tensor([[5, 6, 0, 7, 8, 9]])  # 0 is <eod>
    state = random_state(MOE)
    for packing in ("continuous", "megatron", "hf-mask", "isolated"):
        native = NativeModel(replace(MOE, packing=packing))
        native.load_state_dict(state)
        model = new_model(native.config)
        model.load_state_dict(state, strict=False)
        expected = native(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, expected)
        assert model(ids).past_key_values is None or packing == "continuous"
        if packing == "isolated":
            padded = torch.cat([torch.ones(1, 2, dtype=torch.long), ids], dim=1)
            mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
            torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 2:], expected)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "conv1", "conv2"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
)
def test_lora_trains_is_saved_loaded_and_merged_into_official_files(tmp_path, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, ids = new_model(), random_ids(2, 6)
    model.save_pretrained(tmp_path / "base")
    before = model(ids).logits
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **targets)
    adapted = peft.get_peft_model(model, config)
    out = adapted(ids, labels=ids)
    out.loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None and gradient.any() for gradient in trained.values())
    if "target_parameters" in targets:
        assert any(".mlp.experts.lora_A" in name for name in trained)
    assert not torch.allclose(out.logits, before, atol=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    expected = adapted.eval()(ids).logits
    # What is loaded wants no gradients, and kernels that have none round in another order.
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "merged")(ids).logits, merged(ids).logits)
