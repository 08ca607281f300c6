"""Writes `tokenizer/tokenizer.model`: a small file of the released one's kind, trained on texts of these tests.

Run it by hand, from the folder above: `python golden_data/make_tokenizer.py`. Needs protobuf. Another release of
SentencePiece may choose other pieces; the ids in the tests are those of the file that is kept.
"""

from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from small_tokenizers import sentencepiece_model

IN_THE_FILE = (
    *("<eod>", "<sep>", "<pad>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>"),
)
"""The special tokens that are ordinary pieces of the released file; the others get the ids after its last one."""


def made() -> bytes:
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    for text in IN_THE_FILE:
        model.pieces.add(piece=text, score=0.0)
    return model.SerializeToString()


if __name__ == "__main__":
    (Path(__file__).parent / "tokenizer" / "tokenizer.model").write_bytes(made())
