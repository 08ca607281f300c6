"""Requests that nobody would write, by the server's own schema; grammars against what they allow; calls amid text."""

import json
import random
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving import Running, running
from small_tokenizers import SMALL, TEXT, bpe
from yuanmoe.engine.requests import RequestOutput
from yuanmoe.errors import UsageError
from yuanmoe.serve.core.answer import Answer, token_name
from yuanmoe.serve.openai.schema import FunctionTool
from yuanmoe.serve.openai.structured import Grammars, json_grammar, lark_grammar, regex_grammar
from yuanmoe.serve.openai.tools import CLOSE, OPEN, Arguments, CallBegin, CallParser, Tools


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Running):
    return schemathesis.openapi.from_dict(server.get("/openapi.json").json())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_is_the_server_s_fault(server: Running, schema, path: str, mode) -> None:
    """Requests that fit the schema, and requests that almost do."""

    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode), tokens=st.integers(1, 3))
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    def check(case, tokens: int) -> None:
        body = case.body
        if isinstance(body, dict) and "completions" in path and body.get("model") is None:
            limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
            body = body | {limit: tokens} if isinstance(body.get(limit), int | None) else body
        answer = send(client, path, body)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    with httpx.Client(base_url=server.url, timeout=30) as client:
        check()
    assert server.wait(lambda: server.service.worker.load == 0)


HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "\ud800", "\0", "<eod>", "9" * 5000, "text", "user", "role", "content", "a" * 20_000]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, min_size=1, max_size=2).map(lambda few: few * 2000)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "schema", "\udfff"]), inner)
        | inner.map(lambda value: nested(value, 150))
    ),
    max_leaves=6,
)


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


@pytest.mark.parametrize("path", BODIES)
def test_hostile_values_in_every_field_are_refused(server: Running, schema, path: str) -> None:
    reference = schema.raw_schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = sorted(schema.raw_schema["components"]["schemas"][reference.rpartition("/")[2]]["properties"])

    @given(field=st.sampled_from(fields), value=HOSTILE)
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    def check(field: str, value: Any) -> None:
        # Lengths of answers are not what is tried here.
        if field in ("max_tokens", "max_completion_tokens") and value is None:
            return
        answer = send(client, path, BODIES[path] | {field: value})
        assert answer.status_code < 500, (field, value, answer.text)
        assert answer.status_code == 200 or len(answer.content) <= 2048

    with httpx.Client(base_url=server.url, timeout=60) as client:
        check()
    assert server.wait(lambda: server.service.worker.load == 0)


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body, default=repr).encode()
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, "春"]}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json": (json_grammar(SCHEMA), json.loads),
    "regex": (regex_grammar("(ab|[0-9]春){2,3}"), None),
    "lark": (lark_grammar('start: "x" /[a-c]+/ "\\n"'), None),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("name", GRAMMARS)
def test_whatever_is_drawn_from_a_grammar_follows_it(kind: str, name: str) -> None:
    tokenizer = SMALL[kind]()
    grammar, reader = GRAMMARS[name]
    grammars = Grammars(tokenizer)
    for seed in range(20):
        constraint, draw = grammars.compile(grammar), random.Random(seed)
        answer = Answer(tokenizer, [tokenizer.sep_id], ())
        text, token_id = "", -1
        while token_id != tokenizer.eod_id and answer.num_tokens < 200:
            allowed = constraint.mask().nonzero()[:, 0].tolist()
            # Ends where it may, or some answers would go on for long.
            token_id = tokenizer.eod_id if tokenizer.eod_id in allowed else draw.choice(allowed)
            constraint.accept(token_id)
            reason = "stop" if token_id == tokenizer.eod_id else None
            text += answer.push([RequestOutput(0, token_id, 0.0, finish_reason=reason)]).text
        assert answer.finish_reason == "stop"
        again = grammars.compile(grammar)
        for token_id in tokens_inside(tokenizer, text):
            again.accept(token_id)
        assert again.mask()[tokenizer.eod_id]
        if reader is not None:
            assert isinstance(reader(text), dict)


def tokens_inside(tokenizer, text: str) -> list[int]:
    """Ids of an answer's text, byte by byte."""
    table = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return [table[bytes([byte])] for byte in text.encode()]


def test_grammars_that_are_none_and_tokens_that_do_not_follow() -> None:
    grammars = Grammars(bpe())
    with pytest.raises(UsageError, match=r"the grammar cannot be followed: .*nobody"):
        grammars.compile(lark_grammar("start: nobody"))
    constraint = grammars.compile(regex_grammar("a"))
    with pytest.raises(UsageError, match="the grammar got stuck: "):
        constraint.accept(bpe().encode("b")[0])


def test_choices_of_one_grammar_go_their_own_ways() -> None:
    first = Grammars(bpe()).compile(regex_grammar("ab|ba"))
    second = first.fresh()
    first.accept(bpe().encode("a")[0])
    second.accept(bpe().encode("b")[0])
    assert not (first.mask() & second.mask()).any()


