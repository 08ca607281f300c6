"""Open what `--data` names, of either format, and check that it fits a model before anything is computed."""

from collections.abc import Sequence
from pathlib import Path

from yuanmoe.config import ModelConfig
from yuanmoe.data.loader.loader import LoaderOptions, WeightedDocuments
from yuanmoe.data.loader.mixture import parse_mixture
from yuanmoe.data.sets.documents import Documents
from yuanmoe.data.sets.manifest import MANIFEST, check_same_tokenizer
from yuanmoe.data.sets.megatron import MegatronTokens
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.errors import DataError
from yuanmoe.text.tokenizer import Tokenizer, check_tokenizer


def open_documents(path: str | Path) -> PackedTokens | MegatronTokens:
    """A dataset folder, or a Megatron pair by its name with or without suffix. Raises DataError for neither."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return PackedTokens(path)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if Path(f"{prefix}.idx").is_file():
        return MegatronTokens(prefix)
    raise DataError(
        f"{path} is no dataset: there is neither {path / MANIFEST} nor {prefix}.idx; make one with yuanmoe data pack"
    )


def open_sources(words: Sequence[str]) -> list[WeightedDocuments]:
    """The sources of `weight path weight path ...`, or of paths alone. Raises UsageError and DataError."""
    return [WeightedDocuments(documents=open_documents(path), weight=weight) for weight, path in parse_mixture(words)]


def check_datasets_fit(
    sources: Sequence[WeightedDocuments],
    options: LoaderOptions,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Raise DataError or TokenizerError where the model cannot learn from these tokens, or not in such windows."""
    if options.length > config.max_position_embeddings:
        raise DataError(
            f"windows of {options.length} tokens exceed the model's context of {config.max_position_embeddings} "
            "(max_position_embeddings); ask for shorter ones, or extend the context"
        )
    if options.vocab_size > config.vocab_size:
        raise DataError(f"ids below {options.vocab_size} are let through, the model has {config.vocab_size} rows")
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.vocab_size, config.eod_token_id)
    for source in sources:
        _check_source(source.documents, config, tokenizer)


def _check_source(documents: Documents, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if documents.vocab_size is not None and documents.vocab_size > config.vocab_size:
        raise DataError(
            f"{documents.name} holds ids of a vocabulary of {documents.vocab_size}, the model's is "
            f"{config.vocab_size}; pack the text again with the model's tokenizer"
        )
    if isinstance(documents, PackedTokens):
        if tokenizer is not None:
            check_same_tokenizer(documents.manifest, tokenizer, documents.name)
        if documents.manifest.eod_id != config.eod_token_id:
            raise DataError(
                f"documents of {documents.name} end with {documents.manifest.eod_id}, the model's <eod> is "
                f"{config.eod_token_id}; pack the text again with the model's tokenizer"
            )
