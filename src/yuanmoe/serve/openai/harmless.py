"""Fields that clients send though they change no answer here, and the values under which that is so.

Sources: the OpenAI API, and what vLLM, llama.cpp, LiteLLM and LangChain add to it. A field that is listed is left out
of the request where its value asks for nothing; another value is refused by name, as it would change the answer.
Not here: misspelt names, which `schema` refuses with a suggestion.
"""

from collections.abc import Callable, Mapping
from typing import Any

from yuanmoe.http.errors import ApiError

Harmless = Mapping[str, Callable[[Any], bool]]
"""For each field, whether a value asks for nothing."""


def anything(_: Any) -> bool:
    """For what says who asks, how to bill, how to cache, or hints that this kind of model has no use for."""
    return True


def only(*values: Any) -> Callable[[Any], bool]:
    """The values that ask for nothing; null is always one. Truth values and numbers are told apart."""
    return lambda value: (
        value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)
    )


NOTHING = only([], {})


def _no_thinking(value: Any) -> bool:
    """Settings of a chat template that this one has no place for, or that switch off what it does not do."""
    return value is None or (
        isinstance(value, dict) and all(key in THINKING and not told for key, told in value.items())
    )


THINKING = ("enable_thinking", "thinking")

GENERATION: Harmless = (
    dict.fromkeys(
        ("store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
         "prompt_cache_options", "request_id", "cache_salt", "cache_prompt", "keep_alive", "priority",
         "guided_decoding_backend"),
        anything,
    )
    | dict.fromkeys(
        ("guided_json", "guided_choice", "guided_whitespace_pattern", "structured_outputs", "logits_processors",
         "bad_words", "allowed_token_ids", "stop_token_ids", "vllm_xargs", "kv_transfer_params", "moderation",
         "extra_body", "extra_headers"),
        NOTHING,
    )
    | dict.fromkeys(
        ("ignore_eos", "include_stop_str_in_output", "use_beam_search", "early_stopping",
         "return_tokens_as_token_ids", "return_token_ids", "timings_per_token"),
        only(False),
    )
    | dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), only(True))
    | dict.fromkeys(("length_penalty", "repeat_penalty", "typical_p", "tfs_z"), only(1))
    | dict.fromkeys(("min_tokens", "mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), only(0))
    | {"prompt_logprobs": only(), "truncate_prompt_tokens": only(-1)}
)  # fmt: skip

CHAT: Harmless = (
    GENERATION
    | dict.fromkeys(("reasoning_effort", "verbosity", "prediction", "include_reasoning", "reasoning_format"), anything)
    | dict.fromkeys(("audio", "web_search_options"), only())
    | dict.fromkeys(("functions", "documents", "reasoning", "mm_processor_kwargs"), NOTHING)
    | dict.fromkeys(("echo", "continue_final_message", "add_special_tokens"), only(False))
    | {
        "modalities": only([], ["text"]),
        "function_call": only("none", "auto"),
        "best_of": only(1),
        "chat_template": only(),
        "chat_template_kwargs": _no_thinking,
        "enable_thinking": only(False),
        "thinking": only({"type": "disabled"}),
        "add_generation_prompt": only(True),
    }
)

COMPLETION: Harmless = GENERATION | {"add_special_tokens": only(True, False), "response_format": only({"type": "text"})}

STREAM: Harmless = {"include_obfuscation": anything, "continuous_usage_stats": only(False)}

PART: Harmless = dict.fromkeys(("cache_control", "prompt_cache_breakpoint", "annotations", "citations", "id"), anything)

MESSAGE: Harmless = {"cache_control": anything, "provider_specific_fields": anything, "id": anything} | dict.fromkeys(
    ("audio", "function_call", "tool_calls", "tool_call_id", "refusal", "annotations", "images"), NOTHING
)

ASSISTANT: Harmless = MESSAGE | dict.fromkeys(
    ("annotations", "parsed", "reasoning", "reasoning_content", "reasoning_details", "thinking_blocks"), anything
)
"""Also what an answer held beside its text: none of it is part of the prompt that follows."""

CALL: Harmless = dict.fromkeys(("index", "provider_specific_fields", "extra_content", "cache_control"), anything)

FUNCTION: Harmless = dict.fromkeys(("parsed_arguments", "provider_specific_fields"), anything)

TOOL: Harmless = dict.fromkeys(("cache_control",), anything)


def without_harmless(data: dict[str, Any], harmless: Harmless) -> dict[str, Any]:
    """The fields that ask for something. Raises ApiError, 400, for a listed one that asks for what is not done here."""
    kept = {}
    for name, value in data.items():
        asks_nothing = harmless.get(name)
        if asks_nothing is None:
            kept[name] = value
        elif not asks_nothing(value):
            raise ApiError(
                400,
                f"{name} is {str(value)[:80]}; this server does not do that, and without it the answer would be "
                "another: leave it out",
                param=name,
                code="unsupported_value",
            )
    return kept
