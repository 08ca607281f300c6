"""`yuanmoe serve` and `yuanmoe api-key`: options, what is said at the start, and the end.

Standard output is one line of JSON with the URL, once the server listens; everything for people is on stderr.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from yuanmoe.cli.terminal.models import Device, Dtype, KvDtype, OptionalModel, Threads, model_or_shipped
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import UsageError
from yuanmoe.plan.cost import forward_flops
from yuanmoe.plan.device.machine import limits_in_words, measure_matmul, read_machine
from yuanmoe.units import GIB, format_size, parse_size

MOST_STEP_TOKENS = 512

if TYPE_CHECKING:
    from yuanmoe.checkpoint.adapters.adapter import Adapter
    from yuanmoe.lm import LanguageModel
    from yuanmoe.serve.core.launch import Launched
    from yuanmoe.serve.openai.app import Access


def serve(
    model: OptionalModel = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    model_name: Annotated[str | None, typer.Option(help="For requests; by default the directory's name.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A LoRA adapter that requests may name as their model; repeatable."),
    ] = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    device: Device = None,
    threads: Threads = None,
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Room for keys and values of all sequences.")] = None,
    cache_gib: Annotated[float | None, typer.Option(help="The same room in GiB.")] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Sequences that are computed together.")] = 64,
    step_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one pass, prompts included; by default about a second's work.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait beside those at work.")] = 256,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="By default what the context holds.")] = None,
    strict_max_tokens: Annotated[
        bool, typer.Option("--strict-max-tokens", help="Refuse a max_tokens above what fits, instead of giving that.")
    ] = False,
    request_timeout: Annotated[float, typer.Option(min=1, help="Seconds that one answer may take.")] = 600.0,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "4MiB",
    api_keys: Annotated[Path | None, typer.Option(metavar="FILE", help="Keys that may ask (yuanmoe api-key).")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of each key, or of all without keys.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once of each key.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages that may call from elsewhere; repeatable.")
    ] = None,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that answers may take to finish at the end.")] = 30,
    json_only: Json = False,
) -> None:
    """Serve a model to many at once: an OpenAI endpoint, and a page. Ctrl-C ends it, answers first; twice, at once."""
    from yuanmoe.checkpoint.card import read_card
    from yuanmoe.serve.core.launch import Settings, launch
    from yuanmoe.serve.core.server import bind, url

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    console = people()
    access = _access(api_keys, requests_per_minute, max_concurrency, cors_origin, host, max_body)
    # Before the weights are loaded, which may take minutes.
    with bind(host, port) as bound:
        folder = model_or_shipped(model)
        model_id = model_name or _model_id(folder)
        card = read_card(folder)
        lm, adapters = _load(console, folder, model_id, adapter or [], dtype, kv_dtype, device, threads)
        settings = Settings(
            model_id=model_id,
            card=card,
            access=access,
            cache_tokens=cache_tokens,
            cache_bytes=None if cache_gib is None else round(cache_gib * GIB),
            free_bytes=_free_bytes(lm),
            max_batch_size=max_batch_size,
            step_tokens=step_tokens or _step_tokens(lm, max_batch_size),
            max_queue=max_queue,
            max_prompt_tokens=max_prompt_tokens,
            strict_max_tokens=strict_max_tokens,
            timeout_s=request_timeout,
            drain_s=drain,
        )
        launched = launch(lm, settings, adapters)
        del adapters  # the model has copies of their factors
        bound.listen()
        _greet(console, launched, url(bound), access, json_only)
        launched.server.run(sockets=[bound])
    _end(console, launched)


def _model_id(path: Path) -> str:
    """The name of a folder as it was given, links included; of a snapshot in a Hugging Face cache its repository's."""
    # Not resolved: who made a link named the model.
    absolute = Path(os.path.abspath(path))
    cache = absolute.parent.parent
    if absolute.parent.name == "snapshots" and cache.name.startswith("models--"):
        return cache.name.removeprefix("models--").replace("--", "/")
    return absolute.name


def _load(
    console: Console,
    model: Path,
    model_id: str,
    adapters: list[str],
    dtype: str | None,
    kv_dtype: str | None,
    device: str | None,
    threads: int | None,
) -> tuple["LanguageModel", dict[str, "Adapter"]]:
    with console.status(f"loading {model}"):
        from yuanmoe.lm import open_model
        from yuanmoe.ops.threads import use_threads
        from yuanmoe.serve.core.adapters import read_adapters

        use_threads(threads)
        opened = open_model(model, dtype, device, kv_dtype)
        # What is wrong with an adapter is said before the weights take their time.
        read = read_adapters(adapters, opened.source, model_id)
        return opened.load(), read


