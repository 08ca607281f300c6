"""Both layouts hold the same numbers: what is written is what is read, for every model there can be."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_writers import EMBEDDING, HEAD, memory_folder, official_json, official_state, random_state, write_bin
from small_models import configs, small_config
from yuanmoe.checkpoint.files.lazy import ComposedTensor, TensorPart, TensorView
from yuanmoe.checkpoint.formats.mapping import layout, to_native, to_official
from yuanmoe.checkpoint.formats.official_config import official_config, official_fields
from yuanmoe.checkpoint.load import load_state
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.checkpoint.write.save import save_native, save_official
from yuanmoe.config import ModelConfig
from yuanmoe.presets import PRESETS, preset

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@settings(max_examples=25, deadline=None)
@given(config=configs(), dtype=DTYPES, shard_bytes=st.sampled_from([1, 3_000, 10**9]))
def test_any_model_survives_both_layouts(config, dtype, shard_bytes):
    state = random_state(config, dtype)
    with memory_folder() as folder:
        official, native = Path(folder, "official"), Path(folder, "native")
        save_official(state, config, official, shard_bytes=shard_bytes)
        found = {name: tensor for file in official.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert_same(found, official_state(config, state))
        source = open_checkpoint(official)
        assert source.config == config
        save_native(source, source.config, native, shard_bytes=shard_bytes)
        copied = open_checkpoint(native)
        assert copied.config == config
        assert_same(load_state(copied), state)


@settings(max_examples=15, deadline=None)
@given(
    config=configs()
    .filter(lambda config: config.router == "attention" and config.localized_filtering)
    .map(lambda config: config.replace(router_bias=False)),
    dtype=DTYPES,
    shards=st.sampled_from([1, 3]),
    head=st.sampled_from(["absent", "aliased", "duplicated", "own"]),
)
def test_released_files_come_back_bit_for_bit_with_every_key(config, dtype, shards, head):
    config = config.replace(num_experts=config.experts_per_layer[0], tie_word_embeddings=head != "own")
    official = official_state(config, random_state(config, dtype))
    if head in ("aliased", "duplicated"):
        official[HEAD] = official[EMBEDDING] if head == "aliased" else official[EMBEDDING].clone()
    # What the released keys cannot say is given under ours.
    names = (
        "partial_rotary_factor",
        "rope_angles",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts_per_tok",
    )
    own = {name: getattr(config, name) for name in names}
    values = official_json(config, yuanmoe=own, tie_word_embeddings=config.tie_word_embeddings)
    values |= {"torch_dtype": str(dtype).removeprefix("torch."), "output_router_logits": True}
    with memory_folder() as folder:
        source = open_checkpoint(write_bin(Path(folder, "released"), values, official, shards))
        assert source.config == config
        save_native(source, source.config, Path(folder, "native"))
        native = open_checkpoint(Path(folder, "native"))
        save_official(native, native.config, Path(folder, "again"))
        assert_same(load_file(Path(folder, "again", "model.safetensors")), official)
        again = open_checkpoint(Path(folder, "again"))
        assert dict(again.origin.config) == values
        assert again.config == config


@settings(max_examples=50, deadline=None)
@given(config=configs())
def test_the_table_covers_every_element_of_both_layouts_once(config):
    table = layout(config)
    for shapes, place in ((table.native, (0, 1)), (table.official, (2, 3))):
        covered = {name: torch.zeros(shape).flatten() for name, shape in shapes.items()}
        for span in table.spans:
            start = span[place[1]]
            covered[span[place[0]]][start : start + span.size] += 1
        assert all(bool((count == 1).all()) for count in covered.values())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_said_in_official_keys(name):
    values = official_config(preset(name), torch.bfloat16)
    assert ModelConfig.from_dict(official_fields(values)) == preset(name)
    assert "yuanmoe" not in values


@settings(max_examples=100, deadline=None)
@given(
    config=configs(), base=st.sampled_from([10000.0, 40890.0, 1e6]), packing=st.sampled_from(["continuous", "hf-mask"])
)
def test_any_configuration_survives_the_official_one(config, base, packing):
    config = config.replace(rope_theta=base, packing=packing)
    values = official_config(config, torch.float32)
    assert ModelConfig.from_dict(official_fields(values)) == config
    assert official_config(config, torch.float32, values) == values


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_range_of_a_lazy_tensor_is_that_range(data):
    """Blocks and ranges of both directions, nested, are slices of the whole."""
    config = small_config(hidden_size=6, tie_word_embeddings=False)
    state = random_state(config)
    table = layout(config)
    views = {name: TensorView.of(tensor) for name, tensor in state.items()}
    tensors = to_official(table, to_native(table, to_official(table, views)))
    expected = official_state(config, state)
    name = data.draw(st.sampled_from(sorted(tensors)))
    lazy, whole = tensors[name], expected[name].flatten()
    rows = whole.numel() // lazy.row
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(lazy.flat(first * lazy.row, last * lazy.row), whole[first * lazy.row : last * lazy.row])
    max_bytes = data.draw(st.integers(1, 2 * lazy.nbytes))
    blocks = list(lazy.blocks(max_bytes))
    assert torch.equal(torch.cat(blocks), whole)
    assert all(len(block) * 4 <= max(max_bytes, lazy.row * 4) for block in blocks)


def test_parts_that_meet_inside_a_range_are_joined():
    a, b = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
    joined = ComposedTensor.of((4, 3), [TensorPart(TensorView.of(tensor), 0, 6) for tensor in (a, b)])
    assert torch.equal(joined.rows(1, 3), torch.cat([a, b])[1:3])
    assert torch.equal(joined.read(), torch.cat([a, b]))
