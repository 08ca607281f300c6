"""A model with its tokenizer: text in, text out.

Answers end at `<eod>`; a document starts after `<eod>`, as in training (arXiv 2311.15786 section 3.3). Formats of
questions and conversations are `data.chat`'s. Not here: batches that requests join and leave (serving), the terminal.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch

from yuanmoe.checkpoint.adapters.adapter import Adapter, attach_adapter, check_source, open_adapter
from yuanmoe.checkpoint.formats.native_config import parse_dtype, parse_kv_dtype
from yuanmoe.checkpoint.load import model_of, usable_device
from yuanmoe.checkpoint.open import OpenCheckpoint, open_checkpoint
from yuanmoe.config import ModelConfig
from yuanmoe.engine.generate import FinishReason, Generation, GenerationTiming, Token, TokenRouting
from yuanmoe.engine.sampling import SamplingParams
from yuanmoe.engine.score import score
from yuanmoe.model.decoder import CausalLM
from yuanmoe.model.lora.attach import detach
from yuanmoe.options import AnswerOptions, ComputeOptions
from yuanmoe.plan.cost import Precision
from yuanmoe.shipped import model_folder
from yuanmoe.text.answer_text import AnswerText
from yuanmoe.text.chat import Message, encode_chat
from yuanmoe.text.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

Prompt = str | list[int]
"""A text to continue, or token ids."""


@dataclass(slots=True, kw_only=True)
class Completion:
    """What a model said to one prompt; while it is streamed, what it said so far."""

    prompt_tokens: int
    text: str = ""
    """Without special tokens, and up to the stop string or token if one ended it."""
    ids: list[int] = field(default_factory=list)
    """Every token that was generated, the one that ended it included."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token, under the model itself: before penalties, temperature and filters."""
    finish_reason: FinishReason | None = None
    """`stop`: a stop token or string; `length`: max_new_tokens or the context; None: not finished."""
    routings: list[TokenRouting | None] = field(default_factory=list)
    """Of each token as it passed the layers; None where it was not asked for, and for the last, which no pass reads."""
    timing: GenerationTiming = field(default_factory=GenerationTiming)
    """Of the whole batch that the prompt was in."""


