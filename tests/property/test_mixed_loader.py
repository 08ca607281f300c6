"""The loader: every window once an epoch, the same samples for any world size and after any interruption."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_documents import Lists, numbered
from small_tokenizers import bpe
from yuanmoe.data.loader.fim import FillInMiddle
from yuanmoe.data.loader.loader import Loader, LoaderOptions, WeightedDocuments
from yuanmoe.data.loader.stream import GROUP, ShuffledStream
from yuanmoe.data.permutation import Permutation
from yuanmoe.errors import DataError, TokenizerError, UsageError

PREFIX, SUFFIX, MIDDLE = 10**6, 10**6 + 1, 10**6 + 2
VOCAB = 2 * 10**6


def fim(rate, spm_rate=0.5):
    return FillInMiddle(rate=rate, spm_rate=spm_rate, prefix_id=PREFIX, suffix_id=SUFFIX, middle_id=MIDDLE)


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=30) | st.just([3] * (2 * GROUP + 7))


@given(lengths=LENGTHS, key=st.integers(0, 2**40), rate=st.sampled_from([None, 0.0, 0.5, 1.0]), data=st.data())
def test_any_part_of_a_row_is_that_of_the_row(lengths, key, rate, data):
    source = numbered([*lengths, 2])
    how = None if rate is None else fim(rate)
    stream = ShuffledStream(source, key=key, fim=how, span=5)
    order = Permutation(source.num_documents, key)(np.arange(source.num_documents))
    row, owners = [], []
    for place, document in enumerate(order.tolist()):
        length = int(source.lengths([document])[0])
        pieces = [range(length)] if how is None else how.pieces(document, length, span=5, key=key)
        for piece in pieces:
            ids = [piece] if isinstance(piece, int) else source.read(document, piece.start, piece.stop).tolist()
            row += ids
            owners += [place] * len(ids)
    assert len(stream) == len(row)
    start = data.draw(st.integers(0, len(row) - 1))
    stop = data.draw(st.integers(start + 1, len(row)))
    part = stream.read(start, stop)
    assert part.ids.tolist() == row[start:stop]
    assert part.learned.all()
    assert np.array_equal(np.diff(part.documents) > 0, np.diff(owners[start:stop]) > 0)


@given(
    length=st.integers(0, 40), span=st.integers(1, 12), spm=st.sampled_from([0.0, 0.5, 1.0]), key=st.integers(0, 2**40)
)
def test_what_is_rearranged_can_be_put_back(length, span, spm, key):
    how = fim(1.0, spm)
    pieces = how.pieces(3, length, span=span, key=key)
    ids = [token for piece in pieces for token in ([piece] if isinstance(piece, int) else piece)]
    added = how.added(np.array([3]), np.array([length]), span=span, key=key)[0]
    assert len(ids) == length + added
    if length:
        assert ids[-1] == length - 1, "<eod> stays the last"
    if length < 2:
        assert added == 0
        return
    restored = []
    for place in range(0, len(pieces) - 1, 6):
        mark, *rest = pieces[place : place + 6]
        if rest[0] == SUFFIX:
            suffix, middle_mark, prefix, middle = rest[1:]
            assert spm > 0
        else:
            prefix, suffix_mark, suffix, middle_mark, middle = rest
            assert suffix_mark == SUFFIX
            assert spm < 1
        assert (mark, middle_mark) == (PREFIX, MIDDLE)
        restored += [*prefix, *middle, *suffix]
        assert len(prefix) + len(middle) + len(suffix) <= span
    assert restored == list(range(length - 1))


def test_the_share_of_rearranged_documents_and_of_those_with_the_suffix_first():
    how = fim(0.3, 0.25)
    plain, marked = [range(50)], [how.pieces(document, 50, span=99, key=5) for document in range(4000)]
    chosen = [pieces for pieces in marked if pieces != plain]
    assert len(chosen) == pytest.approx(1200, rel=0.1)
    assert sum(pieces[1] == SUFFIX for pieces in chosen) == pytest.approx(300, rel=0.2)
    cuts = np.array([len(piece) for pieces in chosen for piece in pieces if isinstance(piece, range)])
    assert cuts.max() > 40, "cut anywhere"


def test_what_fill_in_the_middle_needs():
    assert FillInMiddle.of(bpe(), rate=0.5).prefix_id == bpe().special_tokens["<FIM_PREFIX>"]
    with pytest.raises(UsageError, match=r"FIM rate is 1\.5; it is a share, from 0 to 1"):
        fim(1.5)

    without_marks = SimpleNamespace(file_name="tokenizer.json", special_tokens={"<eod>": 0})

    with pytest.raises(
        TokenizerError, match="needs the tokens <FIM_PREFIX>, <FIM_SUFFIX>, <FIM_MIDDLE>, which tokenizer"
    ):
        FillInMiddle.of(without_marks, rate=0.5)


def options(**changes):
    return LoaderOptions(**{"length": 4, "batch_size": 6, "vocab_size": VOCAB} | changes)


@st.composite
def sources(draw):
    """One to three sources whose tokens tell them apart."""
    count = draw(st.integers(1, 3))
    lengths = [draw(st.lists(st.integers(1, 9), min_size=2, max_size=20)) for _ in range(count)]
    weights = [draw(st.sampled_from([0.1, 1, 2.5])) for _ in range(count)]
    return [
        WeightedDocuments(documents=numbered([*each, 5], first=1000 * place), weight=weight)
        for place, (each, weight) in enumerate(zip(lengths, weights, strict=True))
    ]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=3, max_size=40), seed=st.integers(0, 2**40))
def test_an_epoch_has_every_window_once(lengths, seed):
    source = numbered([*lengths, 5])
    windows = (source.num_tokens - 1) // 4
    loader = Loader([WeightedDocuments(documents=source)], options(batch_size=1, seed=seed))
    for epoch in (0, 1):
        batches = [loader.batch(number) for number in range(epoch * windows, (epoch + 1) * windows)]
        read = np.concatenate([batch.ids[0, :-1] for batch in batches])
        assert len(np.unique(read)) == len(read) == 4 * windows
        # A window ends with the first token of the one that follows it in the row.
        firsts, lasts = {batch.ids[0, 0] for batch in batches}, [batch.ids[0, -1] for batch in batches]
        assert sum(last not in firsts for last in lasts) <= 1


@settings(max_examples=30)
@given(mixed=sources(), seed=st.integers(0, 2**40), rate=st.sampled_from([0.0, 0.5]), number=st.integers(0, 500))
def test_ranks_share_out_one_order(mixed, seed, rate, number):
    how = options(seed=seed, fim=fim(rate))
    whole = Loader(mixed, how).batch(number)
    for world_size in (2, 3, 6):
        parts = [Loader(mixed, how, rank=rank, world_size=world_size).batch(number) for rank in range(world_size)]
        for name in ("ids", "loss_mask", "documents"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@settings(max_examples=30)
@given(mixed=sources(), seed=st.integers(0, 2**40), cut=st.integers(0, 30))
def test_a_resumed_loader_reads_what_an_uninterrupted_one_does(mixed, seed, cut):
    how = options(seed=seed, fim=fim(0.5))
    whole, first = Loader(mixed, how), Loader(mixed, how)
    expected = [next(whole) for _ in range(cut + 3)]
    for _ in range(cut):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = Loader(mixed, options(seed=seed, fim=fim(0.5), batch_size=3), rank=1, world_size=3)
    resumed.load_state_dict(state)
    for batch in expected[cut:]:
        halves = [next(resumed).ids for _ in range(2)]
        assert np.array_equal(np.concatenate(halves), batch.ids[[1, 4]])
    assert resumed.samples == whole.samples


def test_sources_are_read_by_their_weights():
    mixed = [
        WeightedDocuments(documents=numbered([50] * 9, first=1000 * place), weight=weight)
        for place, weight in enumerate((3, 1))
    ]
    loader = Loader(mixed, options(batch_size=1024))
    read = loader.batch(3).ids[:, 0] // 1000
    assert np.bincount(read).tolist() == [768, 256]
    windows = (450 - 1) // 4
    assert loader.epochs(1024) == pytest.approx([768 / windows, 256 / windows])


def test_stored_masks_go_with_their_tokens_and_are_not_rearranged():
    documents = [list(range(start, start + 7)) for start in range(0, 700, 7)]
    source = Lists(documents, masks=[[token % 3 == 0 for token in ids] for ids in documents])
    batch = Loader([WeightedDocuments(documents=source)], options(fim=fim(1.0), batch_size=50)).batch(0)
    assert np.array_equal(batch.loss_mask, batch.ids[:, 1:] % 3 == 0)
    assert batch.ids.max() < 700
    starts = batch.ids[:, :-1] // 7
    assert np.array_equal(np.diff(starts, axis=1) != 0, np.diff(batch.documents, axis=1) != 0)


def test_the_official_mask_looks_at_windows():
    source = Lists([[5, 6, 1, 7, 0]] * 40)
    how = options(length=10, mask="official", sep_id=1, eod_id=0, batch_size=19)
    batch = Loader([WeightedDocuments(documents=source)], how).batch(0)
    for ids, mask in zip(batch.ids, batch.loss_mask, strict=True):
        labels = ids[1:].tolist()
        assert labels.count(0) == 2
        assert mask[labels.index(0) + 1 :][:2].tolist() == [False, False], "the question of the second document"
    with pytest.raises(UsageError, match="the official mask needs the ids of <sep> and <eod>"):
        options(mask="official")


def test_what_a_state_is_taken_for():
    mixed = [WeightedDocuments(documents=numbered([50] * 9))]
    state = Loader(mixed, options(seed=1)).state_dict() | {"samples": 12}
    other = Loader(mixed, options(seed=2, length=5))
    with pytest.raises(
        DataError, match=r"the data changed since the state was saved \(length was 4, is 5; seed was 1, is 2"
    ):
        other.load_state_dict(state)
    assert other.samples == 0
    other.load_state_dict(state, accept_changes=True)
    assert other.samples == 12


def test_what_no_loader_can_be_made_of():
    mixed = [WeightedDocuments(documents=numbered([4]))]
    with pytest.raises(DataError, match="lists has 4 tokens, a window takes 5; give more text"):
        Loader(mixed, options())
    with pytest.raises(UsageError, match="rank 0 of 4 has no equal part of batches of 6 windows"):
        Loader([WeightedDocuments(documents=numbered([40]))], options(), world_size=4)
    with pytest.raises(UsageError, match="length is 0; it must be at least 1"):
        options(length=0)
    outside = Loader([WeightedDocuments(documents=Lists([[1, 2, 99, 4, 5, 6]]))], options(vocab_size=99))
    with pytest.raises(DataError, match="lists holds the token id 99, outside the vocabulary of 99"):
        outside.batch(0)
    damaged = Lists([[1, 2, 3]] * 9)
    damaged.lengths = lambda documents: np.full(len(documents), -1)
    with pytest.raises(DataError, match="lists has a document of -1 tokens, so its index is damaged"):
        Loader([WeightedDocuments(documents=damaged)], options()).batch(0)
