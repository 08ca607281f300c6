"""The server under load, over loopback: many streaming clients against one, its own cost beside the engine's, a soak.

    python benchmarks/serve_load.py [--model DIR | --url URL] [--clients 64] [--seconds 60] [--soak 600] > result.json

Without a model, one of the preset `nano` is written with random weights, which take as long as others. The server is a
process of its own and gets a core; the clients are this process (`serve_clients.py`). Memory is the resident set.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from serve_clients import PROMPT_TOKENS, VOCABULARY, Clients

from yuanmoe.cli.terminal.output import people, print_result, print_table
from yuanmoe.units import format_size

if TYPE_CHECKING:
    from yuanmoe.lm import LanguageModel

OVERHEAD_BATCH = 16
OVERHEAD_ROUNDS = 7
CONTEXT = 512
"""What prompt and answer of any request fit into."""
SAMPLES = 60
"""Of memory, in a soak."""

console = people()


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and its process where it is ours."""

    url: str
    model: str
    process: subprocess.Popen[str] | None = None

    def numbers(self) -> dict[str, float]:
        """The engine's own, by the names of `/metrics` without their prefix."""
        text = urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        found = re.findall(r"^yuanmoe_([a-z_]+(?:\{use=\"\w+\"\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def all_numbers(self) -> dict[str, float]:
        """With the processor time of all threads, and of the event loop's; 0 where the process is not ours."""
        if self.process is None:
            return self.numbers() | {"cpu_s": 0.0, "event_loop_cpu_s": 0.0}
        folder = Path(f"/proc/{self.process.pid}")
        times = {"cpu_s": folder / "stat", "event_loop_cpu_s": folder / f"task/{self.process.pid}/stat"}
        return self.numbers() | {name: cpu_seconds(file) for name, file in times.items()}

    def resident_bytes(self) -> int | None:
        if self.process is None:
            return None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else None

    def wait_for_rest(self, seconds: float = 5) -> dict[str, float]:
        """The numbers once nothing runs, or after so long."""
        end = time.monotonic() + seconds
        while (now := self.numbers())["running_sequences"] + now["queued_sequences"] and time.monotonic() < end:
            time.sleep(0.05)
        return now


def cpu_seconds(file: Path) -> float:
    """User and system time in a `stat` file of /proc."""
    fields = file.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def target(url: str | None, model: Path, threads: int) -> Iterator[Target]:
    """The server at `url`, or one of our own until the block ends."""
    if url is not None:
        listed = json.load(urlopen(f"{url}/v1/models", timeout=10))
        yield Target(url, listed["data"][0]["id"])
        return
    options = ["--port", "0", "--threads", str(threads), "--max-queue", "1024"]
    command = [sys.executable, "-m", "yuanmoe", "serve", "--model", str(model), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield Target(ready["url"], ready["model"], process)
    finally:
        process.terminate()
        process.wait(60)


def random_model(folder: Path, name: str) -> Path:
    """A checkpoint of a preset with random weights, and a tokenizer of 2,048 tokens."""
    from yuanmoe.checkpoint.write.save import save_native
    from yuanmoe.model.decoder import CausalLM
    from yuanmoe.presets import preset
    from yuanmoe.text.bpe import train_bpe

    tokenizer = train_bpe([Path(file).read_text() for file in (__file__, argparse.__file__, asyncio.__file__)], 2048)
    config = preset(name, max_position_embeddings=max(CONTEXT, preset(name).max_position_embeddings))
    save_native(CausalLM(config).initialize().state_dict(), config, folder)
    tokenizer.save(folder)
    return folder


# --- what is measured -------------------------------------------------------------------------------------------------


def throughput(server: Target, number: int, seconds: float) -> dict[str, Any]:
    """Tokens a second for so many clients, and what each of them waits."""
    clients = Clients(server.url, server.model)

    async def during() -> tuple[dict[str, float], dict[str, float], float]:
        before, start = server.numbers(), time.monotonic()
        crowd = asyncio.create_task(clients.crowd(number, seconds))
        await asyncio.sleep(seconds)
        elapsed, after = time.monotonic() - start, await asyncio.to_thread(server.numbers)
        await crowd
        return before, after, elapsed

    before, after, elapsed = asyncio.run(during())
    done = [answer for answer in clients.answers if not answer.error]
    return {
        "clients": number,
        "seconds": elapsed,
        "requests": len(clients.answers),
        "errors": len(clients.answers) - len(done),
        "first_error": next((answer.error[:200] for answer in clients.answers if answer.error), None),
        "tokens_per_s": (after["generated_tokens_total"] - before["generated_tokens_total"]) / elapsed,
        "first_token_s": quantiles([answer.arrivals[0] - answer.began for answer in done]),
        "time_per_token_s": quantiles([(a.arrivals[-1] - a.arrivals[0]) / (a.tokens - 1) for a in done]),
        "event_gap_s": quantiles([gap for answer in done for gap in answer.gaps]),
        "pages_left": server.wait_for_rest()['cache_pages{use="used"}'],
        "preemptions": after["preemptions_total"] - before["preemptions_total"],
        "mean_batch": mean_batch(before, after),
    }


def mean_batch(before: dict[str, float], after: dict[str, float]) -> float:
    steps = after["steps_total"] - before["steps_total"]
    return (after["generated_tokens_total"] - before["generated_tokens_total"]) / max(steps, 1)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}


def server_step(server: Target, new_tokens: int) -> dict[str, float]:
    """Wall time of a decode step with sixteen streams, and processor time, of the event loop too."""

    async def measure() -> tuple[dict[str, float], dict[str, float]]:
        clients = Clients(server.url, server.model)
        asking = [asyncio.create_task(clients.ask(new_tokens)) for _ in range(OVERHEAD_BATCH)]
        await asyncio.sleep(0.5)  # all prompts are read
        before = await asyncio.to_thread(server.all_numbers)
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        after = await asyncio.to_thread(server.all_numbers)
        await asyncio.gather(*asking)
        return before, after

    before, after = asyncio.run(measure())
    spent = {name: (after[name] - before[name]) / (after["steps_total"] - before["steps_total"]) for name in after}
    return {
        "batch": spent["generated_tokens_total"],
        "wall_s": spent["engine_busy_seconds_total"],
        "step_s": spent["engine_step_seconds_total"],
        "cpu_s": spent["cpu_s"],
        "event_loop_cpu_s": spent["event_loop_cpu_s"],
    }


def engine_step(lm: "LanguageModel", new_tokens: int) -> dict[str, float]:
    """The same steps by an engine alone, in this process, with nobody to tell."""
    from yuanmoe.engine.engine import Engine
    from yuanmoe.engine.requests import Request
    from yuanmoe.engine.sampling import SamplingParams

    engine = Engine(lm.model, vocab_size=lm.tokenizer.vocab_size, cache_tokens=OVERHEAD_BATCH * CONTEXT)
    draw = random.Random(0)
    for seed in range(OVERHEAD_BATCH):
        prompt = [draw.randrange(6, VOCABULARY) for _ in range(draw.randint(*PROMPT_TOKENS))]
        params = SamplingParams(temperature=1, logit_bias={0: -100}, max_new_tokens=new_tokens, seed=seed)
        engine.submit(Request(prompt_ids=prompt, params=params))
    while engine.stats().queued or engine.stats().generated_tokens < 4 * OVERHEAD_BATCH:
        engine.step()
    first, start, cpu = engine.stats().steps, time.monotonic(), time.process_time()
    while engine.stats().running == OVERHEAD_BATCH:
        engine.step()
    steps = engine.stats().steps - first
    return {"wall_s": (time.monotonic() - start) / steps, "cpu_s": (time.process_time() - cpu) / steps}


def overhead(server: Target, model: Path, threads: int, new_tokens: int) -> dict[str, Any]:
    """Steps of the server and of the engine alone, in turn, each while the other rests; shares of pairs of them."""
    import torch

    from yuanmoe.lm import load

    torch.set_num_threads(threads)
    lm = load(model)
    rounds = [(server_step(server, new_tokens), engine_step(lm, new_tokens)) for _ in range(OVERHEAD_ROUNDS)]
    shares = {kind: [1 - alone[f"{kind}_s"] / step[f"{kind}_s"] for step, alone in rounds] for kind in ("wall", "cpu")}
    return {
        "server": medians([step for step, _ in rounds]),
        "engine_alone": medians([alone for _, alone in rounds]),
        "share": {kind: spread(values) for kind, values in shares.items()},
    }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def soak(server: Target, number: int, seconds: float) -> dict[str, Any]:
    """Clients that often leave early, for long: memory over time, and what is left of them."""
    clients = Clients(server.url, server.model, seed=1)
    sizes: list[int] = []

    async def watched() -> None:
        crowd = asyncio.create_task(clients.crowd(number, seconds, cancelling=0.5))
        for _ in range(SAMPLES):
            await asyncio.sleep(seconds / SAMPLES)
            sizes.append(server.resident_bytes() or 0)
        await crowd

    asyncio.run(watched())
    after = server.wait_for_rest()
    quarter = SAMPLES // 4
    return {
        "seconds": seconds,
        "requests": len(clients.answers),
        "cancelled": sum(answer.cancelled for answer in clients.answers),
        "errors": sum(bool(answer.error) for answer in clients.answers),
        "pages_left": after['cache_pages{use="used"}'],
        "resident_bytes": sizes,
        "second_quarter_bytes": statistics.median(sizes[quarter : 2 * quarter]),
        "last_quarter_bytes": statistics.median(sizes[-quarter:]),
    }


# --- what is said -----------------------------------------------------------------------------------------------------


def show_throughput(runs: Sequence[dict[str, Any]]) -> None:
    columns = ("clients", "tokens/s", "errors", "batch", "first p50", "p99", "token p50", "p99", "pages left")
    rows = [
        (
            str(run["clients"]),
            f"{run['tokens_per_s']:,.0f}",
            str(run["errors"]),
            f"{run['mean_batch']:.1f}",
            *(f"{1000 * value:,.0f}" for value in run["first_token_s"].values()),
            *(f"{1000 * value:.1f}" for value in run["time_per_token_s"].values()),
            f"{run['pages_left']:.0f}",
        )
        for run in runs
    ]
    print_table(
        console,
        "streaming clients; milliseconds to the first token, and for each of the others",
        columns,
        rows,
        left=(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint directory; without it, random weights")
    parser.add_argument("--preset", default="nano", help="of the random weights")
    parser.add_argument("--url", help="a server that runs already; then nothing is said of the engine alone")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the other core is for HTTP and clients")
    parser.add_argument("--soak", type=float, default=0, help="seconds of clients that leave early, after the rest")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or (Path(folder) if options.url else random_model(Path(folder), options.preset))
        print_result(measure(options, model))


def measure(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "serve_load", "model": str(options.model or options.preset)}
    with target(options.url, model, options.threads) as server:
        throughput(server, 4, 2)  # pages are touched, code is warm
        runs = [throughput(server, 1, options.seconds / 4), throughput(server, options.clients, options.seconds)]
        ratio = runs[1]["tokens_per_s"] / runs[0]["tokens_per_s"]
        show_throughput(runs)
        console.print(f"{options.clients} clients get {ratio:.1f} x the tokens of one\n")
        result |= {"throughput": runs, "ratio": ratio}
        if server.process is not None:
            result["overhead"] = overhead(server, model, options.threads, CONTEXT - PROMPT_TOKENS[1])
            show_overhead(**result["overhead"])
        if options.soak:
            result["soak"] = soak(server, options.clients, options.soak)
            show_soak(result["soak"])
    return result


def show_overhead(server: dict[str, float], engine_alone: dict[str, float], share: dict[str, dict[str, float]]) -> None:
    rows = [
        (name, f"{1000 * server[f'{kind}_s']:.2f}", f"{1000 * engine_alone[f'{kind}_s']:.2f}", percent(share[kind]))
        for name, kind in (("time", "wall"), ("processor time", "cpu"))
    ]
    title = f"milliseconds of a step with {server['batch']:.1f} streams; medians of {OVERHEAD_ROUNDS} rounds in turn"
    print_table(console, title, ("", "server", "engine alone", "server's own"), rows)
    loop = 1000 * server["event_loop_cpu_s"]
    console.print(f"the event loop's processor time is {loop:.2f} ms, on a core of its own where there is one\n")


def percent(share: dict[str, float]) -> str:
    return f"{share['median']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def show_soak(run: dict[str, Any]) -> None:
    early, late = run["second_quarter_bytes"], run["last_quarter_bytes"]
    console.print(
        f"soak of {run['seconds']:.0f} s: {run['requests']:,} requests, {run['cancelled']:,} left early, "
        f"{run['errors']} errors, {run['pages_left']:.0f} pages left; memory {format_size(early)} in the second "
        f"quarter, {format_size(late)} in the last ({late / max(early, 1) - 1:+.1%})\n"
    )


if __name__ == "__main__":
    main()
