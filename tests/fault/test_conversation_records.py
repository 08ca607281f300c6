"""Conversations as people write them: each common shape has a way in, and nothing is learned that was not meant."""

import datetime
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from small_tokenizers import bpe
from yuanmoe.data.prepare.conversations import conversation_of
from yuanmoe.data.prepare.formats import FormatOptions
from yuanmoe.data.prepare.pack import PackOptions, pack_dataset
from yuanmoe.errors import DataError, UsageError

USER, ANSWER = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}
NOT_TEXT = [None, True, 7, 1.5, {}, {"text": "x"}, ["x"], [{"type": "image_url", "image_url": {}}], [{"type": "text"}]]


def pack(folder, *records, form="chat", **changes):
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return pack_files([source], folder / "out", form=form, **changes)


def pack_files(paths, dst, *, form="chat", **changes):
    return pack_dataset(paths, dst, bpe(), PackOptions(read=FormatOptions(format=form, **changes)))


def shown(tokens, document=0):
    """A document as `yuanmoe data preview` shows it."""
    length = int(tokens.lengths(np.array([document]))[0])
    ids, mask = tokens.read(document, 0, length).tolist(), tokens.mask(document, 0, length).tolist()
    text, before = "", False
    for token_id, learned in zip(ids, mask, strict=True):
        text += ("{+" if learned and not before else "+}" if before and not learned else "") + bpe().decode([token_id])
        before = learned
    return text + ("+}" if before else "")


@pytest.mark.parametrize("content", NOT_TEXT, ids=repr)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_every_content_is_text_wherever_it_stands(tmp_path, content, place):
    messages = [USER, ANSWER, USER, ANSWER]
    messages[place] = messages[place] | {"content": content}
    good = {"messages": [USER, ANSWER]}
    with pytest.raises(DataError, match=rf"in\.jsonl, record 2: message {place + 1} has "):
        pack(tmp_path, good, {"messages": messages})
    (tokens,) = pack(tmp_path, good, {"messages": messages}, skip_bad=True)
    assert (tokens.num_documents, tokens.manifest.skipped) == (1, {"unreadable record": 1})


@pytest.mark.parametrize("content", NOT_TEXT, ids=repr)
@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("chat", {"prompt": "q", "completion": "a"}),
        ("alpaca", {"instruction": "q", "output": "a"}),
    ],
)
def test_every_field_is_text(tmp_path, form, record, content):
    for field in record:
        with pytest.raises(DataError, match=rf"record 1: {field} has "):
            pack(tmp_path, record | {field: content}, form=form)


def test_text_parts_are_joined_as_the_server_does(tmp_path):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "fox", "cache_control": None}]
    record = {"messages": [USER | {"content": parts}, ANSWER | {"content": parts}]}
    (tokens,) = pack(tmp_path, record, {"prompt": parts, "completion": "jumps"})
    assert shown(tokens) == "the fox{+<sep>the fox<eod>+}"
    assert shown(tokens, 1) == "the fox{+<sep>jumps<eod>+}"


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_answers_that_the_author_left_out_are_not_learned(tmp_path, key, value):
    messages = [USER, ANSWER | {key: value}, USER | {key: value}, ANSWER | {key: 1}]
    last = [USER, ANSWER, USER, ANSWER | {key: value}]
    (tokens,) = pack(tmp_path, {"messages": messages}, {"messages": last}, {"messages": [USER, ANSWER | {key: value}]})
    assert shown(tokens) == "the fox\njumps\nthe fox{+<sep>jumps<eod>+}"
    assert shown(tokens, 1) == "the fox\n{+jumps+}\nthe fox<sep>jumps<eod>"
    assert tokens.manifest.skipped == {"nothing to learn": 1}


def test_whole_records_can_be_left_out_of_what_is_learned(tmp_path):
    records = [{"prompt": "q", "completion": "a", "weight": weight} for weight in (0, 1, None)]
    (tokens,) = pack(tmp_path, *records, {"messages": [USER, ANSWER], "train": False})
    assert (tokens.num_documents, tokens.manifest.skipped) == (2, {"nothing to learn": 2})


