"""What is offered after an unknown name: never nonsense, and always the name that a slip of the finger missed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yuanmoe.hints import closest, did_you_mean

KNOWN = ("hidden_size", "rope_theta", "num_experts")


@given(name=st.sampled_from(KNOWN), place=st.integers(0, 8))
def test_a_name_with_a_letter_missing_is_found(name, place):
    assert closest(name[:place] + name[place + 1 :], KNOWN) == name


@pytest.mark.parametrize("name", ["", "q", "zzzzzzzz"])
def test_what_is_like_nothing_gets_no_guess(name):
    assert closest(name, KNOWN) is None
    assert did_you_mean(name, KNOWN, otherwise="known: three") == "known: three"


def test_the_hint_is_a_question():
    assert did_you_mean("rope_tetha", iter(KNOWN), otherwise="") == "did you mean rope_theta?"