class _Answer:
    """One completion as it grows, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: str | Sequence[str]) -> None:
        self.completion = Completion(prompt_tokens=len(prompt_ids))
        self.text = AnswerText(tokenizer, prompt_ids, stop)

    def push(self, token: Token) -> str:
        """The text that is certain now and was not before."""
        completion = self.completion
        completion.ids.append(token.token_id)
        completion.logprobs.append(token.logprob)
        completion.routings.append(token.routing)
        completion.finish_reason = token.finish_reason
        return "" if token.finish_reason == "stop" else self._add(self.text.push(token.token_id))

    def finish(self) -> str:
        """The text that was held back, now that nothing follows."""
        return self._add(self.text.finish())

    def _add(self, piece: str) -> str:
        self.completion.text += piece
        if self.text.stopped:
            self.completion.finish_reason = "stop"
        return piece


class Stream:
    """An answer on its way: an iterator over pieces of its text, each whole characters."""

    def __init__(self, generation: Generation, answer: _Answer) -> None:
        self._generation = generation
        self._answer = answer
        self.completion = answer.completion
        """What was said so far."""

    def __iter__(self) -> Iterator[str]:
        for token in self._generation:
            piece = self._answer.push(token)
            self.completion.timing = self._generation.timing
            if self._answer.text.stopped:
                self._generation.stop(0)
            yield piece
        yield self.finish()

    def finish(self) -> str:
        """Ends the answer here, when no more of it is wanted: the text that was held back so far."""
        return self._answer.finish()


class LanguageModel:
    """A Yuan model that reads and writes text.

    `generate`, `chat`, `fill` and `stream` take `AnswerOptions` as keywords: the fields of `SamplingParams` (greedy by
    default, up to `<eod>` or the end of the context), `stop`, one string or several that end an answer and are not part
    of it, and `routing`, whether to report which experts each token visited.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, precision: Precision | None = None) -> None:
        """`precision` is that of quantized weights. Raises TokenizerError when the tokenizer is not the model's."""
        check_tokenizer(tokenizer, model.config.vocab_size, model.config.eod_token_id)
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision
        self.adapter: Adapter | None = None
        """What is attached."""

    def attach(self, adapter: str | Path | Adapter) -> None:
        """Lets an adapter correct the model from here on, in the place of any other; the weights stay as they are.

        Between answers, not while one is streamed: what is cached of it was computed without. Raises CheckpointError
        for what is no adapter, or one of another base.
        """
        opened = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
        attach_adapter(self.model, opened)
        self.adapter = opened

    def detach(self) -> None:
        """Takes the adapter away: the model answers as it did before there was one, bit for bit."""
        detach(self.model)
        self.adapter = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def generate(self, prompt: Prompt, **options: Unpack[AnswerOptions]) -> Completion:
        """Continues a text. Raises UsageError and ContextLengthError before anything is computed."""
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(self, prompts: Sequence[Prompt], **options: Unpack[AnswerOptions]) -> list[Completion]:
        """Continues several texts together, each as if it were alone."""
        generation, answers = self._start(prompts, options)
        for token in generation:
            answers[token.sequence].push(token)
            if answers[token.sequence].text.stopped:
                generation.stop(token.sequence)
        for answer in answers:
            answer.finish()
            answer.completion.timing = generation.timing
        return [answer.completion for answer in answers]

    def stream(self, prompt: Prompt, **options: Unpack[AnswerOptions]) -> Stream:
        """Continues a text, piece by piece. Raises as `generate` does, here and not while it runs."""
        generation, answers = self._start([prompt], options)
        return Stream(generation, answers[0])

    def chat(self, messages: Sequence[Message], **options: Unpack[AnswerOptions]) -> Completion:
        """Answers a conversation: `[{"role": "user", "content": "..."}]`."""
        return self.generate(self.chat_ids(messages), **options)

    def fill(self, prefix: str, suffix: str, **options: Unpack[AnswerOptions]) -> Completion:
        """Writes what belongs between two texts, for models trained to (arXiv 2311.15786 section 4)."""
        return self.generate(self.fill_ids(prefix, suffix), **options)

    def text_ids(self, text: str) -> list[int]:
        """The prompt that continues `text`, in which special strings count; an empty one starts a document."""
        return text_ids(self.tokenizer, text)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that asks for the answer to a conversation; special strings in it are plain text."""
        return encode_chat(self.tokenizer, messages)

    def fill_ids(self, prefix: str, suffix: str) -> list[int]:
        """The prompt that asks for what is between two plain texts."""
        return self.tokenizer.fim(prefix, suffix)

    def score(self, text: str) -> list[float]:
        """The log-probability of each token of a document, given what is before it; the first one given `<eod>`."""
        return score(self.model, [self.tokenizer.eod_id, *self.tokenizer.encode(text)])

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-probability of a document's tokens. Raises UsageError for an empty one."""
        logprobs = self.score(text)
        return math.exp(-sum(logprobs) / len(logprobs))

    def _start(self, prompts: Sequence[Prompt], options: AnswerOptions) -> tuple[Generation, list[_Answer]]:
        ids = [self.text_ids(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        sampling = {"stop_ids": (self.tokenizer.eod_id,), **options}
        stop, routing = options.get("stop", ()), options.get("routing", False)
        params = SamplingParams(**{name: value for name, value in sampling.items() if name not in {"stop", "routing"}})
        generation = Generation(self.model, ids, params, vocab_size=self.tokenizer.vocab_size, routing=routing)
        return generation, [_Answer(self.tokenizer, prompt_ids, stop) for prompt_ids in ids]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt that continues `text`, in which special strings count; an empty one starts a document."""
    return tokenizer.encode(text) or [tokenizer.eod_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """All of a model but its weights: enough to refuse what cannot be done before they take their time and memory."""

    source: OpenCheckpoint
    tokenizer: Tokenizer
    adapter: Adapter | None
    settings: dict[str, Any]
    """Of `model_of`."""

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def load(self) -> LanguageModel:
        """The model with its weights. Raises CheckpointError and ResourceError."""
        lm = LanguageModel(model_of(self.source, **self.settings), self.tokenizer, self.source.precision)
        if self.adapter is not None:
            lm.attach(self.adapter)
        return lm


def open_model(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    adapter: str | Path | None = None,
    ignore_unknown: bool = False,
    **changes: Unpack[ComputeOptions],
) -> OpenedModel:
    """What `load` takes, without reading weights: all that can be wrong with it is found here.

    Raises UsageError, ConfigError, CheckpointError and TokenizerError.
    """
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    if isinstance(kv_dtype, str):
        kv_dtype = parse_kv_dtype(kv_dtype)
    settings = {"dtype": dtype, "kv_dtype": kv_dtype, "device": usable_device(device)} | changes
    path = model_folder(path)
    source = open_checkpoint(path, ignore_unknown=ignore_unknown)
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, source.config.vocab_size, source.config.eod_token_id)
    opened = None if adapter is None else open_adapter(adapter)
    if opened is not None:
        check_source(opened, source)
    return OpenedModel(source=source, tokenizer=tokenizer, adapter=opened, settings=settings)


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    adapter: str | Path | None = None,
    ignore_unknown: bool = False,
    **changes: Unpack[ComputeOptions],
) -> LanguageModel:
    """Opens a checkpoint of any format, quantized ones included, with its tokenizer; `small` is the shipped one.

    `dtype` is the checkpoint's own unless one is named (float32 for a quantized one on a CPU); `device` is a GPU where
    there is one. `kv_dtype` is that of cached keys and values: `int8` halves what a long context takes and reads;
    by default `dtype`, or bfloat16 under quantized weights. `adapter` is a directory that `LanguageModel.attach` takes.
    `ignore_unknown` goes on where config keys or tensors are unknown. `changes` are fields of the model's
    configuration that leave its weights as they are, such as `rope_theta`.
    Raises UsageError, ConfigError, CheckpointError, ResourceError and TokenizerError.
    """
    return open_model(path, dtype, device, kv_dtype, adapter, ignore_unknown, **changes).load()
