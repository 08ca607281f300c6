"""Which objects of a JSON schema are closed, and what an answer with tools and a format may be."""

import json

import pytest

from serving import CONTEXT, Running, running
from small_tokenizers import SMALL
from yuanmoe.cli.serve import _model_id
from yuanmoe.errors import UsageError
from yuanmoe.serve.openai.closing import closed
from yuanmoe.serve.openai.schema import FunctionTool
from yuanmoe.serve.openai.structured import Grammars, json_schema
from yuanmoe.serve.openai.tools import OPEN, Tools

TEXT = {"type": "string"}
POINT = {"type": "object", "properties": {"x": TEXT}, "required": ["x"]}
SHUT = POINT | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (POINT, SHUT),
        ({"properties": {"x": TEXT}}, {"properties": {"x": TEXT}, "additionalProperties": False}),
        (POINT | {"additionalProperties": True}, POINT | {"additionalProperties": True}),
        (POINT | {"additionalProperties": POINT}, POINT | {"additionalProperties": SHUT}),
        ({"type": "object"}, {"type": "object"}),
        ({"type": "array", "items": POINT}, {"type": "array", "items": SHUT}),
        ({"prefixItems": [POINT]}, {"prefixItems": [SHUT]}),
        ({"anyOf": [POINT, TEXT]}, {"anyOf": [SHUT, TEXT]}),
        ({"$ref": "#/$defs/P", "$defs": {"P": POINT}}, {"$ref": "#/$defs/P", "$defs": {"P": SHUT}}),
        ({"allOf": [{"$ref": "#/$defs/P"}], "$defs": {"P": POINT}},
         {"allOf": [{"$ref": "#/$defs/P"}], "$defs": {"P": SHUT}}),
        ({"allOf": [POINT, POINT]}, {"allOf": [POINT, POINT]}),
        (POINT | {"required": ["y"]}, POINT | {"required": ["y"]}),
        ({"const": POINT, "default": POINT}, {"const": POINT, "default": POINT}),
        ({"properties": {"properties": POINT}}, {"properties": {"properties": SHUT}, "additionalProperties": False}),
    ],
    ids=json.dumps,
)  # fmt: skip
def test_objects_are_closed_unless_they_say_otherwise(schema: dict, expected: dict) -> None:
    before = json.dumps(schema)
    assert closed(schema) == expected
    assert json.dumps(schema) == before


def test_deep_schemas_are_refused() -> None:
    schema: dict = {}
    for _ in range(500):
        schema = {"properties": {"a": schema}}
    with pytest.raises(UsageError, match="nested more than 100 deep"):
        closed(schema)


def test_with_a_format_the_answer_is_a_call_or_fits() -> None:
    tokenizer = SMALL["bpe"]() if "bpe" in SMALL else next(iter(SMALL.values()))()
    grammar = Tools([FunctionTool(name="f")], forced=False, parallel=False).grammar(json_schema(POINT, lenient=False))
    for text, follows in (
        ('{"x": "a"}', True),
        (OPEN + '{"name": "f", "arguments": {}}</tool_call>', True),
        ("so ", False),
        ('{"x": "a", ', False),
    ):
        constraint = Grammars(tokenizer).compile(grammar)
        try:
            for token_id in tokenizer.encode(text, allow_special=False):
                constraint.accept(token_id)
            accepted = True
        except UsageError:
            accepted = False
        assert accepted == follows, text


def test_more_tokens_than_fit_give_what_fits_and_say_so() -> None:
    body: dict = {"max_tokens": 100_000}
    with running() as server:
        body["logit_bias"] = {str(server.lm.tokenizer.eod_id): -100}
        body["messages"] = [{"role": "user", "content": nearly_full(server)}]
        answer = server.post("/v1/chat/completions", body).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == server.lm.config.max_position_embeddings
        (warning,) = answer["warnings"]
        assert f"behind the prompt {answer['usage']['completion_tokens']:,} fit" in warning
        assert "warnings" not in server.post("/v1/chat/completions", body | {"max_tokens": 2}).json()
    with running(strict_max_tokens=True) as server:
        error = server.post("/v1/chat/completions", body).json()["error"]
        assert error["code"] == "context_length_exceeded"


def nearly_full(server: Running) -> str:
    """A question that leaves room for some ten tokens."""
    text, limit = "ab " * CONTEXT, CONTEXT - 12
    ids = server.lm.tokenizer.encode(text)[:limit]
    return server.lm.tokenizer.decode(ids)


def test_the_name_of_a_model_is_that_of_its_link_or_repository(tmp_path) -> None:
    snapshot = tmp_path / "models--org--yuan" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    link = tmp_path / "my-yuan"
    link.symlink_to(snapshot)
    assert (_model_id(snapshot), _model_id(link)) == ("org/yuan", "my-yuan")
