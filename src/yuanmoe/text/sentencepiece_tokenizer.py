"""The released Yuan 2.0 tokenizer: a SentencePiece file, and the special tokens that it takes to speak to the models.

Sources: `tokenizer.model` of the released checkpoints (LLaMA's BPE with 45,185 Chinese pieces and those of StarCoder
and arXiv merged in; arXiv 2311.15786 section 3.6), and the special tokens that every official script adds to it. The
whitespace behaviours are those measured of transformers' LlamaTokenizer, versions 4.30.2 and 4.44.2.
Not here: transformers. Its version 5 turns the file into another kind of BPE, in which pieces of equal score have an
order: nearly every line of code then gets other ids than the models were trained on.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import sentencepiece

from yuanmoe.errors import TokenizerError, UsageError
from yuanmoe.text.chat_template import EOD, PAD, SEP
from yuanmoe.text.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, Tokenizer, Whitespace

OFFICIAL_SHA256 = "36f79e0c70f73cdd2a8dd0fbe7bfe290da158eea746778d289e4ad76c8b383d9"

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""

ADDED_TOKENS = (
    *(SEP, PAD, "<mask>", "<predict>", FIM_SUFFIX, FIM_PREFIX, FIM_MIDDLE),
    *("<commit_before>", "<commit_msg>", "<commit_after>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<repo_name>", "<file_sep>"),
)
"""In the order of the official scripts, which decides the ids of those that the file lacks (134953 and on)."""

# LlamaTokenizer has these by itself; `</s>` is none of them, the scripts name `<eod>` as the end token instead.
BUILT_IN_TOKENS = ("<unk>", "<s>", EOD)

log = logging.getLogger(__name__)


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece BPE with byte fallback; every segment between special tokens starts with a space mark.

    `whitespace="strip"` is what the authors' transformers (up to 4.33) did: whitespace beside an added token such as
    `<sep>` is dropped, newlines too, but not beside `<eod>`. `"keep"` is transformers 4.34 to 4.57: nothing is dropped.

    `decode(encode(text)) == text` for every text with `"keep"`, except that U+2581 (SentencePiece's own space mark)
    comes back as a space; with `"strip"` the dropped whitespace is missing too.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, *, whitespace: Whitespace = "strip") -> None:
        """`model` is the content of a `tokenizer.model`. Raises TokenizerError when it is none."""
        if whitespace not in ("strip", "keep"):
            raise UsageError(f"whitespace is {whitespace!r}; it must be 'strip' (as the authors) or 'keep'")
        self._model = model
        self._processor = _open(model)
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if self._processor.unk_id() in self._byte_ids:
            raise TokenizerError(
                "tokenizer.model has no byte pieces, so text outside its vocabulary would be lost; "
                "Yuan's has 256 of them: take the file of the model's own repository"
            )
        self.is_official = hashlib.sha256(model).hexdigest() == OFFICIAL_SHA256
        """Whether this is the file released with Yuan 2.0 and Yuan 2.0-M32."""
        pieces: list[str] = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        special_tokens = _special_tokens(pieces)
        pieces += [text for text, token_id in special_tokens.items() if token_id >= len(pieces)]
        super().__init__(
            self._bytes_of(pieces),
            special_tokens,
            marked_ids=self._marked(pieces),
            stripping=ADDED_TOKENS if whitespace == "strip" else (),
        )

    @classmethod
    def from_file(cls, path: Path, *, whitespace: Whitespace = "strip") -> "SentencePieceTokenizer":
        """Open a `tokenizer.model`; one that is not the released file is only noted. Raises TokenizerError."""
        try:
            tokenizer = cls(path.read_bytes(), whitespace=whitespace)
        except (OSError, TokenizerError) as error:
            raise TokenizerError(f"{path}: {error}") from error
        if not tokenizer.is_official:
            log.warning("%s is not the file released with Yuan 2.0, whose weights need it (the sha256 differs)", path)
        return tokenizer

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        if self._special_ids.isdisjoint(ids):
            return ids
        # A file may declare special tokens as "user defined", which SentencePiece finds in any text.
        return [part for token_id in ids for part in self._spelled(token_id)]

    def _spelled(self, token_id: int) -> list[int]:
        if token_id not in self._special_ids:
            return [token_id]
        return [self._byte_ids[byte] for byte in self.token_bytes(token_id)]

    def _bytes_of(self, pieces: list[str]) -> list[bytes]:
        table = [piece.replace(SPACE_MARK, " ").encode() for piece in pieces]
        for byte, token_id in enumerate(self._byte_ids):
            table[token_id] = bytes([byte])
        return table

    def _marked(self, pieces: list[str]) -> list[int]:
        """Ids that start with the space mark, if this file puts one before each segment."""
        first: list[str] = self._processor.encode("a", out_type=str)
        if not first[0].startswith(SPACE_MARK):
            return []
        return [token_id for token_id, piece in enumerate(pieces) if piece.startswith(SPACE_MARK)]

    def _to_file(self) -> bytes:
        return self._model

    def _hf_config(self) -> dict[str, Any]:
        added = {
            str(token_id): {
                "content": text,
                "lstrip": text in self._stripping,
                "rstrip": text in self._stripping,
                "normalized": False,
                "single_word": False,
                "special": True,
            }
            for text, token_id in self.special_tokens.items()
        }
        return {
            # The released files' own name for it. `LlamaTokenizer` would load by itself, and give other ids in silence.
            "tokenizer_class": "YuanTokenizer",
            "bos_token": "<s>",
            "unk_token": "<unk>",
            "legacy": True,
            "added_tokens_decoder": added,
        }


def unescape_newlines(text: str) -> str:
    """Turn `<n>` into a newline, as the official preprocessing and evaluations do before they tokenize.

    Only for text in that escaped form (one document a line): the tokenizer itself reads `<n>` as three plain tokens.
    """
    return text.replace("<n>", "\n")


def _open(model: bytes) -> sentencepiece.SentencePieceProcessor:
    if model.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"these {len(model)} bytes are a git-lfs pointer, not the file; run git lfs pull")
    try:
        if not model:  # which the library takes for a model without pieces
            raise RuntimeError("nothing to read")
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise TokenizerError(
            f"these {len(model)} bytes are no SentencePiece model ({error}); the released file has 2155861 bytes, "
            "fetch it again"
        ) from error


def _special_tokens(pieces: list[str]) -> dict[str, int]:
    """Special strings with the file's own ids, or the next free ones."""
    known = {piece: token_id for token_id, piece in enumerate(pieces)}
    missing = [text for text in (*BUILT_IN_TOKENS, *ADDED_TOKENS) if text not in known]
    known |= {text: len(pieces) + place for place, text in enumerate(missing)}
    return {text: known[text] for text in (*BUILT_IN_TOKENS, *ADDED_TOKENS)}
