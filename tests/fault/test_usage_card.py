"""Model cards: what is read of good ones, and what is said of bad ones."""

import json

import pytest

from yuanmoe.checkpoint.card import CARD_FILE, GENERATION_FILE, MAX_BYTES, UsageCard, read_card
from yuanmoe.errors import CheckpointError
from yuanmoe.shipped import small_folder

BAD = {
    "{": "is not JSON",
    "[" * 20000: "is not JSON",
    "[]": "not a JSON object",
    '{"kind": "poem"}': "kind is 'poem'; it is one of chat, completion",
    '{"sampling": {"temperature": 9}}': "temperature is 9, outside 0.0..2.0",
    '{"sampling": {"temperature": true}}': "temperature is True",
    '{"sampling": {"top_p": NaN}}': "top_p is nan",
    '{"sampling": {"seed": 1}}': "sampling has 'seed'",
    '{"sampling": []}': "sampling is not a JSON object",
    '{"languages": "Python"}': "languages is not a list",
    '{"suggestions": {"en": ["a", "b", "c", "d", "e", "f", "g"]}}': "at most 6 texts",
    '{"suggestions": {"en": [1]}}': "holds 1, which is not a text",
    '{"limits": {"en": null}}': "holds None, which is not a text",
    " " * (MAX_BYTES + 1): "a card has at most 65,536",
}


@pytest.mark.parametrize("text", BAD, ids=list(BAD.values()))
def test_a_card_that_cannot_be_meant_is_refused_with_its_place(tmp_path, text):
    (tmp_path / CARD_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=CARD_FILE) as refusal:
        read_card(tmp_path)
    assert BAD[text] in str(refusal.value)


def test_a_checkpoint_without_a_card_is_a_chat_model_about_which_nothing_is_advised(tmp_path):
    assert read_card(tmp_path) == UsageCard(kind="chat")
    assert read_card(tmp_path / "not-there") == UsageCard()


GENERATION = {
    '{"do_sample": true, "temperature": 0.7, "top_k": 5, "max_length": 9}': {"temperature": 0.7, "top_k": 5},
    '{"do_sample": true, "temperature": 1e999, "top_p": 4, "top_k": null}': {},
    '{"temperature": 0.7}': {},
    "{": {},
}


@pytest.mark.parametrize("text", GENERATION)
def test_what_transformers_would_sample_with_is_advised_where_it_samples(tmp_path, text):
    (tmp_path / GENERATION_FILE).write_text(text)
    assert read_card(tmp_path).sampling == GENERATION[text]
    (tmp_path / CARD_FILE).write_text(json.dumps({"sampling": {"temperature": 0.2}}))
    assert read_card(tmp_path).sampling == {"temperature": 0.2}


def test_the_shipped_model_says_that_it_continues_python():
    card = read_card(small_folder())
    assert (card.kind, card.languages) == ("completion", ("Python",))
    assert card.sampling == {"temperature": 0.5, "repetition_penalty": 1.1}
    assert card.suggestions.keys() == card.limits.keys() == {"en", "zh"}
    for texts in card.suggestions.values():
        for text in texts:
            assert text.endswith("\n"), "a suggestion ends where the model goes on"
