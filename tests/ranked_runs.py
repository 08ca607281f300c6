"""Whole runs on several ranks, for tests; in a file of its own, which those processes can import."""

import torch

from small_runs import batches, heldout
from yuanmoe.checkpoint.formats.native_config import Origin, parse_dtype
from yuanmoe.checkpoint.open import open_checkpoint
from yuanmoe.train.parallel.layout import laid_out, layout_of
from yuanmoe.train.parallel.ranks import ALONE, grouped
from yuanmoe.train.parallel.shard import ready_to_use, sharded
from yuanmoe.train.parallel.stages import EMBEDDING
from yuanmoe.train.start.model import loaded_model, new_model
from yuanmoe.train.state.checkpoint import Checkpoints, newest, read_facts, snapshot
from yuanmoe.train.state.stored import Stored
from yuanmoe.train.steps.loop import Training


def run(made, words, size, folder, steps, resume=False, layers=None):
    """So many steps in this layout, saved in `folder`: what each said, without times; `words` are None for a process
    alone, `layers` those of each stage."""
    ranks = ALONE if words is None else grouped(layout_of(words, size, made, layers), made.model)
    computed = made if ranks.layout is None else laid_out(made, ranks.layout)
    place = newest(folder) if resume else None
    model = new_model(computed) if place is None else loaded_model(computed, open_checkpoint(place))
    training = Training(sharded(model, ranks), computed, batches(made), heldout(), ranks)
    if place is not None:
        training.load(Stored(place), read_facts(place))
    said = []
    for _ in range(steps):
        progress = training.advance()
        said.append(
            (progress.loss, progress.gradient_norm, progress.balance_loss, progress.heldout_loss, progress.load)
        )
    with Checkpoints(folder, keep_last=9, ranks=ranks) as kept:
        dtype = parse_dtype(made.run.dtype)
        kept.save(snapshot(training.model, training.tensors(), training.facts(), Origin(), ranks, dtype))
        kept.finish()
    return said


def scores_in_use(made, words, size):
    """Logits of the model as samples use it: a prompt, then a token after it."""
    ranks = grouped(layout_of(words, size, made), made.model)
    ids = torch.arange(5)[None] + 3
    with ready_to_use(sharded(new_model(made), ranks), ranks) as model, torch.inference_mode():
        return None if model is None else model(ids).logits


def embedding_after(made, words, size, steps):
    """The embedding as this rank has it after so many steps."""
    ranks = grouped(layout_of(words, size, made), made.model)
    training = Training(sharded(new_model(made), ranks), laid_out(made, ranks.layout), batches(made), None, ranks)
    for _ in range(steps):
        training.advance()
    return training.model.get_parameter(EMBEDDING).detach()