FUNCTIONS = [FunctionTool(name="f", parameters={"properties": {"x": {"type": "string"}}}), FunctionTool(name="g")]
CALLS = st.builds(
    lambda name, text: (name, {"x": text} if name == "f" else {}), st.sampled_from(["f", "g"]), TEXT | st.just(CLOSE)
)


@given(parts=st.lists(TEXT.filter(lambda text: OPEN[:3] not in text) | CALLS, max_size=5), data=st.data())
def test_calls_are_found_however_the_text_is_cut(parts, data) -> None:
    pieces = [part if isinstance(part, str) else written(*part) for part in parts]
    whole = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parser = CallParser()
    bounds = zip([0, *cuts], [*cuts, len(whole)], strict=True)
    found = [event for start, end in bounds for event in parser.push(whole[start:end])] + list(parser.flush())
    calls = [event for event in found if isinstance(event, CallBegin)]
    assert read_calls(found) == [p for p in parts if not isinstance(p, str)]
    said = "".join(event for event in found if isinstance(event, str))
    assert "".join(said.split()) == "".join("".join(part for part in parts if isinstance(part, str)).split())
    assert len({call.id for call in calls}) == len(calls)


def read_calls(found) -> list[tuple[str, dict]]:
    calls: list[list[str]] = []
    for event in found:
        if isinstance(event, CallBegin):
            calls.append([event.name, ""])
        elif isinstance(event, Arguments):
            calls[-1][1] += event.json
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("cut", range(len(OPEN), 60))
def test_a_cut_call_is_a_call_with_what_was_written(cut: int) -> None:
    whole = written("weather", {"city": "Jin", "d": [1, 2]})
    parser = CallParser(["weather", "clock"])
    found = [event for character in whole[:cut] for event in parser.push(character)] + list(parser.flush())
    assert not [event for event in found if isinstance(event, str)]
    names = [event.name for event in found if isinstance(event, CallBegin)]
    assert names == (["weather"] if cut > len(OPEN + '{"name": "') else [])
    arguments = "".join(event.json for event in found if isinstance(event, Arguments))
    begin = whole.index('{"city')
    assert arguments == whole[begin:cut].removesuffix("}" if cut == len(whole) else "")[: len(whole)]


def test_an_answer_in_json_may_quote_a_call() -> None:
    parser = CallParser(["f"], calls_first=True)
    text = json.dumps({"a": OPEN + '{"name": "f", "arguments": {}}' + CLOSE})
    assert "".join(map(str, [*parser.push(text[:9]), *parser.push(text[9:]), *parser.flush()])) == text


def written(name: str, arguments: dict) -> str:
    return OPEN + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + CLOSE


@pytest.mark.parametrize(
    "text", [OPEN, OPEN + "{}" + CLOSE, OPEN + '{"name": "f"', "<tool_cal", OPEN + "[" * 9999 + CLOSE]
)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    parser = CallParser()
    assert "".join(map(str, [*parser.push(text), *parser.flush()])) == text


@pytest.mark.parametrize("kind", SMALL)
def test_free_text_is_free_and_calls_are_held_to_their_schema(kind: str) -> None:
    tokenizer = SMALL[kind]()
    grammar = Tools(FUNCTIONS, forced=False, parallel=True).grammar()
    for text, follows in (
        ("any text < even {this}", True),
        ("so " + written("g", {}) + "\n" + written("f", {"x": "春"}), True),
        (OPEN + '{"name": "h"', False),
        (OPEN + '{"name": "f", "arguments": {"x": 1', False),
        ("the end of a call alone " + CLOSE, True),
    ):
        constraint = Grammars(tokenizer).compile(grammar)
        assert accepts(constraint, tokens_inside(tokenizer, text)) == follows, text


def accepts(constraint, ids) -> bool:
    try:
        for token_id in ids:
            constraint.accept(token_id)
    except UsageError:
        return False
    return True


@given(text=TEXT, stop=st.text(min_size=1, max_size=3), cut=st.integers(1, 5))
def test_an_answer_does_not_depend_on_how_its_tokens_come(text: str, stop: str, cut: int) -> None:
    tokenizer = bpe()
    ids = tokenizer.encode(text, allow_special=False)
    outputs = [RequestOutput(0, token_id, -1.0) for token_id in ids] + [
        RequestOutput(0, tokenizer.eod_id, -1.0, finish_reason="stop")
    ]
    answer = Answer(tokenizer, [tokenizer.sep_id], [stop])
    said = "".join(answer.push(outputs[at : at + cut]).text for at in range(0, len(outputs), cut))
    assert said == text.partition(stop)[0]
    assert answer.finish_reason == "stop"


def test_names_of_tokens() -> None:
    assert (token_name("春".encode()), token_name(b"\xe6\x98"), token_name(b"")) == ("春", "bytes:\\xe6\\x98", "")
