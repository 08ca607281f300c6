"""All layers in one call of the kernels against the modules one by one: the very same numbers, or the modules' work."""

import copy
import pickle

import pytest
import torch

from small_models import VARIANTS, random_model, small_config
from yuanmoe.bench.synthetic import synthetic_model
from yuanmoe.checkpoint.formats.packed_weight import policy
from yuanmoe.errors import UsageError
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.fast.whole_pass import AT_ONCE_TOKENS, WholePass
from yuanmoe.model.state.cache import Cache
from yuanmoe.model.state.paged import PagedCache, PagedSequences
from yuanmoe.model.state.sequences import WholeSequences
from yuanmoe.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason()}")
KINDS = ("4 bits", "8 bits", "bfloat16")


class Counted(WholePass):
    """Says how often it did the work."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0

    def run(self, *arguments):
        done = super().run(*arguments)
        self.used += done is not None
        return done


class Never(WholePass):
    """Leaves everything to the modules."""

    def run(self, *arguments):
        return None


def made(kind: str = "4 bits", **changes) -> CausalLM:
    torch.manual_seed(0)
    config = small_config(**changes)
    if kind == "bfloat16":
        return random_model(config).bfloat16()
    return synthetic_model(config, policy(config, int(kind[0])))


def passes(model: CausalLM, how: WholePass, cache: Cache, counts: list[list[int]]):
    """Hidden states and routings of several passes of random tokens."""
    torch.manual_seed(1)
    model.model._whole_pass = how
    return [model.model(torch.randint(3, 32, (sum(new),)), cache.extend(new)) for new in counts]


def assert_same(one, other) -> None:
    for (hidden, routings), (expected, chosen) in zip(one, other, strict=True):
        assert torch.equal(hidden, expected)
        for routing, choice in zip(routings, chosen, strict=True):
            assert all(map(torch.equal, routing, choice))


def used_for(model: CausalLM) -> int:
    """Whether a decode step of `model` is one call."""
    how = Counted()
    passes(model, how, model.new_cache(1, 1), [[1]])
    return how.used


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "router bias"])
@torch.inference_mode()
def test_every_architecture_gives_the_very_numbers_of_its_modules(name, kind, kv_dtype):
    model = made(kind, **VARIANTS[name])
    model.kv_dtype = kv_dtype
    counts = [[5, 2, 1], [1, 1, 1], [0, 3, 0], [1, 0, 1], [AT_ONCE_TOKENS, 1, 2]]
    how = Counted()
    whole = passes(model, how, model.new_cache(3, 40), counts)
    assert_same(whole, passes(model, Never(), model.new_cache(3, 40), counts))
    # Whole bfloat16 matrices are read a few tokens at a time; more are the modules' work.
    assert how.used == (3 if kind == "bfloat16" else len(counts))


@torch.inference_mode()
def test_pages_are_read_as_a_run_of_memory_is():
    model = made()
    tables = [[[4, 1], [0, 3]], [[4, 1], [0, 3]], [[4, 1], [0, 3]]]
    new = [[33, 2], [1, 1], [1, 31]]
    past = [[0, 0], [33, 2], [34, 3]]
    results = []
    for how in (Counted(), Never()):
        torch.manual_seed(1)
        model.model._whole_pass = how
        cache = PagedCache(model.config, 5, 32, dtype=torch.float32, kv_dtype=torch.bfloat16)
        results.append(
            [
                model.model(
                    torch.randint(3, 32, (sum(counts),)),
                    PagedSequences(cache, before, counts, torch.tensor(table, dtype=torch.int32).numpy()),
                )
                for table, before, counts in zip(tables, past, new, strict=True)
            ]
        )
        assert getattr(how, "used", 3) == 3
    assert_same(*results)


@torch.inference_mode()
def test_a_sequence_without_new_tokens_keeps_its_state():
    model = made()
    cache = model.new_cache(2, 8)
    passes(model, Counted(), cache, [[2, 2]])
    before = [tail[1].clone() for tails in cache.tails for tail in tails]
    passes(model, Counted(), cache, [[1, 0]])
    assert all(
        torch.equal(tail[1], kept) for tail, kept in zip([t for ts in cache.tails for t in ts], before, strict=True)
    )


@torch.inference_mode()
def test_what_changes_after_the_first_pass_is_seen():
    model = made()
    how = Counted()
    passes(model, how, model.new_cache(1, 20), [[2], [1]])
    state = {name: tensor.clone() for name, tensor in made("4 bits", initializer_range=0.5).state_dict().items()}
    model.load_state_dict(state, assign=True)
    cache, again = model.new_cache(1, 20), model.new_cache(1, 20)
    assert_same(passes(model, how, cache, [[2], [1]]), passes(model, Never(), again, [[2], [1]]))
    cache.select([0])
    assert_same(passes(model, how, cache, [[1]]), passes(model, Never(), again, [[1]]))
    assert how.used == 5


@torch.inference_mode()
def test_copies_take_addresses_of_their_own():
    model = made()
    assert used_for(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert used_for(other)
        for parameter in (*other.parameters(), *other.buffers()):
            parameter.zero_()
    assert model.model.norm.weight.all()


@torch.inference_mode()
def test_hooks_adapters_and_other_layers_are_the_modules_work():
    model = made()
    assert used_for(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not used_for(model)
    handle.remove()
    assert used_for(model)
    layer = model.model.layers[1].self_attn.o_proj
    layer.lora = torch.nn.Linear(24, 16)
    assert not used_for(model)
    layer.lora = None
    assert used_for(model)
    how = Counted()
    passes(model, how, model.new_cache(1, 1), [[1]])
    model.model.layers[0].mlp.router = made(router="linear").model.layers[0].mlp.router
    model.model.layers[0].mlp.router.bias = torch.zeros(8)
    passes(model, how, model.new_cache(1, 1), [[1]])
    assert how.used == 1


@torch.inference_mode()
def test_models_that_the_kernels_do_not_know_are_the_modules_work():
    assert not used_for(random_model(small_config()))
    assert not used_for(made(**VARIANTS["router bias"]))
    assert not used_for(made().train())
    assert not used_for(made(num_experts=native.MAX_EXPERTS + 1))


def test_gradients_are_the_modules_work():
    model = made()
    with torch.enable_grad():
        assert not used_for(model)


@torch.inference_mode()
def test_sequences_without_stored_state_are_the_modules_work():
    model, how = made(), Counted()
    model.model._whole_pass = how
    model.model(torch.randint(3, 32, (4,)), WholeSequences(1, 4))
    assert how.used == 0


@torch.inference_mode()
def test_slots_that_are_not_there_are_refused():
    model = made()
    cache = model.new_cache(1, 4)
    sequences = cache.extend([2])
    sequences._positions += 3
    with pytest.raises(UsageError, match="a page or slot of the new tokens does not exist in what is stored"):
        model.model(torch.tensor([3, 4]), sequences)
