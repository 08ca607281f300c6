"""Megatron's pairs of files: by hand, byte for byte, and refused with the numbers when they are damaged."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_documents import Lists
from yuanmoe.data.sets.datasets import open_documents
from yuanmoe.data.sets.megatron import MegatronTokens, write_megatron
from yuanmoe.data.sets.verify import verify_dataset
from yuanmoe.errors import DataError

DOCUMENTS = [[7, 8, 9], [], [77185, 1]]

# Magic and version; code 4 is int32; 3 sequences, 1 entry of the document index; sizes; pointers; the document index.
INDEX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 04 0300000000000000 0100000000000000"
    "03000000 00000000 02000000"
    "0000000000000000 0c00000000000000 0c00000000000000"
    "0000000000000000"
)
DATA = bytes.fromhex("07000000 08000000 09000000 812d0100 01000000")


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "text_document_context.idx").write_bytes(INDEX)
    (tmp_path / "text_document_context.bin").write_bytes(DATA)
    return tmp_path / "text_document_context"


def contents(tokens):
    lengths = tokens.lengths(np.arange(tokens.num_documents)).tolist()
    return [tokens.read(document, 0, length).tolist() for document, length in enumerate(lengths)]


def test_what_the_official_preprocessing_writes_is_read(pair):
    tokens = open_documents(pair)
    assert isinstance(tokens, MegatronTokens)
    assert contents(tokens) == DOCUMENTS
    assert (tokens.num_documents, tokens.num_tokens) == (3, 5)
    assert tokens.read(0, 1, 2).tolist() == [8]
    assert tokens.mask(0, 0, 3) is None
    assert open_documents(f"{pair}.bin").fingerprint == tokens.fingerprint
    assert verify_dataset(tokens) == len(INDEX) + len(DATA)


def test_we_write_the_same_bytes(tmp_path):
    write_megatron(Lists(DOCUMENTS), tmp_path / "new" / "pair", vocab_size=135040)
    assert (tmp_path / "new" / "pair.idx").read_bytes() == INDEX
    assert (tmp_path / "new" / "pair.bin").read_bytes() == DATA
    assert len(list((tmp_path / "new").iterdir())) == 2


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=9), min_size=1, max_size=9),
    vocab_size=st.sampled_from([65536, 65537]),
)
def test_both_types_come_back(documents, vocab_size, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("pair") / "pair"
    write_megatron(Lists(documents), prefix, vocab_size=vocab_size)
    assert contents(MegatronTokens(prefix)) == documents
    width = 2 if vocab_size == 65536 else 4
    assert prefix.with_suffix(".bin").stat().st_size == width * sum(map(len, documents))


def test_pointers_need_not_be_in_order_and_the_document_index_is_ignored(pair):
    sizes, pointers = struct.pack("<3i", 2, 0, 1), struct.pack("<3q", 12, 0, 0)
    index = INDEX[:17] + struct.pack("<BQQ", 4, 3, 2) + sizes + pointers + struct.pack("<2q", 99, -5)
    pair.with_suffix(".idx").write_bytes(index)
    assert contents(MegatronTokens(pair)) == [[77185, 1], [], [7]]


def changed(place, new):
    return INDEX[:place] + new + INDEX[place + len(new) :]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (INDEX[:33], r"idx has 33 bytes and begins with b'MMIDIDX\\x00\\x00', a Megatron index with .*cut short"),
        (b"PK" + INDEX, r"begins with b'PKMMIDIDX'"),
        (b"", r"idx has 0 bytes and begins with b''"),
        (
            changed(9, b"\2"),
            r"version 2 with ids of type 4; readable are version 1 and the types 4 \(int32\) and 8 \(uint16\)",
        ),
        (changed(17, b"\7"), r"version 1 with ids of type 7"),
        (INDEX[:-1], r"idx has 77 bytes where 3 sequences and 1 documents take 78"),
        (changed(18, b"\xff" * 8), r"has 78 bytes where 18446744073709551615 sequences"),
        (changed(18, struct.pack("<QQ", 0, 0))[:34], r"idx has 34 bytes where 0 sequences and 0 documents take 34"),
        (
            changed(34, struct.pack("<i", 6)),
            r"bin has 20 bytes; sequence 0 of .*idx needs 6 tokens of 4 bytes at byte 0",
        ),
        (changed(34, struct.pack("<i", -1)), r"sequence 0 of .* needs -1 tokens"),
        (changed(46, struct.pack("<q", -4)), r"sequence 0 of .* at byte -4"),
        (changed(46, struct.pack("<q", 2)), r"sequence 0 of .* at byte 2"),
        (changed(62, struct.pack("<q", 2**62)), r"sequence 2 of .* at byte 4611686018427387904"),
        (changed(42, struct.pack("<i", 2**31 - 1)), r"sequence 2 of .* needs 2147483647 tokens"),
    ],
)
def test_damage_is_told_with_the_numbers(pair, index, message):
    pair.with_suffix(".idx").write_bytes(index)
    with pytest.raises(DataError, match=message):
        MegatronTokens(pair)


def test_data_cut_short_or_missing(pair):
    pair.with_suffix(".bin").write_bytes(DATA[:-1])
    with pytest.raises(DataError, match=r"bin has 19 bytes; sequence 2 of .*idx needs 2 tokens of 4 bytes at byte 12"):
        MegatronTokens(pair)
    pair.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match=r"bin is missing; a Megatron dataset is two files, text_.*idx and text_.*bin"):
        MegatronTokens(pair)


def test_ids_outside_the_vocabulary_are_found(pair, tmp_path):
    tokens = MegatronTokens(pair)
    with pytest.raises(DataError, match=r"document 2 of .* holds the token id 77185, outside the vocabulary of 77185"):
        write_megatron(tokens, tmp_path / "new", vocab_size=77185)
    assert not (tmp_path / "new.idx").exists()
    pair.with_suffix(".bin").write_bytes(b"\xff" * 20)
    with pytest.raises(DataError, match=r"document 0 of .* holds the token id -1"):
        verify_dataset(MegatronTokens(pair))


def test_what_is_there_is_not_replaced(pair):
    with pytest.raises(DataError, match=r"idx exists and is left as it is; choose another name, or remove it"):
        write_megatron(Lists(DOCUMENTS), pair, vocab_size=10**5)
