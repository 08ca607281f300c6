"""GPTQ and Megatron checkpoints that are incomplete, split or of something else: refused with the way out."""

import pytest
import torch

from checkpoint_writers import (
    official_json,
    official_state,
    pack_gptq,
    random_state,
    write_gptq,
    write_megatron,
)
from small_models import small_config
from yuanmoe.checkpoint.files.lazy import TensorView
from yuanmoe.checkpoint.formats.gptq import packed_tensors
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.errors import CheckpointError

CONFIG = small_config(hidden_size=12, head_dim=12, intermediate_size=0, tie_word_embeddings=False)
NORM = "model.layers.1.input_layernorm.weight"


def test_gptq_pieces_must_be_all_there(tmp_path):
    config = CONFIG.replace(hidden_size=16, head_dim=16, moe_intermediate_size=16)
    folder = tmp_path / "m"
    write_gptq(folder, official_json(config), official_state(config, random_state(config)), 4, (0.4, 0.7))
    pieces = sorted(folder.glob("*.safetensors0*"))
    last = pieces[-1].read_bytes()
    pieces[-1].unlink()
    with pytest.raises(CheckpointError, match=r"safetensors00 \.\. .*safetensors01 is truncated: \d+ bytes expected"):
        open_checkpoint(folder)
    pieces[-1].write_bytes(last)
    pieces[1].unlink()
    with pytest.raises(CheckpointError, match=r"gptq_model-4bit-8g\.safetensors01 is missing, beside"):
        open_checkpoint(folder)


def test_other_packings_are_refused():
    parts, _ = pack_gptq(torch.empty(16, 16), 4, group=8)

    def lazy(**changes):
        return {f"x.{name}": TensorView.of(part) for name, part in (parts | changes).items() if part is not None}

    for settings, message in (
        ({"bits": 3}, "in 3 bits; supported: 'gptq' in 2, 4 or 8 bits"),
        ({"bits": 4, "quant_method": "awq"}, "packed by 'awq'"),
        ({"bits": 4, "checkpoint_format": "gptq_v3"}, "gptq_v3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            packed_tensors(lazy(), settings)
    with pytest.raises(CheckpointError, match=r"tensor 'x\.scales' of a packed weight is missing"):
        packed_tensors(lazy(scales=None), {"bits": 4})
    for name, part in (
        ("qzeros", torch.zeros(1, 2).int()),
        ("qweight", parts["qweight"].float()),
        ("scales", torch.ones(2)),
    ):
        with pytest.raises(CheckpointError, match="of x have shapes"):
            packed_tensors(lazy(**{name: part}), {"bits": 4})
    with pytest.raises(CheckpointError, match=r"x\.g_idx names groups outside 0\.\.1"):
        packed_tensors(lazy(g_idx=parts["g_idx"] + 1), {"bits": 4})["x.weight"].read()


def test_incomplete_or_split_megatron_runs_are_refused(tmp_path):
    config = CONFIG.replace(tie_word_embeddings=True, num_hidden_layers=2)
    folder = write_megatron(tmp_path / "m", config, random_state(config), stages=2)
    ranks = folder / "iter_0001477"
    with pytest.raises(CheckpointError, match=r"vocabulary of 32, .*eod_token_id 77185, .*: put a config.json"):
        open_checkpoint(folder)
    (ranks / "mp_rank_00_001").rename(ranks / "mp_rank_00_002")
    with pytest.raises(CheckpointError, match="pipeline stage 1 is missing"):
        open_checkpoint(folder)
    (ranks / "mp_rank_00_002").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="pipeline_model_parallel_size is 2, but there are weights for 1"):
        open_checkpoint(folder)
    (tmp_path / "elsewhere").rename(ranks / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match="mp_rank_01_000 is a tensor-parallel or expert-parallel part"):
        open_checkpoint(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("99")
    with pytest.raises(CheckpointError, match=r"names iteration '99', but .*iter_0000099 is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": 1}, "has no dictionary 'model'"),
        (
            {"model": {"language_model": {"what.weight": torch.ones(3)}}},
            r"unknown tensor 'language_model.what.weight' \(3,\)",
        ),
        (
            {"model": {"word_embeddings_for_head": {"weight": torch.ones(3, 2)}}},
            "has num_attention_heads 0 in its args",
        ),
        (
            {"model": {"language_model": {"encoder": {"layers.0.mlp.experts.weight1": torch.ones(3, 2)}}}},
            r"layers.0.mlp.experts.weight1' of shape \(3, 2\) does not fit 0 experts and hidden size 0",
        ),
        (
            {"model": {"language_model": {"encoder": {"layers.0.mlp.dense_h_to_4h.weight": torch.ones(3, 2)}}}},
            r"layers.0.mlp.dense_h_to_4h.weight' has shape \(3, 2\), which is not 2 equal parts",
        ),
    ],
)
def test_files_that_are_no_yuan_megatron_checkpoints_are_refused(tmp_path, content, message):
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(content, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
