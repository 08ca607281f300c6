"""The official `openai` client against a real server: what it sends is understood, what it gets it understands."""

import asyncio
import base64
import json
import struct

import openai
import pytest
import torch
from pydantic import BaseModel

from serving import CONTEXT, MODEL, Running, running

HELLO = [{"role": "user", "content": "The quick brown fox"}]


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 8} | options)


def complete(client, **options):
    return client.completions.create(**{"model": MODEL, "prompt": "def add(", "max_tokens": 8} | options)


def test_models(client) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_answers_are_those_of_the_library(client, server: Running) -> None:
    said = chat(client, temperature=0)
    expected = server.lm.chat(HELLO, max_new_tokens=8)
    assert said.choices[0].message.content == expected.text
    assert said.choices[0].message.role == "assistant"
    assert said.choices[0].finish_reason == "length"
    assert (said.object, said.model) == ("chat.completion", MODEL)
    assert said.usage.prompt_tokens == expected.prompt_tokens
    assert said.usage.completion_tokens == 8
    assert said.usage.total_tokens == expected.prompt_tokens + 8
    assert complete(client, temperature=0).choices[0].text == server.lm.generate("def add(", max_new_tokens=8).text


def test_stream_says_the_same(client, server: Running) -> None:
    chunks = list(chat(client, temperature=0, stream=True, stream_options={"include_usage": True}))
    *spoken, last = chunks
    assert spoken[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in spoken)
    assert text == server.lm.chat(HELLO, max_new_tokens=8).text
    assert [chunk.choices[0].finish_reason for chunk in spoken if chunk.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in spoken)
    assert (last.choices, last.usage.completion_tokens) == ([], 8)
    pieces = list(complete(client, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == server.lm.generate("def add(", max_new_tokens=8).text
    assert pieces[-1].choices[0].finish_reason == "length"
    assert pieces[-1].usage is None


def test_stop_token_and_strings(client, server: Running) -> None:
    eod = server.lm.tokenizer.eod_id
    ended = chat(client, logit_bias={str(eod): 100})
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    assert ended.usage.completion_tokens == 1
    whole = complete(client, temperature=0, max_tokens=20).choices[0].text
    stop = whole[3:5]
    for stream in (False, True):
        answer = complete(client, temperature=0, max_tokens=20, stop=[stop, "\0never"], stream=stream)
        choices = [piece.choices[0] for piece in (answer if stream else [answer])]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_choices_have_their_own_randomness_and_seeds_repeat(client) -> None:
    first, second = (chat(client, n=3, seed=5, temperature=1.5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chat(client, n=3, seed=5, temperature=1.5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_logprobs_of_a_chat(client, server: Running) -> None:
    choice = chat(client, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    expected = server.lm.chat(HELLO, max_new_tokens=8)
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-4)
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert joined.decode(errors="replace") == choice.message.content
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)
    streamed = [
        token
        for chunk in chat(client, temperature=0, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in choice.logprobs.content]


def test_scoring_a_prompt(client, server: Running) -> None:
    """What evaluation programs ask: the log-probabilities of a given text, and nothing said."""
    text = "def add(first, second):"
    answer = complete(client, prompt=text, max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    ids = server.lm.tokenizer.encode(text)
    assert choice.text == text
    assert answer.usage.completion_tokens == 0
    assert "".join(choice.logprobs.tokens) == text
    assert choice.logprobs.token_logprobs[0] is None
    offsets = choice.logprobs.text_offset
    assert all(text[at:].startswith(token) for at, token in zip(offsets, choice.logprobs.tokens, strict=True))
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores(server.lm, ids), abs=1e-4)
    assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs[1:])


def scores(lm, ids):
    """The log-probability of each token but the first among the tokenizer's, without the model's padding rows."""
    hidden, _ = lm.model.model(torch.tensor(ids), lm.model.new_cache(1, len(ids)).extend([len(ids)]))
    logprobs = lm.model.logits(hidden)[:-1, : lm.tokenizer.vocab_size].log_softmax(dim=-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def test_echo_goes_before_the_answer(client, server: Running) -> None:
    said = server.lm.generate("def add(", max_new_tokens=8).text
    assert complete(client, temperature=0, echo=True).choices[0].text == "def add(" + said
    pieces = complete(client, temperature=0, echo=True, logprobs=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "def add(" + said


def test_kinds_of_prompts(client, server: Running) -> None:
    ids = server.lm.tokenizer.encode("class Point:")
    several = complete(client, prompt=["def add(", "class Point:"], temperature=0)
    by_ids = complete(client, prompt=[ids, ids], temperature=0)
    alone = server.lm.generate("class Point:", max_new_tokens=8).text
    assert [choice.text for choice in by_ids.choices] == [alone, alone] == [several.choices[1].text] * 2
    assert complete(client, prompt=ids, temperature=0).choices[0].text == alone
    filled = complete(client, prompt="def f(", suffix="return x", temperature=0)
    assert filled.choices[0].text == server.lm.fill("def f(", "return x", max_new_tokens=8).text
    empty = complete(client, prompt="", temperature=0)
    assert empty.choices[0].text == server.lm.generate("", max_new_tokens=8).text


def test_repeated_prompts_are_found_computed(client) -> None:
    prompt = "for number in range(100): print(number) " * 4
    complete(client, prompt=prompt)
    assert complete(client, prompt=prompt).usage.prompt_tokens_details.cached_tokens >= 32


class Weather(BaseModel):
    city: str
    days: int


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of the next days.",
        "parameters": {
            "type": "object",
            "properties": {"days": {"$ref": "#/$defs/days"}},
            "required": ["days"],
            "additionalProperties": False,
            "$defs": {"days": {"enum": [1, 2, 3]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_fit_their_schema(client, choice, stream) -> None:
    options = {"tools": [CLOCK, WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 120}
    if stream:
        with client.chat.completions.stream(model=MODEL, messages=HELLO, **options) as events:
            for _ in events:
                pass
            answer = events.get_final_completion()
    else:
        answer = chat(client, **options)
    (said,) = answer.choices
    assert said.finish_reason == "tool_calls"
    assert not said.message.content
    (call,) = said.message.tool_calls
    assert call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if choice != "required":
        assert call.function.name == "weather"
    assert arguments == {} if call.function.name == "clock" else arguments["days"] in (1, 2, 3)


def test_free_answers_may_call_and_results_come_back(client) -> None:
    said = chat(client, tools=[WEATHER], temperature=0).choices[0]
    assert said.message.content
    assert said.message.tool_calls is None
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"days": 2}'}}
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert chat(client, messages=turns, tools=[WEATHER], tool_choice="none").choices[0].message.content


def test_answers_in_json(client) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=200,
        temperature=0.3,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "weather",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"city": {"enum": ["Jinan", "春"]}, "days": {"enum": [1, 20]}},
                    "required": ["city", "days"],
                    "additionalProperties": False,
                },
            },
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    assert Weather.model_validate_json(answer.choices[0].message.content).days in (1, 20)
    text = chat(client, response_format={"type": "json_object"}, logit_bias={}, max_tokens=30).choices[0]
    assert text.message.content.startswith("{")


def test_answers_by_grammar(client) -> None:
    digits = complete(client, extra_body={"guided_regex": "[0-9]{3}-(春|x)"}, max_tokens=40).choices[0]
    assert digits.finish_reason == "stop"
    assert digits.text[3] == "-"
    assert digits.text[:3].isdigit()
    lark = chat(client, extra_body={"guided_grammar": 'start: ("ab" | "cd") "!"'}, max_tokens=40).choices[0]
    assert lark.message.content in ("ab!", "cd!")


def test_routing_of_every_token_that_was_read(client, server: Running) -> None:
    whole = chat(client, temperature=0, extra_body={"routing": True})
    rows = decoded([whole.choices[0].routing])
    streamed = chat(client, temperature=0, stream=True, extra_body={"routing": True})
    pieces = [chunk.choices[0].routing for chunk in streamed if getattr(chunk.choices[0], "routing", None)]
    assert decoded(pieces) == rows
    expected = server.lm.chat(HELLO, max_new_tokens=8, routing=True)
    # The first row is the prompt's last token; the library says nothing of it, and both nothing of the last.
    said = [routing for routing in expected.routings if routing]
    assert [position for position, _, _ in rows] == list(range(expected.prompt_tokens - 1, expected.prompt_tokens + 7))
    assert [experts for _, experts, _ in rows[1:]] == [routing.experts.flatten().tolist() for routing in said]
    flat = [weight for _, _, weights in rows[1:] for weight in weights]
    assert flat == pytest.approx([w for routing in said for w in routing.weights.flatten().tolist()], abs=1e-5)


def decoded(pieces):
    """Rows of (position, experts, weights), as `docs/serving.md` says to read them."""
    rows = []
    for piece in pieces:
        tokens, layers, chosen = piece["shape"]
        assert piece["expert_bits"] == 8
        experts = base64.b64decode(piece["experts"])
        weights = struct.unpack(f"<{tokens * layers * chosen}f", base64.b64decode(piece["weights"]))
        size = layers * chosen
        for token in range(tokens):
            span = slice(token * size, (token + 1) * size)
            rows.append((piece["start"] + token, list(experts[span]), list(weights[span])))
    return rows


def test_asynchronous_clients_at_once(server: Running) -> None:
    async def ask(client, place):
        prompt = f"def f{place}("
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0, stream=True)
        return prompt, "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, place) for place in range(8)))

    for prompt, text in asyncio.run(ask_all()):
        assert text == server.lm.generate(prompt, max_new_tokens=8).text


def test_errors_are_the_client_s_own_classes(client) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0; it must be at least 1") as caught:
        chat(client, max_tokens=0)
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match=f"the model 'gpt-4' is not here; this server has '{MODEL}'"):
        chat(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match=f"this server reads at most {CONTEXT:,}") as caught:
        complete(client, prompt=[5] * (CONTEXT + 1))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(
        openai.BadRequestError, match="unknown field 'temprature'; did you mean 'temperature'"
    ) as caught:
        chat(client, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
