"""`yuanmoe generate` and `yuanmoe chat`: their options, and one answer from prompt to statistics.

The text goes to stdout, as people pipe it on, and a newline after it; what is said about it goes to stderr. With
`--json` stdout is one JSON object instead, with the text in it. `generate` continues its prompt as it is, since a plain
text is what every Yuan model can continue; `--instruct` asks it as a question.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yuanmoe.cli.generate.answer import bandwidth_bound, bound_note, emit, speak, statistics, write
from yuanmoe.cli.generate.conversation import Conversation
from yuanmoe.cli.generate.experts import chosen_layer, coloured_writer, routings_json, show_loads
from yuanmoe.cli.terminal.models import Device, Dtype, KvDtype, OptionalModel, Threads, model_or_shipped
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import UsageError

if TYPE_CHECKING:
    from yuanmoe.lm import Completion, LanguageModel, OpenedModel, Stream
    from yuanmoe.text.tokenizer import Tokenizer

NEW_TOKENS = 256
"""Where nothing else is asked for."""

Adapter = Annotated[Path | None, typer.Option(help="Directory of an adapter of this model, as LoRA writes it.")]
Prompt = Annotated[str | None, typer.Argument(help="Text to continue; by default stdin.")]
PromptFile = Annotated[Path | None, typer.Option(help="A file that holds the prompt.")]
Suffix = Annotated[str | None, typer.Option(help="Write what belongs between the prompt and this text.")]
Instruct = Annotated[bool, typer.Option("--instruct/--raw", help="Ask the prompt as a question, or continue it.")]
NewTokens = Annotated[int | None, typer.Option(help=f"By default {NEW_TOKENS}, or what the context leaves.")]
AnswerTokens = Annotated[int | None, typer.Option(help="Of an answer; by default what the context leaves.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 is no limit.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens that reach this together; 1 is no limit.")]
MinP = Annotated[float, typer.Option(help="Only tokens this share as likely as the likeliest; 0 is no limit.")]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens of prompt and answer get less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends the answer, as <eod> does; repeatable.")]
ShowExperts = Annotated[
    bool, typer.Option("--show-experts", help="Colour each token by its first expert; list each layer's load.")
]
ExpertLayer = Annotated[
    int | None, typer.Option(help="Show experts, in the colours of this layer, not the middle one.")
]


def generate(
    prompt: Prompt = None,
    model: OptionalModel = None,
    adapter: Adapter = None,
    prompt_file: PromptFile = None,
    suffix: Suffix = None,
    instruct: Instruct = False,
    max_new_tokens: NewTokens = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    device: Device = None,
    threads: Threads = None,
    show_experts: ShowExperts = False,
    expert_layer: ExpertLayer = None,
    json_only: Json = False,
) -> None:
    """Complete a text. Ctrl-C ends it early and keeps what was said.

    Without --model the small model that comes with yuanmoe does, which knows some Python and nothing else.
    """
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if temperature == 0:
        _check_greedy(sampling)
    if suffix is not None and instruct:
        raise UsageError("--suffix and --instruct exclude each other: a question has no text after its answer")
    text = _read_prompt(prompt, prompt_file)
    _check_answer(sampling | {"max_new_tokens": max_new_tokens}, stop)
    model = model_or_shipped(model)
    opened = _open(model, adapter, dtype, kv_dtype, device, threads)
    show_experts = show_experts or expert_layer is not None
    place = chosen_layer(opened.config, expert_layer) if show_experts else None
    ids = _prompt_ids(opened.tokenizer, text, suffix, instruct)
    max_new_tokens = _new_tokens(opened, ids, max_new_tokens)
    lm = _load(opened)
    stream = lm.stream(ids, stop=stop or (), routing=show_experts, max_new_tokens=max_new_tokens, **sampling)
    whole = speak(stream, _writer(stream, place, json_only))
    if json_only:
        print_result(_result(model, lm, stream.completion, show_experts), json_only)
    else:
        _report(lm, stream.completion, place)
    if not whole:
        raise typer.Exit(130)


def chat(
    model: OptionalModel = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="Text that stands before the conversation.")] = None,
    max_new_tokens: AnswerTokens = None,
    temperature: Temperature = 0.6,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Talk with a model: a question a line, from a terminal or a pipe; /help lists commands."""
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    _check_answer(sampling, stop)
    lm = _load(_open(model_or_shipped(model), adapter, dtype, kv_dtype, device, threads))
    conversation = Conversation(lm, system=system, stop=stop or (), sampling=sampling)
    conversation.run()
    if conversation.failed:
        raise typer.Exit(1)


