"""Small tokenizers of both kinds for tests, trained on the spot, and texts that try to break them."""

import functools
import io
from collections.abc import Callable

import sentencepiece
from hypothesis import strategies as st

from yuanmoe.text.bpe import BPETokenizer, train_bpe
from yuanmoe.text.sentencepiece_tokenizer import SentencePieceTokenizer
from yuanmoe.text.tokenizer import Tokenizer, Whitespace

TEXTS = (
    "def add(first, second):\n    return first + second\n\n\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n",
    "for number in range(100):\n    print(number, number ** 2)\n",
    "The quick brown fox jumps over the lazy dog. The dog sleeps.\n",
    "春天来了,我们去春游。写一篇春游作文。\n",
)

HOSTILE = st.sampled_from(
    [
        *("<eod>", "<sep>", "<FIM_MIDDLE>", "<pad>", "<s>", "</s>", "<unk>", "<n>", "<", "sep>", "<0x41>"),
        *(" ", "  ", "\n", "\t", "\r\n", "\0", "\u3000", "\u00a0", "\u2028", "\ufeff", "\ufffd", "\u2047", "\u0120"),
        *("\u4e2d", "\U0001f600", "\U0001f468\u200d\U0001f469", "e\u0301", "\U0010ffff", "<|endoftext|>"),
        *("12", "def f(", "the"),
    ]
)

TEXT = st.lists(HOSTILE | st.text(max_size=8), max_size=12).map("".join)
"""Arbitrary Unicode (no lone surrogates), dense in what tokenizers treat specially."""


@functools.cache
def bpe() -> BPETokenizer:
    return train_bpe(TEXTS * 4, 400)


@functools.cache
def sentencepiece_model(user_defined: tuple[str, ...] = (), byte_fallback: bool = True) -> bytes:
    """A BPE model with the settings of the released one; `user_defined` pieces are found in any text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        vocab_size=380 if byte_fallback else 120,
        model_type="bpe",
        byte_fallback=byte_fallback,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(user_defined),
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def small_sentencepiece(whitespace: Whitespace = "keep") -> SentencePieceTokenizer:
    return SentencePieceTokenizer(sentencepiece_model(), whitespace=whitespace)


SMALL: dict[str, Callable[[], Tokenizer]] = {"bpe": bpe, "sentencepiece": small_sentencepiece}
