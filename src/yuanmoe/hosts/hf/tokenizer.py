"""YuanTokenizer: the ids and texts of `text/sentencepiece_tokenizer.py` behind the interface of transformers.

Released directories name a class `YuanTokenizer` that exists nowhere, and ask for begin and end tokens that no model
ever saw. Without this class, transformers 5 turns their `tokenizer.model` into another kind of BPE, in which pieces of
equal score have an order, and gives other ids in silence.
transformers splits a text at the added tokens (also those that a user adds) and looks after padding and files.
"""

from pathlib import Path
from typing import Any

from transformers import AddedToken, SentencePieceBackend, TokenizersBackend

from yuanmoe.errors import TokenizerError
from yuanmoe.text.chat_template import EOD, PAD, chat_template
from yuanmoe.text.sentencepiece_tokenizer import ADDED_TOKENS, SentencePieceTokenizer

NEVER_SEEN = "</s>"
"""The end token that released files name. The models end with `<eod>`; to them this is ordinary text."""


class YuanTokenizer(SentencePieceBackend):
    """Ids of the authors' scripts: their added tokens, `<eod>` as the end, nothing added around a text.

    Whitespace beside an added token is dropped, as by the authors' transformers, unless `added_tokens_decoder` in
    `tokenizer_config.json` says otherwise. Pads on the left, for `generate`. `pad_token` is `<pad>` where none is
    named, and `chat_template` that of `text/chat_template.py`. Raises TokenizerError.
    """

    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        if vocab_file is None:
            raise TokenizerError("no tokenizer.model in this directory; copy the one that the model was published with")
        self._native = SentencePieceTokenizer.from_file(Path(vocab_file))
        added = _added_tokens(self._native, kwargs.get("added_tokens_decoder") or {})
        extra = list(kwargs.get("extra_special_tokens") or ())
        named = set(map(str, extra))
        end = kwargs.get("eos_token")
        kwargs |= {
            "added_tokens_decoder": added,
            "extra_special_tokens": extra + [text for text in self._native.special_tokens if text not in named],
            "bos_token": kwargs.get("bos_token") or "<s>",
            "eos_token": EOD if end is None or str(end) == NEVER_SEEN else end,
            "unk_token": kwargs.get("unk_token") or "<unk>",
            "pad_token": kwargs.get("pad_token") or PAD,
            "chat_template": kwargs.get("chat_template") or chat_template(),
            "special_tokens_pattern": "none",
            # The other way needs protobuf, and drops the space mark that starts every segment.
            "legacy": True,
        }
        super().__init__(vocab_file=vocab_file, **kwargs)

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, str | None], *args: Any, **kwargs: Any) -> Any:
        """Our small models have a `tokenizer.json` instead, which transformers reads as it is."""
        if resolved_vocab_files.get("vocab_file") or not resolved_vocab_files.get("tokenizer_file"):
            return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)
        return TokenizersBackend._from_pretrained(resolved_vocab_files, *args, **kwargs)

    def get_vocab(self) -> dict[str, int]:
        """Every piece and added token with its id."""
        pieces = self.sp_model.id_to_piece(list(range(self.vocab_size)))
        return {piece: token_id for token_id, piece in enumerate(pieces)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.sp_model.id_to_piece(self._native.encode(text, allow_special=False))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of `tokens`, as `decode` gives it."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,  # noqa: ARG002 - there never are any
        **kwargs: Any,  # noqa: ARG002 - transformers passes on what a caller gave to `decode`
    ) -> str:
        pieces: list[bytes] = []
        previous = None
        for token_id in [token_ids] if isinstance(token_ids, int) else token_ids:
            added = self._added_tokens_decoder.get(token_id)
            if added is None:
                pieces.append(self._native.surface(token_id, previous))
                previous = token_id
                continue
            # A segment starts after every added token, also after one of the user's.
            previous = None
            if not (added.special and skip_special_tokens):
                pieces.append(added.content.encode())
        text = b"".join(pieces).decode(errors="replace")
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text


def _added_tokens(native: SentencePieceTokenizer, given: dict[int, AddedToken]) -> dict[int, AddedToken]:
    """What a text is split at: the authors' added tokens and the user's, as the directory describes them if it does."""
    ours = {
        token_id: AddedToken(text, lstrip=strips, rstrip=strips, normalized=False, special=True)
        for text, token_id in native.special_tokens.items()
        for strips in [text in ADDED_TOKENS]
    }
    return ours | {token_id: token for token_id, token in given.items() if token.content != NEVER_SEEN}
