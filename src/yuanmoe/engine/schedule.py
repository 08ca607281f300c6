"""Which tokens the next pass computes: for every running sequence its next ones, under a budget, the oldest first.

A sequence that is being written gets its one token, always; what is left of the budget reads prompts, in the order of
arrival. Pages are taken when they are needed. When there are none, the youngest sequence gives its own back and waits
at the head of the queue to be computed again; a sequence never takes pages from an older one, so the oldest always
goes on, and everyone becomes the oldest. Pages that others computed are shared, and a prompt waits for an older one
that is just computing what it needs.
Source of preemption by recomputing: arXiv 2309.06180 section 4.5.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from yuanmoe.engine.pages import ROOT, PageKey, Pages
from yuanmoe.engine.requests import PromptLogprobs, Request
from yuanmoe.engine.sampling import Sampler
from yuanmoe.model.lora.multi_lora import NOBODY


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request on its way: what was said, and how much of it the pages hold."""

    request_id: int
    request: Request
    sampler: Sampler
    ids: list[int]
    """Prompt and answer."""
    num_prompt: int
    max_length: int
    table: np.ndarray
    """Its pages in order, the first `num_pages` entries, int32."""
    adapter: int = NOBODY
    """The number of the one that corrects the model for it."""
    num_pages: int = 0
    num_kept: int = 0
    """Pages that are kept for their prefix."""
    prefix: int = field(init=False)
    """Of the last of them."""
    computed: int = 0
    """Tokens that the pages hold."""
    reused: int = 0
    """Of these, prompt tokens that were found computed."""
    prompt: PromptLogprobs | None = None
    """What is known of them, until they are handed out."""

    def __post_init__(self) -> None:
        self.prefix = self.root

    @property
    def root(self) -> int:
        """The prefix of no tokens: another for each adapter, as what one computed is of no use to others."""
        return ROOT + NOBODY - self.adapter

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be chosen; one while the answer is being written."""
        return len(self.ids) - self.computed

    def page_ids(self, page: int, page_size: int) -> tuple[int, ...]:
        """The tokens of a page, fewer than `page_size` if the sequence ends in it."""
        return tuple(self.ids[page * page_size : (page + 1) * page_size])


@dataclass(slots=True)
class Schedule:
    """The sequences that wait and run, and the pages they share. `step_tokens` is at least `max_batch_size`."""

    pages: Pages
    page_size: int
    max_batch_size: int
    step_tokens: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    """By arrival; all of them older than those that wait."""
    preemptions: int = 0
    reused_tokens: int = 0

    def plan(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next pass and how many tokens of each, at least one; their pages are taken."""
        batch: list[tuple[Sequence, int]] = []
        under_way: set[PageKey] = set()
        # Every running sequence has one token of the budget; this is for those who can use more, and for new ones.
        room = self.step_tokens - len(self.running)
        turn = 0
        while True:
            if turn == len(self.running):
                if not (room and self._admit()):
                    return batch
                room -= 1
            sequence = self.running[turn]
            turn += 1
            count = self._turn(sequence, room + 1, under_way)
            room -= count - 1
            if count:
                batch.append((sequence, count))

    def _turn(self, sequence: Sequence, room: int, under_way: set[PageKey]) -> int:
        """How many tokens of a sequence to compute; `under_way` are the pages that older ones compute in this pass."""
        if sequence.missing == 1:
            return self._reserve(sequence, 1)
        self._reuse(sequence)
        if self._shareable(sequence) in under_way:
            return 0
        count = self._reserve(sequence, min(sequence.missing, room))
        if count:
            under_way.add((sequence.prefix, sequence.page_ids(sequence.num_kept, self.page_size)))
        return count

    def advance(self, batch: list[tuple[Sequence, int]]) -> None:
        """The pass is done: its tokens are computed, and the pages that they filled can be shared."""
        for sequence, count in batch:
            sequence.computed += count
            while (sequence.num_kept + 1) * self.page_size <= sequence.computed:
                index = sequence.num_kept
                ids = sequence.page_ids(index, self.page_size)
                page, sequence.prefix = self.pages.keep(int(sequence.table[index]), sequence.prefix, ids)
                sequence.table[index] = page
                sequence.num_kept += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its pages."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._vacate(sequence)

    def _admit(self) -> bool:
        """Starts the oldest of those that wait, if all its tokens have room and the others can go on for a page."""
        if not self.waiting or len(self.running) == self.max_batch_size:
            return False
        if self.running and self._free_with(self.waiting[0]) < sum(map(self._wanted, self.running)):
            return False
        self.running.append(self.waiting.popleft())
        return True

    def _free_with(self, sequence: Sequence) -> int:
        """Pages that would be free if all tokens of a sequence were computed."""
        P = self.page_size
        free = self.pages.num_free - -(-len(sequence.ids) // P)
        prefix = sequence.root
        for index in range((len(sequence.ids) - 1) // P):
            page = self.pages.find(prefix, sequence.page_ids(index, P))
            if page is None:
                break
            prefix = self.pages.prefix(page)
            free += not self.pages.is_unused(page)
        return free

    def _wanted(self, sequence: Sequence) -> int:
        """Pages that a sequence will take for all its tokens and, unless it ends before, those of one more page."""
        pages = -(-len(sequence.ids) // self.page_size) + 1
        return min(pages, len(sequence.table)) - sequence.num_pages

    def _shareable(self, sequence: Sequence) -> PageKey | None:
        """The next page of a sequence, if another's would do: all of it is to be computed, and a token is left then."""
        P = self.page_size
        if sequence.computed % P or sequence.computed + P >= len(sequence.ids) or sequence.prompt is not None:
            return None
        return sequence.prefix, sequence.page_ids(sequence.num_kept, P)

    def _reuse(self, sequence: Sequence) -> None:
        """Shares as many of the next pages as are kept."""
        while (key := self._shareable(sequence)) and (page := self.pages.find(*key)) is not None:
            sequence.prefix = self.pages.share(page)
            sequence.table[sequence.num_pages] = page
            sequence.num_pages += 1
            sequence.num_kept += 1
            sequence.computed += self.page_size
            sequence.reused += self.page_size
            self.reused_tokens += self.page_size

    def _reserve(self, sequence: Sequence, count: int) -> int:
        """Takes pages for the next `count` tokens, from younger sequences if need be; how many of them have room."""
        P = self.page_size
        wanted = -(-(sequence.computed + count) // P) - sequence.num_pages
        while self.pages.num_free < wanted and self.running[-1] is not sequence:
            self._preempt()
        for _ in range(min(wanted, self.pages.num_free)):
            sequence.table[sequence.num_pages] = self.pages.take()
            sequence.num_pages += 1
        return min(count, sequence.num_pages * P - sequence.computed)

    def _preempt(self) -> None:
        youngest = self.running.pop()
        self._vacate(youngest)
        self.waiting.appendleft(youngest)
        self.preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        self.pages.release(sequence.table[: sequence.num_pages].tolist())
        sequence.num_pages = sequence.num_kept = sequence.computed = sequence.reused = 0
        sequence.prefix = sequence.root
        if sequence.prompt is not None:
            sequence.prompt = PromptLogprobs([], [])