def test_the_released_rule_respects_weights_too(tmp_path):
    records = [{"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": weight}]} for weight in (0, 1)]
    (tokens,) = pack(tmp_path, *records, loss="official")
    assert (shown(tokens), tokens.num_documents) == ("the fox\njumps\nthe fox{+<sep>jumps<eod>+}", 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", 0.5, r"message 2 has the weight 0\.5; it must be 1 \(true, learned\) or 0"),
        ("weight", "0", "message 2 has the weight '0'; it must be 1"),
        ("weight", float("nan"), "message 2 has the weight nan; it must be 1"),
        ("train", "no", "message 2 has the train 'no'; it must be 1"),
        ("mask", True, "message 2 has mask, which has no counterpart here"),
        ("loss_weight", 0.3, "message 2 has loss_weight, which"),
        ("tool_calls", [{"id": "c1"}], "message 2 has tool_calls, which has no counterpart here; write what is said"),
        ("function_call", {"name": "f"}, "message 2 has function_call, which"),
    ],
)
def test_what_would_change_learning_is_not_passed_over(key, value, message):
    with pytest.raises(UsageError, match=message):
        conversation_of({"messages": [USER, ANSWER | {key: value}]})


def test_contradictions_and_questions_to_be_learned_are_refused():
    with pytest.raises(UsageError, match="message 2 has weight and train that contradict each other"):
        conversation_of({"messages": [USER, ANSWER | {"weight": 0, "train": True}]})
    with pytest.raises(UsageError, match="message 1 is from 'user' and asks to be learned; only answers"):
        conversation_of({"messages": [USER | {"train": True}, ANSWER]})
    with pytest.raises(UsageError, match=r"the record has the weight 2; it must be 1"):
        conversation_of({"prompt": "q", "completion": "a", "weight": 2})


def test_fields_that_change_nothing_are_ignored():
    harmless = {"name": "x", "id": 3, "tool_calls": [], "function_call": None, "weight": None, "timestamp": 1.5}
    developer = {"role": "developer", "content": "Be brief."}
    turns = conversation_of({"messages": [developer, USER | harmless, ANSWER | harmless], "source": "web"})
    assert [tuple(turn) for turn in turns] == [
        ("system", "Be brief.", False),
        ("user", "the fox", False),
        ("assistant", "jumps", True),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": "x"}, ANSWER], "message 1 is from 'system'; the last answer must follow text"),
        ([ANSWER], "the answer is the first message; the last answer must follow text from 'user'"),
        ([USER, ANSWER, ANSWER], "message 2 is from 'assistant'; the last answer must follow"),
        ([USER | {"content": " "}, ANSWER], "message 1 is from 'user' and is empty; the last answer must follow"),
        ([USER, ANSWER | {"content": "\n"}], "message 2, the last one, is from 'assistant' and is empty"),
        ([USER | {"role": None}, ANSWER], "message 1 has the role None; it must be one of system, user, assistant"),
        ([USER, "text"], "messages must be a list of objects, one for each message"),
        ([], r"needs messages \(a list of objects\), or prompt and completion; this one has messages, messages is em"),
    ],
)
def test_the_message_that_is_wrong_is_named(messages, message):
    with pytest.raises(UsageError, match=message):
        conversation_of({"messages": messages})


def test_empty_messages_beside_prompt_and_completion():
    for empty in ([], None):
        turns = conversation_of({"messages": empty, "prompt": "q", "completion": "a"})
        assert [turn.text for turn in turns] == ["q", "a"]


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "the fox"},
        {"from": "gpt", "value": "jumps", "weight": 0},
        {"from": "human", "value": "the dog"},
        {"from": "gpt", "value": "sleeps"},
    ],
}


def test_alpaca_and_sharegpt_have_a_way_in(tmp_path):
    history = {"system": "Be brief.", "history": [["the fox", "jumps"]], "input": ""}
    (tokens,) = pack(tmp_path, ALPACA, ALPACA | history, form="alpaca")
    assert shown(tokens) == "Add.\n1 2{+<sep>3<eod>+}"
    assert shown(tokens, 1) == "Be brief.\nthe fox\n{+jumps+}\nAdd.{+<sep>3<eod>+}"
    (tmp_path / "share").mkdir()
    (tokens,) = pack(tmp_path / "share", SHAREGPT, form="sharegpt")
    assert shown(tokens) == "Be brief.\nthe fox\njumps\nthe dog{+<sep>sleeps<eod>+}"


