"""What a run reads: the batches, the held-out text and the tokenizer of one folder of packed tokens.

The folder holds the shards `train` and, where there is one, `heldout`, and the tokenizer's files. This is where other
sources of batches come in: whatever makes a `TrainingData` can be trained on. Not here: making shards (`data/`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuanmoe.data.loader import ShuffledWindows, Windows, consecutive_windows
from yuanmoe.data.shards import Shard, open_shard
from yuanmoe.data.tokenizer import check_tokenizer, load_tokenizer
from yuanmoe.errors import DataError
from yuanmoe.train.recipe import Recipe

TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Everything a run reads."""

    batch: Callable[[int], Windows]
    """The windows of a step by its number, from 0; the same for the same number, whenever it is asked."""
    heldout: Windows | None
    """What the run is measured on."""
    bytes_per_token: float
    """Of the held-out text."""
    tokenizer: Path
    """The folder with its files."""
    identity: dict[str, Any]
    """What names the text: a run goes on with the same one."""


def open_data(folder: Path, recipe: Recipe) -> TrainingData:
    """The data in `folder`, checked against the recipe's model.

    Raises DataError for missing or damaged shards, for too little text and for text of another tokenizer, and
    TokenizerError for a tokenizer of another model.
    """
    train = open_shard(folder / TRAIN)
    heldout = open_shard(folder / HELDOUT) if (folder / HELDOUT).with_suffix(".json").is_file() else None
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, recipe.model.vocab_size, recipe.model.eod_token_id)
    for shard in filter(None, (train, heldout)):
        if shard.index.vocab_size != tokenizer.vocab_size:
            raise DataError(
                f"{folder} holds tokens of a vocabulary of {shard.index.vocab_size}, its tokenizer has "
                f"{tokenizer.vocab_size}; pack the text again with this tokenizer"
            )
    length = recipe.data.sequence_length
    batches = ShuffledWindows(train.ids, length=length, batch_size=recipe.data.batch_size, seed=recipe.run.seed)
    return TrainingData(
        batch=batches.batch,
        heldout=None if heldout is None else consecutive_windows(heldout.ids, length=length),
        bytes_per_token=(heldout or train).bytes_per_token,
        tokenizer=folder,
        identity={"train": _name(train), "heldout": heldout and _name(heldout)},
    )


def _name(shard: Shard) -> str:
    return f"{shard.index.num_tokens} tokens, sha256 {shard.index.sha256[:16]}"
