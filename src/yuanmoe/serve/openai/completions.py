"""`/v1/completions`: from texts, or the text around a hole, to the engine; what comes back is `completion_answer`'s."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from yuanmoe.errors import UsageError
from yuanmoe.http.answers import json_response
from yuanmoe.serve.core.service import Service, off_loop
from yuanmoe.serve.openai.completion_answer import CompletionAnswer
from yuanmoe.serve.openai.events import EventStream, with_reader
from yuanmoe.serve.openai.schema import MAX_CHOICES, CompletionRequest


async def completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    """The response to a completion request."""
    service.check_model(body.model)
    _check(body)
    prompts = [await _prompt_ids(service, prompt, body.suffix) for prompt in _prompts(body)]
    for ids in prompts:
        service.check_prompt(ids)
    if len(prompts) * body.n > MAX_CHOICES:
        raise UsageError(f"{len(prompts)} prompts with n {body.n} are more than {MAX_CHOICES} choices; ask in parts")
    job = await service.begin(
        prompts,
        body,
        # Scoring alone takes a pass too, whose token is not shown.
        max_new_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=body.echo and body.logprobs is not None,
    )
    answer = CompletionAnswer(service, prompts, body, job)
    if body.stream:
        return EventStream(job, service.timeout_s, answer.events())
    return json_response(await with_reader(request, job, service.timeout_s, answer.whole()))


def _check(body: CompletionRequest) -> None:
    """Raises UsageError for settings that exclude each other."""
    if body.best_of not in (None, body.n):
        raise UsageError(f"best_of is {body.best_of}, n is {body.n}; answers are not ranked here: leave best_of out")
    if body.max_tokens == 0 and not body.echo:
        raise UsageError("max_tokens is 0; without echo it must be at least 1")
    if body.suffix is not None and body.echo:
        raise UsageError("suffix and echo exclude each other: around a hole there is no one text to repeat")


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    """The prompts, one or several."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    # Pydantic tells lists of texts, of ids, and of lists of ids apart; only the second is one prompt.
    return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[return-value]


async def _prompt_ids(service: Service, prompt: str | list[int], suffix: str | None) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(prompt, str):
        service.check_text(len(prompt) + len(suffix or ""))
    if suffix is not None:
        if not isinstance(prompt, str):
            raise UsageError("suffix needs a prompt of text, not of token ids")
        return await off_loop(lambda: tokenizer.fim(prompt, suffix), len(prompt) + len(suffix))
    if isinstance(prompt, str):
        # Special strings count: who continues a raw text writes `<sep>` where it belongs. Nothing starts a document.
        return await off_loop(lambda: tokenizer.encode(prompt) or [tokenizer.eod_id], len(prompt))
    return prompt
