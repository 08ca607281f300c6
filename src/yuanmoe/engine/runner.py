"""One pass of the model over the tokens that the schedule names, and what is read off it.

Legend: N tokens of the pass, B sequences in it, R sequences whose next token can be chosen after it, D hidden,
V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from yuanmoe.engine.requests import PromptLogprobs, TokenRouting
from yuanmoe.engine.sampling import top_logprobs
from yuanmoe.engine.schedule import Sequence
from yuanmoe.engine.score import HEAD_TOKENS
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.multi_lora import MultiLora
from yuanmoe.model.router import Routing
from yuanmoe.model.state.paged import PagedCache, PagedSequences
from yuanmoe.routing.expert_load import ExpertLoad


class PassResult(NamedTuple):
    """What a pass made for the sequences that it read to their end, in the order of the batch."""

    logits: Tensor
    """[R, V]"""
    routings: list[TokenRouting | None]
    """Of each one's last token, where it was asked for."""


class Runner:
    """A model with its adapters and the pages of its sequences, and how often its experts were visited."""

    def __init__(self, model: CausalLM, adapters: MultiLora, cache: PagedCache, vocab_size: int) -> None:
        self._model = model
        self._adapters = adapters
        self._cache = cache
        self._vocab_size = vocab_size
        self.load = ExpertLoad(model.config.experts_per_layer, cache.device)

    def run(self, batch: list[tuple[Sequence, int]]) -> PassResult:
        """Computes the next tokens of each sequence into its pages, and scores prompts that want it."""
        sequences = self._sequences(batch)
        ids = np.empty(len(sequences.positions), dtype=np.int64)
        start = 0
        for sequence, count in batch:
            ids[start : start + count] = sequence.ids[sequence.computed : sequence.computed + count]
            start += count
        adapters = np.repeat([sequence.adapter for sequence, _ in batch], [count for _, count in batch])
        with self._adapters.at_work(adapters):
            hidden, routings = self._model.model(torch.from_numpy(ids).to(self._cache.device), sequences)
        self.load.add(routings)
        self._score_prompts(batch, hidden)
        ended = [row for row, (sequence, count) in enumerate(batch) if count == sequence.missing]
        last = torch.from_numpy(sequences.last[ended]).to(self._cache.device)
        asked = [batch[row][0].request.routing for row in ended]
        logits = self._logits(hidden.index_select(0, last), adapters[sequences.last[ended]])
        return PassResult(logits, _routings_at(last, routings, asked))

    def _sequences(self, batch: list[tuple[Sequence, int]]) -> PagedSequences:
        table = np.zeros((len(batch), max(sequence.num_pages for sequence, _ in batch)), dtype=np.int32)
        for row, (sequence, _) in enumerate(batch):
            table[row, : sequence.num_pages] = sequence.table[: sequence.num_pages]
        past = [sequence.computed for sequence, _ in batch]
        return PagedSequences(self._cache, past, [count for _, count in batch], table)

    def _logits(self, hidden: Tensor, adapters: np.ndarray) -> Tensor:
        with self._adapters.at_work(adapters):
            return self._model.logits(hidden)[:, : self._vocab_size]

    def _score_prompts(self, batch: list[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Adds to the log-probabilities of each prompt what this pass says of the tokens behind those it read."""
        start = 0
        for sequence, count in batch:
            if sequence.prompt is not None:
                first = sequence.computed + 1
                following = sequence.ids[first : min(first + count, sequence.num_prompt)]
                if following:
                    rows = hidden[start : start + len(following)]
                    self._score(sequence.prompt, rows, following, sequence)
            start += count

    def _score(self, prompt: PromptLogprobs, hidden: Tensor, following: list[int], sequence: Sequence) -> None:
        top = sequence.request.top_logprobs
        targets = torch.tensor(following, dtype=torch.int64, device=hidden.device)
        for part, wanted in zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
            logprobs = self._logits(part, np.full(len(part), sequence.adapter)).float().log_softmax(dim=-1)
            prompt.logprobs.extend(logprobs.gather(1, wanted[:, None])[:, 0].tolist())
            if top:
                prompt.top.extend(top_logprobs(logprobs, top))


def _routings_at(last: Tensor, routings: tuple[Routing, ...], asked: list[bool]) -> list[TokenRouting | None]:
    """The routings of the layers at the tokens `last` [R], turned to one a token, for those who asked."""
    if not (routings and any(asked)):
        return [None] * len(asked)
    experts = torch.stack([routing.experts.index_select(0, last) for routing in routings], dim=1).cpu()
    weights = torch.stack([routing.weights.index_select(0, last) for routing in routings], dim=1).cpu()
    return [TokenRouting(*both) if wanted else None for *both, wanted in zip(experts, weights, asked, strict=True)]