def _check_greedy(sampling: dict[str, Any]) -> None:
    """Raise UsageError for a setting that would change nothing, as the likeliest token is taken anyway."""
    without_effect = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}
    for name, default in without_effect.items():
        if sampling[name] != default:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} changes nothing at temperature 0; add one, such as --temperature 0.6")


def _check_answer(sampling: dict[str, Any], stop: list[str] | None) -> None:
    """Raise UsageError for settings that no model can follow, before one is loaded."""
    from yuanmoe.engine.sampling import SamplingParams
    from yuanmoe.text.detokenize import StopStrings

    SamplingParams(**sampling)
    StopStrings(stop or ())


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from where it was given; one newline at the end of a file or of stdin is not part of it."""
    if prompt is not None and file is not None:
        raise UsageError("the prompt is given twice, as an argument and as --prompt-file; leave one out")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise UsageError("there is no prompt; give it as an argument, with --prompt-file FILE, or on stdin")
    name = "stdin" if file is None else str(file)
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompt from {name}: {error}") from error
    if not text:
        raise UsageError(f"{name} is empty; to start a document from nothing give '' as the prompt")
    return text.removesuffix("\n")


def _open(
    model: Path,
    adapter: Path | None,
    dtype: str | None,
    kv_dtype: str | None,
    device: str | None,
    threads: int | None,
) -> "OpenedModel":
    with people().status(f"opening {model}"):
        from yuanmoe.lm import open_model
        from yuanmoe.ops.threads import use_threads

        use_threads(threads)
        return open_model(model, dtype, device, kv_dtype, adapter=adapter)


def _load(opened: "OpenedModel") -> "LanguageModel":
    with people().status(f"loading {opened.source.path}"):
        return opened.load()


def _prompt_ids(tokenizer: "Tokenizer", text: str, suffix: str | None, instruct: bool) -> list[int]:
    from yuanmoe.lm import text_ids
    from yuanmoe.text.chat import encode_chat

    if suffix is not None:
        return tokenizer.fim(text, suffix)
    return encode_chat(tokenizer, [{"role": "user", "content": text}]) if instruct else text_ids(tokenizer, text)


def _new_tokens(opened: "OpenedModel", ids: list[int], asked: int | None) -> int:
    """How many tokens to write at most. Raises UsageError and ContextLengthError for more than the context holds."""
    from yuanmoe.engine.requests import max_length

    context = opened.config.max_position_embeddings
    new_tokens = max(1, min(NEW_TOKENS, context - len(ids))) if asked is None else asked
    max_length(ids, new_tokens, opened.tokenizer.vocab_size, context)
    return new_tokens


def _writer(stream: "Stream", place: int | None, json_only: bool) -> Callable[[str], None]:
    if json_only:
        return lambda _: None
    return write if place is None else coloured_writer(stream, place)


def _report(lm: "LanguageModel", completion: "Completion", place: int | None) -> None:
    """Ends the text, and says on stderr how it was made."""
    emit("\n")
    if place is not None:
        show_loads([routing for routing in completion.routings if routing], lm.config, place)
    line = statistics(completion)
    measured = bandwidth_bound(lm, completion) if completion.timing.decode_tokens else None
    if measured is not None:
        line += f": {bound_note(*measured, completion.timing.decode_tokens_per_s)}"
    print(line, file=sys.stderr)


def _result(model: Path, lm: "LanguageModel", completion: "Completion", show_experts: bool) -> dict[str, Any]:
    timing = completion.timing
    result: dict[str, Any] = {
        "command": "generate",
        "model": str(model),
        "text": completion.text,
        "finish_reason": completion.finish_reason or "interrupted",
        "ids": completion.ids,
        "logprobs": completion.logprobs,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": len(completion.ids),
        "prefill_s": timing.prefill_s,
        "prefill_tokens_per_s": timing.prefill_tokens_per_s,
        "decode_s": timing.decode_s,
        "decode_tokens_per_s": timing.decode_tokens_per_s,
    }
    if show_experts:
        result["experts"] = routings_json([routing for routing in completion.routings if routing], lm.config)
    return result
