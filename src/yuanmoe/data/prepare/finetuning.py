"""Conversations as tokens to learn from, with the loss mask that marks them: answers, and what begins and ends them.

A conversation is laid out as it is served (`chat`): earlier turns joined by newlines, `<sep>` after the last question,
then the answer and `<eod>`. Learned are what the assistant said in every turn that its author did not exclude, `<sep>`
(so that a prompt without it works: the model writes it) and `<eod>`; never what a user or the system said.
Sources: IEIT-Yuan/Yuan2.0-M32, docs/data_process.md (lines `instruction<sep>response`) and megatron/utils.py (the loss
mask of `--sft-stage`, here `first_sep_mask` and `official_window_mask`, the latter with its edge cases).
Legend: B windows, S labels of a window.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from yuanmoe.data.permutation import Integers
from yuanmoe.data.prepare.conversations import Turn, turns_of
from yuanmoe.errors import TokenizerError
from yuanmoe.text.chat import Message, render_turns
from yuanmoe.text.chat_template import SEP, Newline, turn_end
from yuanmoe.text.tokenizer import Tokenizer

Mask = npt.NDArray[np.bool_]


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, newline: Newline = "newline"
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation that ends with an answer, and which of them are to be learned.

    Special strings in contents are plain text. Raises UsageError for messages that are no such conversation.
    """
    return encode_turns(tokenizer, turns_of(messages), newline=newline)


def encode_turns(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, newline: Newline = "newline"
) -> tuple[list[int], list[bool]]:
    """Ids of checked turns, and which of them are to be learned: learned answers, and what begins and ends the last."""
    *asked, answer = turns
    texts = render_turns([{"role": turn.role, "content": turn.text} for turn in asked], newline=newline)
    ids = tokenizer.encode("".join(texts), allow_special=False)
    spans = _answers(texts, [turn.learned for turn in asked], len(turn_end(newline)))
    learned = _within(spans, "".join(texts), tokenizer, ids)
    said = tokenizer.encode(answer.text.strip(), allow_special=False)
    return [*ids, tokenizer.sep_id, *said, tokenizer.eod_id], [*learned, *[answer.learned] * (len(said) + 2)]


def encode_line(tokenizer: Tokenizer, line: str) -> list[int]:
    """Ids of one document of the official form, where only `<sep>` is special and whitespace beside it is dropped."""
    parts = [tokenizer.encode(part.strip(), allow_special=False) for part in line.split(SEP)]
    ids = parts[0]
    for part in parts[1:]:
        ids += [tokenizer.sep_id, *part]
    return [*ids, tokenizer.eod_id]


def first_sep_mask(ids: Sequence[int], sep_id: int) -> list[bool]:
    """The official rule for one document: all from the first `<sep>` on, later questions too; without one, all."""
    start = ids.index(sep_id) if sep_id in ids else 0
    return [place >= start for place in range(len(ids))]


def official_window_mask(labels: Integers, *, sep_id: int, eod_id: int) -> Mask:
    """The released mask of windows of labels [B, S], which looks at the window alone and has its quirks.

    Segments end with `<eod>`; in each, what stands before its first `<sep>` is not learned, and all of it is where
    there is none. A window without `<eod>` is learned whole; after a single `<eod>` so is the rest of the window.
    """
    mask = np.ones(labels.shape, dtype=np.bool_)
    for row, learned in zip(labels, mask, strict=True):
        ends = (np.flatnonzero(row == eod_id) + 1).tolist()
        rest = [] if len(ends) < 2 else [len(row)]
        for start, stop in pairwise([0, *ends, *rest]):
            seps = np.flatnonzero(row[start:stop] == sep_id)
            learned[start : start + (int(seps[0]) if len(seps) else 0)] = False
    return mask


def _answers(turns: Sequence[str], answered: Sequence[bool], end_length: int) -> list[tuple[int, int]]:
    """Where, in the characters of all turns together, learned answers are; what ends a turn is not part of it."""
    stops = list(accumulate(map(len, turns)))
    spans = zip([0, *stops], stops, answered, strict=False)
    return [(start, stop - end_length) for start, stop, wanted in spans if wanted]


def _within(spans: Sequence[tuple[int, int]], text: str, tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """Which of `ids`, the tokens of `text`, begin in one of `spans` of its characters."""
    if not spans:
        return [False] * len(ids)
    spelled = tokenizer.decode(ids)  # the text, but SentencePiece reads U+2581 as a space, which has fewer bytes
    if len(spelled) != len(text):
        raise TokenizerError(
            f"{len(text)} characters of a conversation come back from their tokens as {len(spelled)}, so what the "
            "assistant said cannot be told apart; use a tokenizer that changes no text"
        )
    inside = np.zeros(len(spelled.encode()) + 1, dtype=np.bool_)
    for start, stop in spans:
        inside[len(spelled[:start].encode()) : len(spelled[:stop].encode())] = True
    sizes = [len(tokenizer.surface(token_id, previous)) for previous, token_id in zip([None, *ids], ids, strict=False)]
    return inside[np.cumsum([0, *sizes[:-1]])].tolist() if ids else []
