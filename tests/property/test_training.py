"""The model as training uses it: every parameter learns, checkpointing changes nothing, no memory is quadratic."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from small_models import VARIANTS, random_ids, random_model, small_config
from yuanmoe.model.attention import LocalizedFilter
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.state.cache import Cache
from yuanmoe.model.state.sequences import WholeSequences


def loss_of(model, ids):
    logits = model(ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("packing", ["continuous", "isolated"])
def test_every_parameter_learns(changes, packing):
    model = random_model(small_config(packing=packing, **changes)).train()
    loss_of(model, random_ids(4, 40)).backward()
    frozen = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    if changes.get("num_experts_per_tok") == 1:
        # The softmax over one chosen expert is 1 whatever the router says.
        frozen = [name for name in frozen if not name.endswith("router.weight")]
    assert not frozen


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_training_lowers_the_loss(changes):
    model = random_model(small_config(initializer_range=0.1, **changes)).train()
    ids = random_ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_gradients_are_equal_under_activation_checkpointing(changes):
    ids = random_ids(2, 12)
    plain = random_model(small_config(**changes)).train()
    loss_of(plain, ids).backward()

    model = random_model(small_config(**changes)).train()
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    loss_of(model, ids).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=0, rtol=0, msg=name)

    whole = random_model(small_config(**changes)).train()
    hidden, _ = checkpoint(whole.model, ids[:, :-1].flatten(), WholeSequences(2, 11), use_reentrant=False)
    F.cross_entropy(whole.logits(hidden), ids[:, 1:].flatten()).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(whole)[name], gradient, msg=name)


def test_gradients_are_those_of_finite_differences():
    model = random_model(small_config(hidden_size=8, num_experts=4)).double().train()
    ids = random_ids(1, 8)
    loss_of(model, ids).backward()
    # Rotation and router compute in float32, so the step must stand out against its rounding.
    step = 1e-3
    for name, parameter in model.named_parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        index = int(gradient.abs().argmax())
        losses = []
        for sign in (1, -1):
            flat[index] += sign * step
            losses.append(loss_of(model, ids).item())
            flat[index] -= sign * step
        measured = (losses[0] - losses[1]) / (2 * step)
        assert measured == pytest.approx(gradient[index].item(), rel=2e-2, abs=2e-3), name


def test_dropout_acts_in_training_only():
    model = random_model(small_config(attention_dropout=0.5))
    ids = random_ids(1, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits, atol=1e-2)


def test_fresh_weights_are_as_published():
    config = small_config(
        router="shared-expert", num_shared_experts=1, hidden_size=64, num_hidden_layers=8, vocab_size=512,
        head_dim=32, moe_intermediate_size=48, initializer_range=0.02, tie_word_embeddings=False,
    )  # fmt: skip
    model = CausalLM(config).initialize()
    scaled = 0.02 / (2 * 8) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
        elif ".lfa." not in name:
            expected = scaled if "o_proj" in name or "down_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    for module in model.modules():
        if isinstance(module, LocalizedFilter):
            for convolution, bound in ((module.conv1, 128**-0.5), (module.conv2, 64**-0.5)):
                for tensor in convolution.parameters():
                    assert 0.85 * bound < tensor.abs().max().item() <= bound


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def largest(run, *args):
    with LargestTensor() as mode:
        run(*args)
    return mode.elements


def scored(model, length):
    with torch.no_grad():
        model(random_ids(1, length))


def trained(model, length):
    model.train()
    loss_of(model, random_ids(1, length + 1)).backward()


def chunked(model, length):
    cache = Cache(model.config, 1, length, dtype=torch.float32)
    ids = random_ids(length)
    with torch.no_grad():
        for chunk in ids.split(64):
            model.model(chunk, cache.extend([len(chunk)]))


@pytest.mark.parametrize("run", [scored, trained, chunked])
@pytest.mark.parametrize("packing", ["continuous", "isolated"])
def test_no_tensor_grows_with_the_square_of_the_length(run, packing):
    config = small_config(
        num_hidden_layers=1, num_experts=4, max_position_embeddings=2048, packing=packing, head_dim=8,
        num_attention_heads=2,
    )  # fmt: skip
    model = random_model(config)
    short, long = largest(run, model, 512), largest(run, model, 2048)
    assert long <= 4 * short
    assert long < 2048 * 2048 / 4, "the test could not see a mask of [S, S]"
