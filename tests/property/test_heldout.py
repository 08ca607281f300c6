"""The held-out part shares no text with the part that is learned, whatever surrounds the text."""

import gzip
import json
from unicodedata import normalize

import numpy as np
import pyarrow
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from small_tokenizers import TEXT, bpe
from yuanmoe.data.prepare.formats import FormatOptions
from yuanmoe.data.prepare.pack import PackOptions, pack_dataset


def parts(paths, dst, **changes):
    """What both parts hold, as sets of texts without differences in whitespace and Unicode form, and the counts."""
    read = FormatOptions(heldout_share=0.4, **changes)
    texts, skipped = [], []
    for tokens in pack_dataset(paths, dst, bpe(), PackOptions(read=read)):
        lengths = tokens.lengths(np.arange(tokens.num_documents)).tolist()
        documents = [bpe().decode(tokens.read(number, 0, length).tolist()) for number, length in enumerate(lengths)]
        texts.append({plain(document) for document in documents})
        skipped.append(tokens.manifest.skipped)
    return *texts, skipped


def plain(text):
    return " ".join(normalize("NFC", text.removesuffix("<eod>")).split())


def write(path, records):
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
    return path


PAGES = [f"caf\u00e9 number {place}\nsecond line" for place in range(40)]


def test_copies_stay_together_whatever_else_their_records_hold(tmp_path):
    records = [{"id": place, "text": f"the very same page {place % 20}"} for place in range(200)]
    train, heldout, _ = parts([write(tmp_path / "in.jsonl", records)], tmp_path / "out")
    assert (len(train) + len(heldout), train & heldout) == (20, set())
    assert heldout


def test_copies_stay_together_across_files_and_spellings(tmp_path):
    ways = {
        "ids": [{"id": place, "text": text} for place, text in enumerate(PAGES)],
        "order": [{"text": text, "url": "x"} for text in PAGES],
        "lines": [{"text": text.replace("\n", "\r\n")} for text in PAGES],
        "space": [{"text": f"  {text.replace(' ', '  ')}\n\n"} for text in PAGES],
        "forms": [{"text": normalize("NFD", text)} for text in PAGES],
    }
    paths = [write(tmp_path / f"{name}.jsonl", records) for name, records in ways.items()]
    (tmp_path / "copy.jsonl.gz").write_bytes(gzip.compress(paths[0].read_bytes()))
    parquet.write_table(pyarrow.table({"text": [text.encode() for text in PAGES]}), tmp_path / "table.parquet")
    for place, text in enumerate(PAGES):
        (tmp_path / f"{place}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    texts = [tmp_path / f"{place}.txt" for place in range(len(PAGES))]
    train, heldout, _ = parts(
        [*paths, tmp_path / "copy.jsonl.gz", tmp_path / "table.parquet", *texts], tmp_path / "out"
    )
    assert (len(train) + len(heldout), train & heldout) == (len(PAGES), set())
    assert heldout


def test_copies_of_conversations_stay_together_in_every_shape(tmp_path):
    talks = [(f"question {place}", f"answer {place}") for place in range(30)]
    chat = [
        {"id": place, "messages": [{"role": "user", "content": q}, {"content": f" {a}\n", "role": "assistant"}]}
        for place, (q, a) in enumerate(talks)
    ]
    pairs = [{"completion": a, "prompt": [{"type": "text", "text": q}], "source": "b"} for q, a in talks]
    both = write(tmp_path / "chat.jsonl", [*chat, *pairs])
    shapes = {
        "chat": both,
        "alpaca": write(tmp_path / "alpaca.jsonl", [{"instruction": q, "output": a, "id": q} for q, a in talks]),
        "sharegpt": write(
            tmp_path / "sharegpt.jsonl",
            [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in talks],
        ),
    }
    found = [parts([path], tmp_path / form, format=form)[:2] for form, path in shapes.items()]
    assert found[0] == found[1] == found[2]
    train, heldout = found[0]
    assert (len(train) + len(heldout), train & heldout) == (30, set())
    assert heldout


def test_what_cannot_be_read_is_counted_once(tmp_path):
    lines = [json.dumps({"text": page}) for page in PAGES] + ["{oops}"] * 30 + ["{}"] * 20
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    *_, (train, heldout) = parts([tmp_path / "in.jsonl"], tmp_path / "out", skip_bad=True)
    assert (train["unreadable record"], train["empty"]) == (30, 20)
    assert heldout.keys() == {"of the other part"}


@settings(max_examples=20)
@given(texts=st.lists(TEXT, min_size=1, max_size=8), share=st.floats(0.1, 0.9))
def test_every_document_is_in_one_part(texts, share, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    anchors = [f"anchor {place}" for place in range(60)]  # so that neither part is empty
    records = [{"id": place, "text": text} for place, text in enumerate([*anchors, *texts, *texts])]
    options = PackOptions(read=FormatOptions(heldout_share=share))
    made = pack_dataset([write(folder / "in.jsonl", records)], folder / "out", bpe(), options)
    kept = [text for text in [*anchors, *texts, *texts] if text.strip()]
    assert sum(tokens.num_documents for tokens in made) == len(kept)
