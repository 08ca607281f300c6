"""What clients send beside what they ask for: accepted where it asks for nothing, refused by name where it would."""

import openai
import pytest

from serving import MODEL, Running, running

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def chat(server: Running, **change):
    return server.post("/v1/chat/completions", {"messages": [USER], "max_tokens": 2, "temperature": 0} | change)


HARMLESS = [
    {"store": False}, {"store": True}, {"metadata": {"a": "b"}}, {"service_tier": "auto"}, {"reasoning_effort": "low"},
    {"prompt_cache_key": "k"}, {"safety_identifier": "s"}, {"verbosity": "low"}, {"modalities": ["text"]},
    {"prediction": None}, {"web_search_options": None}, {"chat_template_kwargs": {}}, {"best_of": 1},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"ignore_eos": False}, {"min_tokens": 0},
    {"stop_token_ids": []}, {"audio": None}, {"functions": []}, {"function_call": "none"}, {"stop": []},
    {"logit_bias": {}}, {"tools": []}, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none"}, {"stream_options": None}, {"response_format": {"type": "text"}},
    {"logprobs": False, "top_logprobs": 0}, {"skip_special_tokens": True}, {"repeat_penalty": 1.0},
    {"stream_options": {"include_usage": False}}, {"max_completion_tokens": 2},
]  # fmt: skip
NULLS = [
    "n", "stream", "temperature", "top_p", "seed", "stop", "user", "logit_bias", "frequency_penalty", "tools",
    "presence_penalty", "max_completion_tokens", "tool_choice", "response_format", "routing", "min_p", "model",
    "parallel_tool_calls", "logprobs", "top_logprobs", "repetition_penalty", "stream_options", "store", "metadata",
]  # fmt: skip


@pytest.mark.parametrize("change", [*HARMLESS, *({name: None} for name in NULLS)], ids=str)
def test_fields_that_ask_for_nothing_change_nothing(server: Running, change: dict) -> None:
    plain, with_field = chat(server), chat(server, **change)
    assert with_field.status_code == 200, with_field.text
    if "temperature" not in change:
        assert with_field.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": ["text", "audio"]}, {"web_search_options": {}}, {"best_of": 2}, {"ignore_eos": True},
        {"min_tokens": 1}, {"stop_token_ids": [5]}, {"chat_template_kwargs": {"enable_thinking": True}},
        {"function_call": {"name": "f"}}, {"functions": [{"name": "f"}]}, {"echo": True}, {"guided_json": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(server: Running, change: dict) -> None:
    (name,) = change
    error = chat(server, **change).json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is ")


@pytest.mark.parametrize(
    "change", [{"seed": -1}, {"top_k": -1}, {"max_tokens": 2.0}, {"n": 1.0}, {"seed": 5.0}, {"top_k": 3.0}], ids=str
)
def test_numbers_as_other_programs_write_them(server: Running, change: dict) -> None:
    for path, prompt in (("/v1/chat/completions", {"messages": [USER]}), ("/v1/completions", {"prompt": "a"})):
        answer = server.post(path, prompt | {"max_tokens": 2} | change)
        assert answer.status_code == 200, answer.text
    assert chat(server, max_tokens=1.5).status_code == 400


@pytest.mark.parametrize("value", [None, -1])
def test_no_limit_of_a_completion_is_the_context_and_an_absent_one_is_16(server: Running, value) -> None:
    never_ends = {"prompt": "a", "logit_bias": {str(server.lm.tokenizer.eod_id): -100}}
    assert server.post("/v1/completions", never_ends).json()["usage"]["completion_tokens"] == 16
    context = server.lm.config.max_position_embeddings
    long = never_ends | {"prompt": [5] * (context - 20), "max_tokens": value}
    assert server.post("/v1/completions", long).json()["usage"]["completion_tokens"] == 20
    for name in ("n", "stream", "echo", "suffix", "logprobs", "best_of"):
        assert server.post("/v1/completions", {"prompt": "a", name: None}).status_code == 200


def test_an_answer_can_be_sent_back_as_it_came(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        said = client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=4).choices[0].message
        for turn in (said, said.model_dump(), dict(said), said.model_dump() | {"provider_specific_fields": None}):
            assert client.chat.completions.create(model=MODEL, messages=[USER, turn, USER], max_tokens=2).choices


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}]},
         {"role": "tool", "name": "now", "tool_call_id": "c1", "content": "1"}],
        [{"role": "assistant", "content": "", "tool_calls": []}],
        [{"role": "assistant", "content": "a", "reasoning_content": "so", "annotations": [], "audio": None},
         {"role": "assistant", "content": "b", "function_call": None, "parsed": {"a": 1}}],
        [{"role": "assistant", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]}],
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
        [{"role": "assistant", "content": None, "refusal": "no"}],
        [{"role": "user", "content": "a", "name": None, "tool_calls": None, "tool_call_id": None, "audio": None}],
        [{"role": "system", "content": [{"type": "text", "text": "a"}], "cache_control": {"type": "ephemeral"}}],
        [{"role": "developer", "content": "a", "name": None}],
        [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": None}],
        *(
            [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "now", "arguments": none}}]}]
            for none in ("", " ", "\n", None)
        ),
    ],
    ids=str,
)  # fmt: skip
def test_history_as_clients_keep_it(server: Running, turns: list) -> None:
    answer = chat(server, messages=[USER, *turns, USER])
    assert answer.status_code == 200, answer.text


def test_misspelt_fields_are_still_refused(server: Running) -> None:
    assert "did you mean 'temperature'" in chat(server, temprature=1).text
    assert chat(server, temprature=None).status_code == 400
    assert chat(server, messages=[USER | {"contents": "x"}]).status_code == 400
