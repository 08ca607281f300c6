"""The JSON that strangers send: every field that is understood, its type, and its default; anything else is refused.

Source: the OpenAI API (chat completions, completions), with the extensions that vLLM's users know: `top_k`, `min_p`,
`repetition_penalty`, `guided_regex`, `guided_grammar`. Ranges of sampling numbers are `SamplingParams`' to check. A
null counts as a field that is absent, and so do the fields of `harmless` that ask for nothing.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from yuanmoe.serve.openai import harmless

MAX_CHOICES = 16
"""Answers to one prompt, and prompts of one request: each takes a place of its own in the engine's batch."""
MAX_TEXT_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_PARTS = 1024
"""Of one message's content; calls of one message as well."""
MAX_STOP_CHARACTERS = 1024

# Lists end at their first error (fail_fast) and are bounded before they are looked at: each error of each branch of a
# union would be an object of its own.


def _whole(value: Any) -> Any:
    """4.0 is 4: some languages have one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _whole_or_none(value: Any) -> Any:
    """-1 is how other programs write that there is no limit, or no seed."""
    whole = _whole(value)
    return None if not isinstance(whole, bool) and whole == -1 else whole


Whole = Annotated[int, BeforeValidator(_whole)]
Limit = Annotated[int | None, BeforeValidator(_whole_or_none)]
SamplingSeed = Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(_whole_or_none)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
PromptTexts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
PromptIds = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
Prompts = PromptTexts | PromptIds
StopText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopTexts = StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=16)]


class Strict(BaseModel):
    """No unknown fields, no numbers in strings, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[harmless.Harmless] = {}
    null_means: ClassVar[frozenset[str]] = frozenset()
    """Fields whose null is not their default."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in harmless.without_harmless(data, cls.ignored).items()
            if value is not None or name in cls.null_means or not cls._may_be_absent(name)
        }

    @classmethod
    def _may_be_absent(cls, name: str) -> bool:
        return name in cls.model_fields and not cls.model_fields[name].is_required()


class StreamOptions(Strict):
    ignored = harmless.STREAM

    include_usage: bool = False


class GenerationFields(Strict):
    """What both kinds of completion share."""

    ignored = harmless.GENERATION

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Whole = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: Limit = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: SamplingSeed = None
    stop: StopTexts | None = None
    user: str | None = Field(None, description="Accepted, and ignored: only the API key says who asks.")
    top_k: Limit = Field(0, description="Extension: only the k likeliest tokens; 0 and -1 are no limit.")
    min_p: float | None = Field(0.0, description="Extension: only tokens this share as likely as the likeliest.")
    repetition_penalty: float | None = Field(1.0, description="Extension: above 1, tokens that were said get unlikely.")
    guided_regex: str | None = Field(None, description="Extension: the answer matches this regular expression.")
    guided_grammar: str | None = Field(None, description="Extension: the answer follows this Lark grammar.")
    routing: bool = Field(False, description="Extension: say which experts each token visited, with their weights.")

    @model_validator(mode="after")
    def _streams_with_its_options(self) -> "GenerationFields":
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    ignored = harmless.COMPLETION
    null_means = frozenset({"max_tokens"})

    prompt: str | TokenIds | Prompts
    suffix: str | None = Field(None, description="Write what belongs between the prompt and this text.")
    max_tokens: Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_whole_or_none)] = Field(
        16, description="0 only with echo, to score a prompt; null and -1 are what the context leaves."
    )
    echo: bool = False
    logprobs: Annotated[Annotated[int, Field(ge=0, le=MAX_TEXT_LOGPROBS)] | None, BeforeValidator(_whole)] = None
    best_of: Limit = None


class TextPart(Strict):
    ignored = harmless.PART

    type: Literal["text"]
    text: str


class Function(Strict):
    ignored = harmless.FUNCTION

    name: str
    arguments: str = ""


class ToolCall(Strict):
    ignored = harmless.CALL

    id: str
    type: Literal["function"] = "function"
    function: Function


class RefusalPart(Strict):
    ignored = harmless.PART

    type: Literal["refusal"]
    refusal: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
AnswerPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
AnswerParts = Annotated[list[AnswerPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class SystemMessage(Strict):
    ignored = harmless.MESSAGE

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    ignored = harmless.MESSAGE

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Strict):
    ignored = {name: asks for name, asks in harmless.ASSISTANT.items() if name not in ("tool_calls", "refusal")}

    role: Literal["assistant"]
    content: str | AnswerParts | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None


class ToolMessage(Strict):
    ignored = {name: asks for name, asks in harmless.MESSAGE.items() if name != "tool_call_id"}

    role: Literal["tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class FunctionTool(Strict):
    ignored = harmless.TOOL

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    ignored = harmless.TOOL

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    ignored = harmless.CHAT

    messages: Messages
    max_completion_tokens: Limit = None
    logprobs: bool | None = False
    top_logprobs: Annotated[Annotated[int, Field(ge=0, le=MAX_TEXT_LOGPROBS)] | None, BeforeValidator(_whole)] = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = True

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, which needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}, which say "
                "the same; leave max_tokens out"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(Strict):
    """`POST /tokenize`: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt, a text, or messages, a conversation")
        return self


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
