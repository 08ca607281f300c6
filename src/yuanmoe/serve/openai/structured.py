"""Grammars that an answer must follow: JSON, JSON schemas, regular expressions, Lark grammars, calls of tools.

llguidance keeps the state and says which tokens may come next; here its tokens are taught our tokenizers. JSON is
written with one space after commas and colons and none elsewhere: free whitespace is where small models get lost.
Legend: V vocabulary of the tokenizer.
"""

import json
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from yuanmoe.errors import UsageError
from yuanmoe.serve.openai.closing import closed
from yuanmoe.text.tokenizer import Tokenizer

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Grammar = dict[str, Any]
"""One grammar of llguidance's own JSON form."""


def json_schema(schema: dict[str, Any], *, lenient: bool) -> dict[str, Any]:
    """The schema, closed, with our style of JSON; `lenient` overlooks keywords that cannot be enforced."""
    return closed(schema) | {"x-guidance": JSON_STYLE | {"lenient": lenient}}


def json_grammar(schema: dict[str, Any], *, lenient: bool = False) -> Grammar:
    """Texts of JSON values that fit a schema."""
    return {"json_schema": json_schema(schema, lenient=lenient)}


def regex_grammar(regex: str) -> Grammar:
    """Texts that match from their first to their last character."""
    return json.loads(llguidance.LLMatcher.grammar_from_regex(regex))["grammars"][0]


def lark_grammar(lark: str) -> Grammar:
    """Texts of a Lark grammar, in llguidance's dialect."""
    return {"lark_grammar": lark}


class Grammars:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._vocab_size = tokenizer.vocab_size
        # A text that follows a special token may start with a space mark, which is none of its characters.
        self._marks = (
            bool(tokenizer.encode("a"))
            and tokenizer.surface(tokenizer.encode("a")[0], None)[:1]
            != (tokenizer.token_bytes(tokenizer.encode("a")[0])[:1])
        )
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self._marks))
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size)

    def compile(self, grammar: Grammar) -> "GrammarConstraint":
        """The state of one answer that begins. Raises UsageError where the grammar is none.

        Takes up to seconds for hostile grammars, without holding Python's lock.
        """
        start = 'start: " "? @answer' if self._marks else "start: @answer"
        both = [{"name": "start", "lark_grammar": start}, grammar | {"name": "answer"}]
        matcher = llguidance.LLMatcher(self._tokenizer, json.dumps({"grammars": both}), log_level=0)
        if matcher.is_error():
            raise UsageError(f"the grammar cannot be followed: {matcher.get_error().strip()}")
        return GrammarConstraint(matcher, self._vocab_size)


class GrammarConstraint:
    """How far one answer got in its grammar: an `engine.requests.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def fresh(self) -> "GrammarConstraint":
        """The same grammar for another answer that begins; to be called before this one moves."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)

    def mask(self) -> Tensor:
        """The tokens that may come next, [V]; only the stop token once nothing may. Raises UsageError."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little")).bool()

    def accept(self, token_id: int) -> None:
        """Raises UsageError for a token that does not follow, and where the grammar outgrew its limits."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the grammar got stuck: {self._matcher.get_error().strip()}; make it simpler")


class _Vocabulary:
    """A tokenizer of ours with the attributes that llguidance asks for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, marks: bool) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self.eos_token_id = tokenizer.eod_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: bytes) -> list[int]:
        """Ids of text inside a text, so without the mark of a beginning."""
        if not self._marks:
            return self._tokenizer.encode(text.decode(errors="replace"), allow_special=False)
        # After a newline, which is a token of its own, nothing is marked.
        ids = self._tokenizer.encode("\n" + text.decode(errors="replace"), allow_special=False)
        newline = next(place for place, token_id in enumerate(ids) if self.tokens[token_id] == b"\n")
        return ids[newline + 1 :]
