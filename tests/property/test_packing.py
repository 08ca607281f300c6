"""Documents packed into one sequence: each named mode restarts what it says, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small_models import EOD, VARIANTS, configs, random_ids, random_model, small_config
from yuanmoe.model.state.sequences import WholeSequences, documents_of

DOCUMENT = st.integers(0, 6)
"""Tokens before its `<eod>`; a document may be empty."""


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def packed_ids(lengths, tail):
    """Documents ended by `<eod>`, and `tail` tokens of one that goes on: the ids and every document by itself."""
    documents = [torch.cat([random_ids(length), torch.tensor([EOD])]) for length in lengths]
    documents += [random_ids(tail)] if tail else []
    return torch.cat(documents), documents


@given(configs(), st.lists(DOCUMENT, min_size=1, max_size=4), DOCUMENT)
@settings(max_examples=25)
def test_isolated_documents_are_each_alone(config, lengths, tail):
    model = random_model(config.replace(packing="isolated"))
    ids, documents = packed_ids(lengths, tail)
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(model(ids[None]).logits[0], alone, atol=5e-5, rtol=1e-4)


def test_rows_of_a_batch_are_packed_apart():
    model = random_model(small_config(packing="isolated"))
    first, _ = packed_ids([3, 0, 4], 2)
    second, _ = packed_ids([9], 2)
    both = model(torch.stack([first, second])).logits
    for row, ids in enumerate((first, second)):
        torch.testing.assert_close(both[row], model(ids[None]).logits[0], atol=5e-5, rtol=1e-4)


def test_positions_restart_after_the_end_of_a_document_where_the_mode_says_so():
    ids = torch.tensor([[7, 7, EOD, 7, EOD, EOD, 7, 7], [EOD, 7, 7, 7, 7, 7, 7, EOD]])
    documents = documents_of(ids, EOD)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    restarted = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    straight = [list(range(8))] * 2
    for packing, expected in {
        "continuous": straight,
        "hf-mask": straight,
        "megatron": restarted,
        "isolated": restarted,
    }.items():
        positions = WholeSequences(2, 8, documents=documents, packing=packing).positions
        assert positions.view(2, 8).tolist() == expected, packing


def test_megatron_restarts_positions_and_nothing_else():
    """The released training: attention and LFA cross `<eod>` (spec 1.7), so only the rotary angles change."""
    ids, _ = packed_ids([3, 4], 3)
    continuous = random_model(small_config())
    megatron = random_model(small_config(packing="megatron"))
    first = slice(0, 4)
    torch.testing.assert_close(megatron(ids[None]).logits[0, first], continuous(ids[None]).logits[0, first])

    class Restarting(WholeSequences):
        positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2])

    hidden, _ = continuous.model(ids, Restarting(1, len(ids)))
    torch.testing.assert_close(megatron(ids[None]).hidden[0], hidden)
    assert not torch.allclose(hidden[4:], continuous(ids[None]).hidden[0, 4:], atol=1e-2)


def test_hf_mask_blocks_attention_and_lets_the_filter_through():
    """The released code under reset_attention_mask: a document sees its neighbour's last tokens through LFA only."""
    one, other = random_ids(4), random_ids(4)
    after = torch.cat([torch.tensor([EOD]), random_ids(5)])

    def last(**changes):
        model = random_model(small_config(num_hidden_layers=1, packing="hf-mask", **changes))
        return [model(torch.cat([before, after])[None]).logits[0, 5:] for before in (one, other)]

    without_filter = last(localized_filtering=False)
    torch.testing.assert_close(*without_filter)
    one_way, other_way = last()
    # The first token attends to itself alone, whatever its query and key. The second sees the first one's key, which
    # the filter made of the two tokens before it, one of them from across the boundary.
    torch.testing.assert_close(one_way[0], other_way[0])
    assert not torch.allclose(one_way[1], other_way[1], atol=1e-3)


def test_continuous_is_one_document():
    model = random_model(small_config())
    ids, _ = packed_ids([3, 4], 3)
    documents = torch.zeros_like(ids)[None]
    hidden, _ = model.model(ids, WholeSequences(1, len(ids), documents=documents, packing="isolated"))
    torch.testing.assert_close(model(ids[None]).hidden[0], hidden)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_rows_of_any_length_are_isolated_documents_of_one_sequence(changes):
    """How a batch of unequal rows runs without padding and without a cache, in training for one."""
    model = random_model(small_config(**changes))
    rows = [random_ids(length) for length in (4, 6, 1)]
    row_of = torch.arange(3).repeat_interleave(torch.tensor([4, 6, 1]))
    hidden, _ = model.model(torch.cat(rows), WholeSequences(1, 11, documents=row_of[None], packing="isolated"))
    alone = torch.cat([model(row[None]).hidden[0] for row in rows])
    torch.testing.assert_close(hidden, alone, atol=5e-5, rtol=1e-4)
