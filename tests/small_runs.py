"""Small training runs for tests: a text that can be learned, a recipe for it, and the same as a folder of tokens."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np

from small_documents import Lists
from small_tokenizers import TEXTS, bpe
from yuanmoe.cli import main
from yuanmoe.data.loader.loader import Batch, Loader, LoaderOptions, WeightedDocuments, measuring_windows
from yuanmoe.data.prepare.pack import pack_texts
from yuanmoe.presets import preset
from yuanmoe.train.desk import TrainingJob
from yuanmoe.train.recipe.recipe import DataSettings, OptimizerSettings, Recipe, RunSettings, ScheduleSettings
from yuanmoe.train.recipe.recipes import named
from yuanmoe.train.recipe.settings import override
from yuanmoe.train.run import QuietObserver, Run
from yuanmoe.train.start.data import open_data
from yuanmoe.train.start.model import new_model
from yuanmoe.train.steps.loop import Training

LENGTH, BATCH = 16, 8


def text():
    """Counting up by steps of 1 to 3 that change now and then: learnable from the last two tokens."""
    rng = np.random.default_rng(0)
    return (3 + np.cumsum(np.repeat(rng.integers(1, 4, size=400), 10)) % 61).astype(np.uint16)


def recipe(**changes) -> Recipe:
    """Twelve steps of a tiny model; `changes` are fields of any section."""
    fields = {
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "learning_rate": 5e-3,
        "embedding_std": 1.0,
        "embedding_rate": 4.0,
        "max_tokens": 12 * LENGTH * BATCH,
        "milestones": 3,
        **changes,
    }
    model = fields.pop("model", preset("tiny", vocab_size=64, tie_word_embeddings=fields.pop("tied", False)))
    sections = {"data": DataSettings, "optimizer": OptimizerSettings, "schedule": ScheduleSettings, "run": RunSettings}
    made = {
        name: kind(**{f.name: fields.pop(f.name) for f in dataclasses.fields(kind) if f.name in fields})
        for name, kind in sections.items()
    }
    return Recipe(model=model, **made, **fields)


def batches(made: Recipe):
    """The batch of a step by the number of its first sample."""
    options = LoaderOptions(length=LENGTH, batch_size=made.data.batch_size, vocab_size=64, seed=made.run.seed)
    return Loader([WeightedDocuments(documents=Lists([text()]))], options).windows_from


def heldout():
    return measuring_windows(Lists([text()[-200:]]), length=LENGTH, limit=99)


def whole_batch(ids) -> Batch:
    """Windows [B, S + 1] of one document each, all of which is learned."""
    inner = ids[:, 1:]
    return Batch(ids=ids, loss_mask=np.ones(inner.shape, dtype=np.bool_), documents=np.zeros_like(inner))


def training(made: Recipe) -> Training:
    return Training(new_model(made), made, batches(made), heldout())


def write_tokens(folder: Path) -> Path:
    """Datasets of the texts that the small tokenizer was trained on."""
    pack_texts(TEXTS * 12, folder / "train", bpe())
    pack_texts(TEXTS[:2], folder / "heldout", bpe())
    return folder


FIELDS_OF_TIME = {"step_s", "elapsed_s", "tokens_per_s", "flops_per_s"}

TINY = (
    "model.vocab_size=512", "model.hidden_size=32", "model.num_experts=8", "model.moe_intermediate_size=24",
    "model.num_attention_heads=2", "model.head_dim=16", "model.attention_dropout=0.1", "data.sequence_length=16",
    "data.batch_size=4", "schedule.max_seconds=none", "schedule.max_tokens=1280", "run.milestones=2",
    'run.prompts=["def add"]', "run.sample_tokens=4",
)  # fmt: skip
"""Settings that make `nano` twenty steps of milliseconds."""


class Listener(QuietObserver):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def said(self, message: str) -> None:
        self.messages.append(message)


def job(data: Path, folder: Path, *settings: str, **changes) -> Run:
    """A tiny run on a folder of tokens."""
    made = override(named("nano"), (*TINY, *settings))
    opened = open_data([(1.0, data)], made)
    return Run(TrainingJob(model=new_model(made), recipe=made, data=opened, folder=folder, **changes), Listener())


def arguments(data: Path, out: Path, *options: str, settings: tuple[str, ...] = ()) -> list[str]:
    """The call of `yuanmoe train` for a tiny run."""
    changed = [part for setting in (*TINY, *settings) for part in ("--set", setting)]
    return ["train", "nano", "--data", str(data), "--out", str(out), "--threads", "1", *changed, *options]


def call(args: list[str], log: Path, slow_s: float = 0.0) -> None:
    """Runs the program in this process, which is a child of a test's; `slow_s` is added to every step."""
    stream = log.open("w", encoding="utf-8")
    os.dup2(stream.fileno(), 2)
    os.dup2(stream.fileno(), 1)
    sys.argv = ["yuanmoe", *args]
    if slow_s:
        advance = Training.advance

        def slow(self):
            time.sleep(slow_s)
            return advance(self)

        Training.advance = slow
    main.main()
