"""The stages of `yuanmoe demo`: corpus, tokenizer, tokens, model. Each works on what the ones before it left.

What a stage found is JSON values, and is also told in a line. Not here: when a stage is done again (`stages.py`).
"""

import json
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from yuanmoe.config import ModelConfig
from yuanmoe.data.prepare.pack import pack_texts
from yuanmoe.data.sets.packed import PackedTokens
from yuanmoe.data.sources.python_sources import stdlib_documents
from yuanmoe.errors import DataError
from yuanmoe.plan import cost
from yuanmoe.text.bpe import train_bpe
from yuanmoe.text.tokenizer import load_tokenizer
from yuanmoe.train.recipe.recipe import Recipe
from yuanmoe.units import format_count, format_size

LEFT_OUT = "encodings/"
"""Tables of characters: an eighth of the standard library, and nothing to learn from them."""

HELDOUT_EVERY = 40
"""One document in so many is kept from training, to measure with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One stage as it is to be done."""

    name: str
    doing: str
    """What people read meanwhile; empty where the work shows itself."""
    settings: Mapping[str, Any]
    """All that it depends on besides the stages before it."""
    outputs: tuple[str, ...]
    """Files in the demo's folder that are there once it is done."""
    do: Callable[[], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    """What it found, told to people."""


def works(folder: Path, recipe: Recipe, max_bytes: int | None, console: Console) -> tuple[Work, ...]:
    """The stages in order."""
    library = f"{sysconfig.get_path('stdlib')} of Python {sys.version}"
    vocab_size = recipe.model.vocab_size
    return (
        Work(
            name="corpus",
            doing="reading the standard library",
            settings={"library": library, "max_bytes": max_bytes, "left_out": LEFT_OUT},
            outputs=("corpus.jsonl",),
            do=lambda: make_corpus(folder, max_bytes),
            line=_corpus_line,
        ),
        Work(
            name="tokenizer",
            doing="learning tokens",
            settings={"vocab_size": vocab_size},
            outputs=("tokenizer/tokenizer.json",),
            do=lambda: make_tokenizer(folder, vocab_size),
            line=lambda found: f"{found['vocab_size']:,} byte-level BPE tokens",
        ),
        Work(
            name="tokens",
            doing="tokenizing",
            settings={"heldout_every": HELDOUT_EVERY},
            outputs=("tokens/train/manifest.json", "tokens/heldout/manifest.json"),
            do=lambda: make_tokens(folder),
            line=_tokens_line,
        ),
        Work(
            name="model",
            doing="",
            settings=recipe.to_dict(),
            outputs=("model/config.json",),
            do=lambda: make_model(folder, recipe, console),
            line=_model_line,
        ),
    )


def make_corpus(folder: Path, max_bytes: int | None) -> dict[str, Any]:
    """corpus.jsonl: the documents of the standard library. Raises DataError when there are too few."""
    documents = text_bytes = 0
    beside = folder / "corpus.jsonl.partial"
    with beside.open("w", encoding="utf-8") as file:
        for document in stdlib_documents(max_bytes=max_bytes):
            if not document.name.startswith(LEFT_OUT):
                file.write(json.dumps({"name": document.name, "text": document.text}) + "\n")
                documents += 1
                text_bytes += len(document.text.encode())
    if documents < 2:
        raise DataError(
            f"the standard library gave {documents} documents; training needs one, and another to measure with: "
            "allow more (--corpus-size), or use a Python that has its library as .py files"
        )
    beside.replace(folder / "corpus.jsonl")
    return {"documents": documents, "text_bytes": text_bytes, "python": platform.python_version()}


def _corpus_line(found: dict[str, Any]) -> str:
    size = format_size(found["text_bytes"])
    return f"{found['documents']:,} files, {size}: the standard library of Python {found['python']}"


def make_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """tokenizer/: a byte-level BPE of the whole corpus."""
    tokenizer = train_bpe(_texts(folder), vocab_size)
    tokenizer.save(folder / "tokenizer")
    return {"vocab_size": tokenizer.vocab_size}


def make_tokens(folder: Path) -> dict[str, Any]:
    """tokens/: the corpus as two datasets, `train` and `heldout`: what `yuanmoe train` takes."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    every = min(HELDOUT_EVERY, sum(1 for _ in _texts(folder)))

    def part(heldout: bool) -> Iterator[str]:
        return (text for index, text in enumerate(_texts(folder)) if (index % every == every // 2) == heldout)

    train = pack_texts(part(heldout=False), folder / "tokens" / "train", tokenizer, overwrite=True)
    heldout = pack_texts(part(heldout=True), folder / "tokens" / "heldout", tokenizer, overwrite=True)
    return {"train": _counts(train), "heldout": _counts(heldout)}


def _counts(tokens: PackedTokens) -> dict[str, int]:
    names = ("num_tokens", "num_documents", "text_bytes", "vocab_size")
    return {name: getattr(tokens.manifest, name) for name in names}


def _tokens_line(found: dict[str, Any]) -> str:
    train, heldout = found["train"], found["heldout"]
    size = train["text_bytes"] / train["num_tokens"]
    learned, kept = format_count(train["num_tokens"]), format_count(heldout["num_tokens"])
    return f"{learned} to learn from, {size:.1f} bytes each; {kept} held out"


def make_model(folder: Path, recipe: Recipe, console: Console) -> dict[str, Any]:
    """model/: trained on the tokens and saved in the official layout with its tokenizer; run/: how that went."""
    # Torch takes seconds to import: too long for those before it, and for `--help`.
    from yuanmoe.checkpoint.write.save import save_official
    from yuanmoe.cli.train.job import TerminalObserver
    from yuanmoe.train.desk import TrainingJob
    from yuanmoe.train.run import Run
    from yuanmoe.train.start.data import open_data
    from yuanmoe.train.start.model import new_model

    data = open_data([(1.0, folder / "tokens")], recipe)
    console.print(f"  model      {describe_model(recipe.model)}", soft_wrap=True)
    model = new_model(recipe)
    job = TrainingJob(model=model, recipe=recipe, data=data, folder=folder / "run", keeps=False)
    with TerminalObserver(console) as observer:
        found = Run(job, observer).go() | {"peak_flops_per_s": observer.peak_flops}
    save_official(model.state_dict(), recipe.model, folder / "model", companions=folder / "tokenizer", overwrite=True)
    return found


def describe_model(config: ModelConfig) -> str:
    """A model of equal layers in a line."""
    total, active = (sum(count.values()) for count in (cost.parameters(config), cost.active_parameters(config)))
    return (
        f"{config.num_hidden_layers} layers of {config.experts_per_layer[0]} experts, {config.num_experts_per_tok} at "
        f"work: {format_count(total)} parameters, {format_count(active)} for a token"
    )


def _model_line(found: dict[str, Any]) -> str:
    early = "; ended early, --fresh trains it in full" if found["interrupted"] else ""
    return (
        f"{found['heldout_bits_per_byte']:.2f} bits a byte on held-out text, after {found['tokens']:,} tokens in "
        f"{found['seconds']:.0f} s{early}"
    )


def _texts(folder: Path) -> Iterator[str]:
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]