def _step_tokens(lm: "LanguageModel", max_batch_size: int) -> int:
    """As many tokens as a pass reads in about a second: answers wait that long for the prompts of others.

    Not below 64, as then a pass reads most experts for a few tokens each, nor above 512, where nothing is won.
    """
    if lm.model.device.type != "cpu":
        return max(max_batch_size, MOST_STEP_TOKENS)
    tokens_per_s = measure_matmul().median / forward_flops(lm.config)
    return max(max_batch_size, 64, min(MOST_STEP_TOKENS, round(tokens_per_s)))


def _free_bytes(lm: "LanguageModel") -> int | None:
    """Memory that is left where the model is."""
    import torch

    device = lm.model.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else read_machine().available_bytes


def _access(
    api_keys: Path | None,
    requests_per_minute: int | None,
    max_concurrency: int | None,
    cors_origin: list[str] | None,
    host: str,
    max_body: str,
) -> "Access":
    from yuanmoe.http.host import names_this_machine
    from yuanmoe.serve.core.keys import ENVIRONMENT, Client, read_keys
    from yuanmoe.serve.openai.app import Access

    return Access(
        keys=read_keys(api_keys, os.environ.get(ENVIRONMENT)),
        anyone=Client(name="anyone", requests_per_minute=requests_per_minute, max_concurrency=max_concurrency),
        local_only=names_this_machine(host),
        cors_origins=cors_origin or (),
        max_body_bytes=parse_size(max_body),
    )


def _greet(console: Console, launched: "Launched", address: str, access: "Access", json_only: bool) -> None:
    """Says where the server is, what fits, and how to ask; a program reads the URL on stdout."""
    service = launched.service
    contexts = service.cache_tokens / service.config.max_position_embeddings
    console.print(
        f"[bold]{service.model_id}[/] at {address}/v1, page at {address}/\n"
        f"room for {service.cache_tokens:,} tokens of keys and values ({format_size(launched.cache_bytes)}): "
        f"{contexts:.1f} contexts of {service.config.max_position_embeddings:,}\n"
        f"beside the weights: {limits_in_words(read_machine())}",
        soft_wrap=True,
    )
    for name, adapter in service.adapters.items():
        console.print(f"  [bold]{name}[/]: an adapter of {adapter.parameters:,} parameters", soft_wrap=True)
    if not access.local_only and not len(access.keys):
        console.print(
            "[bold red]WARNING: anybody who reaches this address can use this server: it listens beyond this machine "
            "and asks for no key. Make keys with `yuanmoe api-key NAME --file FILE`, then serve --api-keys FILE.[/]",
            soft_wrap=True,
        )
    key = ' -H "Authorization: Bearer $KEY"' if len(access.keys) else ""
    body = f'{{"model": "{service.model_id}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    asking = f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    console.print(f"try:\n  {asking}\nCtrl-C ends it", soft_wrap=True, markup=False)
    result = {"command": "serve", "url": address, "model": service.model_id, "cache_tokens": service.cache_tokens}
    print_result(result | {"adapters": list(service.adapters)}, json_only)


def _end(console: Console, launched: "Launched") -> None:
    """Leaves as the end was: 0 after answers were let finish, 130 where Ctrl-C cut them, 1 where the engine died."""
    # Nothing is left to be interrupted.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = launched.service.worker
    code = 130 if launched.server.force_exit else 0 if worker.failure is None else 1
    if code == 1:
        console.print("the engine had died")
    if worker.is_alive:
        # It is in a long step, under which torch cannot be torn down.
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


def api_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(metavar="FILE", help="Where its hash is added; made if it is not there.")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of this key.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests of this key at once.")] = None,
    json_only: Json = False,
) -> None:
    """Make an API key: its hash is added to a file for `yuanmoe serve`, the key itself is shown this once."""
    from yuanmoe.serve.core.keys import entry_line, new_key, read_keys

    if file.exists() and file.stat().st_size and name in read_keys(file, None).names:
        raise UsageError(f"{file} has a key named {name}; take out its line first, or choose another name")
    key = new_key()
    line = entry_line(name, key, requests_per_minute=requests_per_minute, concurrency=max_concurrency)
    try:
        # Hashes of such keys are no secret that could be turned back; others still have no business with them.
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as opened:
            opened.write(line + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}; name another with --file") from error
    print(f"the key of {name}, shown this once; {file} holds only its hash", file=sys.stderr)
    if sys.stdout.isatty() and not json_only:
        print(key)
    print_result({"command": "api-key", "name": name, "key": key}, json_only)