@pytest.mark.parametrize(
    ("form", "record", "hint"),
    [
        ("chat", ALPACA, "alpaca"),
        ("chat", SHAREGPT, "sharegpt"),
        ("alpaca", {"messages": [USER, ANSWER]}, "chat"),
        ("sharegpt", ALPACA, "alpaca"),
    ],
)
def test_another_shape_is_recognized(tmp_path, form, record, hint):
    with pytest.raises(DataError, match=rf"record 1: a conversation needs .*; it looks like --format {hint}\. Mend"):
        pack(tmp_path, record, form=form)


def test_a_table_of_another_shape_gets_advice_that_helps(tmp_path):
    parquet.write_table(pyarrow.table({"conversations": [["x"]]}), tmp_path / "in.parquet")
    with pytest.raises(
        DataError, match=r"columns conversations, none of messages.*choose the --format .*sharegpt reads"
    ):
        pack_files([tmp_path / "in.parquet"], tmp_path / "out")


def test_sharegpt_names_what_it_does_not_know():
    talk = [{"from": "observation", "value": "x"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(UsageError, match="message 1 has the role 'observation'; it must be one of"):
        conversation_of({"conversations": talk}, "sharegpt")
    with pytest.raises(UsageError, match="history must be a list of pairs"):
        conversation_of(ALPACA | {"history": [["one"]]}, "alpaca")


def test_tables_with_times_bytes_and_categories(tmp_path):
    """Only what is read has to be text; bytes that are UTF-8 are."""
    message = pyarrow.struct(
        [
            *(("role", pyarrow.string()), ("content", pyarrow.binary()), ("weight", pyarrow.float32())),
            *(("at", pyarrow.timestamp("ns")), ("price", pyarrow.decimal128(5, 2)), ("picture", pyarrow.binary())),
        ]
    )
    extra = {"at": 1234567890123456789, "price": 1, "picture": b"\xff\xd8", "weight": None}
    talk = [USER | {"content": b"the fox"} | extra, ANSWER | {"content": b"jumps"} | extra]
    rows = [talk, None, [*talk[:1], talk[1] | {"content": b"\xff"}], [*talk[:1], talk[1] | {"weight": 0}]]
    columns = {"messages": pyarrow.array(rows, pyarrow.large_list(message)), "day": [datetime.date(2024, 1, 1)] * 4}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet, record 2: a conversation needs messages"):
        pack_files([tmp_path / "in.parquet"], tmp_path / "out")
    (tokens,) = pack_files([tmp_path / "in.parquet"], tmp_path / "out", skip_bad=True)
    assert shown(tokens) == "the fox{+<sep>jumps<eod>+}"
    assert tokens.manifest.skipped == {"nothing to learn": 1, "unreadable record": 2}


TEXTS = ["alpha beta", None, "gamma"]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(TEXTS, pyarrow.binary()),
        pyarrow.array(TEXTS, pyarrow.large_binary()),
        pyarrow.array(TEXTS, pyarrow.large_string()),
        pyarrow.array(TEXTS).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_text_of_every_type(tmp_path, column):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    (tokens,) = pack_files([tmp_path / "in.parquet"], tmp_path / "out", form="text")
    assert bpe().decode(tokens[:].tolist()) == "alpha beta<eod>gamma<eod>"
    assert tokens.manifest.skipped == {"empty": 1}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([b"x", b"a\xff"]), r"record 2: no text in .*'text' but dict .*not UTF-8: byte 1 is 0xff"),
        (pyarrow.array([0, 1], pyarrow.timestamp("ns")), r"record 1: no text in .* but dict .*timestamp\[ns\]"),
        (pyarrow.array([1, 2]), r"record 1: no text in the field 'text' but int 1"),
    ],
    ids=["bytes", "times", "numbers"],
)
def test_what_is_no_text_is_refused_or_counted(tmp_path, column, message):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=message):
        pack_files([tmp_path / "in.parquet"], tmp_path / "out", form="text")
    (tmp_path / "more.jsonl").write_text('{"text": "fox"}\n')
    paths = [tmp_path / "in.parquet", tmp_path / "more.jsonl"]
    (tokens,) = pack_files(paths, tmp_path / "out", form="text", skip_bad=True)
    assert tokens.num_documents + tokens.manifest.skipped["unreadable record"] == 3


def test_strings_of_a_table_that_are_not_utf_8(tmp_path):
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"a\xff")])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"record 1: no text in the field 'text' but dict .*not UTF-8: byte 1"):
        pack_files([tmp_path / "in.parquet"], tmp_path / "out", form="text")
