"""`yuanmoe inspect`: where a text's tokens went in a model, and with `--rope` which RoPE settings its weights want.

Not here: the numbers (`yuanmoe.evals`), tables (`inspect_view.py`).
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from yuanmoe.cli.inspect.view import show_rope, show_routing
from yuanmoe.cli.terminal.models import Device, Dtype, KvDtype, Model, Threads
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.cli.terminal.progress import tokens_progress
from yuanmoe.cli.terminal.text_file import read_text
from yuanmoe.config import ModelConfig
from yuanmoe.errors import CheckpointError, UsageError
from yuanmoe.storage.whole_file import write_synced

if TYPE_CHECKING:
    from torch import Tensor

    from yuanmoe.lm import LanguageModel
    from yuanmoe.text.tokenizer import Tokenizer

TOKENS = 8192
"""Read where nothing else is asked for: enough for 500 choices of each of M32's experts."""


def inspect(
    model: Model,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    rope: Annotated[
        bool, typer.Option("--rope", help="Say which RoPE base and precision of angles these weights want.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens read together; by default the model's longest context.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Read at most so many tokens of the text.")] = TOKENS,
    layer: Annotated[
        int | None, typer.Option(help="Layer whose experts are listed; by default the middle one of those with any.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write heat maps of every layer to this file, a page.")] = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    device: Device = None,
    threads: Threads = None,
    json_only: Json = False,
) -> None:
    """Read a text with a model and show which experts its tokens went to; with --rope, try RoPE settings on it."""
    if rope and (html or layer is not None):
        raise UsageError("--rope has nothing to do with experts: give it without --html and --layer")
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"--html {html}: there is no folder {html.absolute().parent}; create it first")
    ids, lm = _load(model, text, layer, dtype, kv_dtype, device, threads)
    context = context or lm.config.max_position_embeddings
    read = ids[: tokens + 1]
    report = {
        "command": "inspect",
        "model": str(model),
        "text": str(text),
        "context": context,
        "text_tokens": len(ids) - 1,
        "tokens": len(read) - 1,
    }
    report |= (_try_settings if rope else _follow_tokens)(lm, read, context)
    if not json_only:
        show_rope(report) if rope else show_routing(report, layer)
    if html is not None:
        _write_page(report, html)
    for each in report.get("layers", ()):  # Pages hold them; on a terminal they would be thousands of lines.
        del each["matrices"]
    print_result(report, json_only)


def _load(
    model: Path,
    text: Path,
    layer: int | None,
    dtype: str | None,
    kv_dtype: str | None,
    device: str | None,
    threads: int | None,
) -> tuple[list[int], "LanguageModel"]:
    """The text as a document, `<eod>` before it, and the model. Weights come last: the rest costs nothing to refuse."""
    content = read_text(text)
    with people().status(f"loading {escape(str(model))}"):
        from yuanmoe.lm import open_model
        from yuanmoe.ops.threads import use_threads

        opened = open_model(model, dtype, device, kv_dtype)
        _check_layer(opened.config, layer)
        ids = [opened.tokenizer.eod_id, *opened.tokenizer.encode(content)]
        if len(ids) < 3:
            raise UsageError(f"{text} has {len(ids) - 1} tokens; at least 2 are needed, and some hundreds tell more")
        use_threads(threads)
        return ids, opened.load()


def _check_layer(config: ModelConfig, layer: int | None) -> None:
    layers = [index for index, experts in enumerate(config.experts_per_layer) if experts]
    if layer is not None and layer not in layers:
        known = ", ".join(map(str, layers)) or "none"
        raise UsageError(f"--layer {layer} has no experts; layers that have: {known}")


def _try_settings(lm: "LanguageModel", ids: list[int], context: int) -> dict[str, Any]:
    from yuanmoe.evals.reading import progress
    from yuanmoe.evals.rope import best_of, difference, judge, losses_by_setting, settings_of

    settings = settings_of(lm.model)
    tokens = (len(ids) - 1) * len(settings)
    with tokens_progress("trying RoPE settings", tokens) as advance, progress(lm.model, advance):
        losses = losses_by_setting(lm.model, ids, context, settings)
    for setting, nats in losses.items():
        _check_finite(nats, str(setting))
    best, verdict = best_of(losses), judge(losses)
    rows = []
    for setting, nats in losses.items():
        behind = difference(nats, losses[best])
        known = math.isfinite(behind.standard_error)
        rows.append(
            {"rope_theta": setting.rope_theta, "rope_angles": setting.rope_angles}
            | _likelihood(nats)
            | {"behind_best_nats": behind.mean, "standard_error_nats": behind.standard_error if known else None}
        )
    return {
        "configured": {"rope_theta": lm.config.rope_theta, "rope_angles": lm.config.rope_angles},
        "settings": rows,
        "verdict": {
            "rope_theta": verdict.rope_theta,
            "rope_angles": verdict.rope_angles,
            "more_tokens": verdict.more_tokens,
            "text": verdict.text,
        },
    }


def _follow_tokens(lm: "LanguageModel", ids: list[int], context: int) -> dict[str, Any]:
    from yuanmoe.evals.reading import losses, progress
    from yuanmoe.evals.routing import expert_matrices, favourites, layer_summary, recorded

    with (
        tokens_progress("reading", len(ids) - 1) as advance,
        progress(lm.model, advance),
        recorded(lm.model, ids) as records,
    ):
        nats = losses(lm.model, ids, context)
    _check_finite(nats, "this model")
    size = sum(len(lm.tokenizer.surface(token, before)) for before, token in pairwise(ids))
    layers = [
        layer_summary(record)
        | {"favourites": _spelled(favourites(record), lm.tokenizer), "matrices": expert_matrices(record)}
        for record in records
    ]
    bits_per_byte = nats.double().sum().item() / math.log(2) / max(size, 1)
    return _likelihood(nats) | {"bytes": size, "bits_per_byte": bits_per_byte, "layers": layers}


def _likelihood(nats: "Tensor") -> dict[str, float]:
    mean = nats.double().mean().item()
    return {"nats_per_token": mean, "perplexity": math.exp(mean)}


def _check_finite(nats: "Tensor", what: str) -> None:
    missing = int((~nats.isfinite()).sum())
    if missing:
        raise CheckpointError(
            f"{missing:,} of {len(nats):,} tokens have no likelihood under {what}: the weights are damaged "
            "(see yuanmoe verify), or float16 is too narrow for them (try --dtype float32)"
        )


def _spelled(favourites: list[list[dict[str, Any]]], tokenizer: "Tokenizer") -> list[list[dict[str, Any]]]:
    return [[token | {"token": tokenizer.token_text(token["token_id"])} for token in mine] for mine in favourites]


def _write_page(report: dict[str, Any], path: Path) -> None:
    """Beside and renamed: what was there stays until the new page is whole."""
    from yuanmoe.reports.routing_page import page

    try:
        write_synced(path, page(report))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    people().print(f"wrote {escape(str(path))}")
