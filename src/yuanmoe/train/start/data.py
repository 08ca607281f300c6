"""What a run reads: batches of one dataset or of many by weight, the held-out text, and the tokenizer.

Whatever makes a `TrainingData` can be trained on. Not here: making datasets and cutting windows (`data/`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yuanmoe.checkpoint.open import OpenCheckpoint
from yuanmoe.data.loader.fim import FillInMiddle
from yuanmoe.data.loader.loader import Batch, Loader, LoaderOptions, WeightedDocuments, measuring_windows
from yuanmoe.data.sets.datasets import check_datasets_fit, open_documents
from yuanmoe.data.sets.manifest import MANIFEST
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.errors import DataError, TokenizerError
from yuanmoe.text.tokenizer import Tokenizer, load_tokenizer
from yuanmoe.train.recipe.recipe import Recipe

TRAIN, HELDOUT = "train", "heldout"

HELDOUT_TOKENS = 2**22
"""A loss of so many tokens is known to a thousandth; more would only take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Everything a run reads."""

    batch: Callable[[int], Batch]
    """The windows of a step by the number of its first sample; the same for the same number, whenever it is asked."""
    heldout: Batch | None
    """What the run is measured on."""
    bytes_per_token: float | None
    """Of the held-out text; None where its format does not say, and where only answers are learned."""
    tokenizer: Path
    """The folder with its files."""
    identity: dict[str, Any]
    """What names the text: a run goes on with the same one."""


def open_data(
    places: Sequence[tuple[float, Path]],
    recipe: Recipe,
    *,
    heldout: Sequence[Path] = (),
    tokenizer: Path | None = None,
    model: OpenCheckpoint | None = None,
) -> TrainingData:
    """The data in `places`, with their weights, checked against the recipe's model.

    A place is a dataset, a Megatron pair, or a folder of two datasets, `train` and `heldout`. The tokenizer of the
    first dataset serves where none is named. Raises DataError for missing or damaged datasets, for too little text
    and for text of another tokenizer, and TokenizerError for a tokenizer of another model: that of the checkpoint
    `model`, where it has one.
    """
    trained = [
        WeightedDocuments(documents=open_documents(_part(path, TRAIN)), weight=weight) for weight, path in places
    ]
    beside = [path / HELDOUT for _, path in places if _part(path, HELDOUT) != path]
    measured = [WeightedDocuments(documents=open_documents(_part(path, HELDOUT))) for path in [*beside, *heldout]]
    words = tokenizer or _tokenizer_of(trained)
    loaded = load_tokenizer(words)
    if model is not None:
        _check_model_tokenizer(model, loaded, words)
    options = _options(recipe, loaded)
    check_datasets_fit([*trained, *measured], options, recipe.model, loaded)
    loader = Loader(trained, options)
    return TrainingData(
        batch=loader.windows_from,
        heldout=_measured(measured, options.length),
        bytes_per_token=_bytes_per_token(measured or trained),
        tokenizer=words if words.is_dir() else words.parent,
        identity={TRAIN: [_name(source) for source in trained], HELDOUT: [_name(source) for source in measured]},
    )


def _part(path: Path, name: str) -> Path:
    """The dataset of that name in a folder of two, or the path itself."""
    return path / name if (path / name / MANIFEST).is_file() else path


def _tokenizer_of(sources: Sequence[WeightedDocuments]) -> Path:
    for source in sources:
        if isinstance(source.documents, PackedTokens):
            return source.documents.path
    raise DataError(f"{sources[0].documents.name} does not say which tokenizer made it; name it with --tokenizer")


def _check_model_tokenizer(model: OpenCheckpoint, tokenizer: Tokenizer, place: Path) -> None:
    """Raises TokenizerError where a checkpoint was trained on the ids of another tokenizer, whatever the sizes are."""
    try:
        own = load_tokenizer(model.path)
    except TokenizerError:
        return  # It has none: then the sizes and <eod> are all that can be compared.
    if own.sha256 != tokenizer.sha256 and _texts(own) != _texts(tokenizer):
        raise TokenizerError(
            f"the model in {model.path} has another tokenizer than the data: sha256 {own.sha256[:12]}, that of "
            f"{place} is {tokenizer.sha256[:12]}; pack the text with the model's: "
            f"yuanmoe data pack ... --tokenizer {model.path}"
        )


def _texts(tokenizer: Tokenizer) -> list[bytes]:
    """What each id stands for: files of one tokenizer in two formats agree in it."""
    return [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]


def _options(recipe: Recipe, tokenizer: Tokenizer) -> LoaderOptions:
    data = recipe.data
    fim = FillInMiddle.of(tokenizer, rate=data.fim_rate, spm_rate=data.fim_spm_rate) if data.fim_rate else None
    return LoaderOptions(
        length=data.sequence_length,
        batch_size=data.batch_size,
        vocab_size=recipe.model.vocab_size,
        seed=recipe.run.seed,
        fim=fim,
        mask=data.loss_mask,
        sep_id=tokenizer.sep_id,
        eod_id=tokenizer.eod_id,
    )


def _measured(sources: Sequence[WeightedDocuments], length: int) -> Batch | None:
    """Windows of all held-out sources, an equal number of each at most."""
    if not sources:
        return None
    limit = max(1, HELDOUT_TOKENS // length // len(sources))
    parts = [measuring_windows(source.documents, length=length, limit=limit) for source in sources]
    joined = {name: np.concatenate([asdict(part)[name] for part in parts]) for name in asdict(parts[0])}
    return Batch(**joined)


def _bytes_per_token(sources: Sequence[WeightedDocuments]) -> float | None:
    manifests = [each.documents.manifest for each in sources if isinstance(each.documents, PackedTokens)]
    if len(manifests) < len(sources) or any(each.trained_tokens is not None for each in manifests):
        return None
    return sum(each.text_bytes for each in manifests) / sum(each.num_tokens for each in manifests)


def _name(source: WeightedDocuments) -> str:
    documents = source.documents
    return f"{documents.num_tokens} tokens, {documents.fingerprint[:16]}, weight {source.weight:g}"
