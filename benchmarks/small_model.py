"""The shipped model, from a finished run: quantized, measured before and after, with its card and loss curve.

    .venv/bin/python benchmarks/small_model.py small-run src/yuanmoe/small

FOLDER is that of `benchmarks/small_corpus.py`, whose docstring has the commands before this one.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from yuanmoe.checkpoint.card import CARD_FILE
from yuanmoe.checkpoint.load import load_model
from yuanmoe.config import ModelConfig
from yuanmoe.data.sets.manifest import DatasetManifest
from yuanmoe.plan import cost
from yuanmoe.reports.training_page import WIDTH, Series, chart
from yuanmoe.shipped import CARD, small_folder
from yuanmoe.storage.run_folder import ENVIRONMENT, RECIPE, read_metrics
from yuanmoe.train.recipe.recipes import small
from yuanmoe.train.recipe.settings import flat, override
from yuanmoe.train.start.data import TrainingData, open_data
from yuanmoe.train.state.checkpoint import newest
from yuanmoe.train.steps.meter import bits_per_byte
from yuanmoe.train.steps.step import Windows, evaluate

BITS = ("--bits", "4", "--role", "attention=8", "--role", "lfa=8", "--role", "embedding=8", "--role", "head=8")
CALIBRATION_TOKENS = 131_072
CURVE = "loss.svg"
STYLE = (
    "<style>text{font:11px sans-serif;fill:#51606e}.r{text-anchor:end}.c{text-anchor:middle}"
    "polyline{fill:none;stroke-width:1.6}line{stroke:#dde4ea}</style><rect width='100%' height='100%' fill='#fff'/>"
)

TEXT = """# small

{total} parameters, {active} of them at work for a token: {layers} layers of {experts} experts, {chosen} of which work
on each token, chosen by the Attention Router (arXiv 2405.17976), with Localized Filtering (arXiv 2311.15786). It
completes Python in the style of what it read, and is here so that every command has a model to answer from. It is no
assistant: it knows little but Python, has seen no conversations and no rearranged documents (`--suffix`), and invents
names and facts. It repeats itself when it always takes the likeliest token; `--temperature 0.5 --repetition-penalty
1.1` reads better. Its context is {context} tokens, of which it was trained on {length}. It may reproduce text of its
sources, whose licences are below.

    yuanmoe generate "def read_lines(path):" --temperature 0.5 --repetition-penalty 1.1 --show-experts

| | |
|---|---|
| tokens learned from | {tokens}, once, of {stored} |
| held-out text | {heldout_tokens} tokens, {heldout_documents} documents, {heldout_bytes} bytes, by their content |
| held-out bits per byte, in float32 | {full:.4f} |
| held-out bits per byte, as shipped | {quantized:.4f} |
| weights as shipped | {weight_bytes} bytes: experts in 4 bits, the other matrices in 8, router and norms whole |
| time | {minutes} minutes beside other work (pauses counted), {machine} |

![Loss in nats a token, of training and of held-out text, by tokens learned from]({curve})

## How it was made

    make setup
    .venv/bin/python benchmarks/small_corpus.py small-run
    .venv/bin/yuanmoe data pack small-run/corpus.jsonl small-run/tokens --tokenizer small-run/tokenizer --heldout 0.01
    .venv/bin/yuanmoe train small --data small-run/tokens --out small-run/run --threads 1 {settings}
    .venv/bin/python benchmarks/small_model.py small-run src/yuanmoe/small

The last one calls `yuanmoe quantize CHECKPOINT src/yuanmoe/small {bits} --calibration small-run/tokens/train
--calibration-tokens {calibration}`, measures and writes this card. `recipe.json` has every setting of the run. Its
end is by the clock (`schedule.max_seconds`), so it does not repeat bit for bit.

## Sources

Python files of what was installed, by its metadata, at most {package_bytes} bytes of a package; no tests, no
copies of other packages, no generated code, no data sets, no document twice. Left out for their licence: {left_out}.

| source | version | licence | documents | bytes |
|---|---|---|---|---|
{sources}
| in all | | | {documents} | {corpus_bytes} |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with run/, tokens/ and sources.json.")
    parser.add_argument("out", type=Path, help="Folder to write.")
    options = parser.parse_args()
    run, tokens = options.folder / "run", options.folder / "tokens"
    checkpoint = newest(run / "checkpoints")
    usage = (small_folder() / CARD_FILE).read_bytes()  # written by people, and likely in the folder that goes now
    shutil.rmtree(options.out, ignore_errors=True)
    calibration = ["--calibration", str(tokens / "train"), "--calibration-tokens", str(CALIBRATION_TOKENS)]
    command = ["yuanmoe", "quantize", str(checkpoint), str(options.out), *BITS, *calibration]
    subprocess.run([sys.executable, "-m", *command], check=True)
    recipe = json.loads((run / RECIPE).read_text(encoding="utf-8"))
    settings = changes(recipe)
    data = open_data([(1.0, tokens)], override(small(), settings))
    measured = {"full": measure(checkpoint, data), "quantized": measure(options.out, data)}
    (options.out / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    (options.out / CURVE).write_text(curve(read_metrics(run)), encoding="utf-8")
    card = TEXT.format(**measured, **facts(options.folder, options.out), settings=command_line(settings))
    (options.out / CARD).write_text(card, encoding="utf-8")
    (options.out / CARD_FILE).write_bytes(usage)
    print(json.dumps(measured))


def changes(recipe: dict[str, Any]) -> list[str]:
    """What `--set` changed of the recipe `small`."""
    before = flat(small().to_dict())
    return [f"{name}={value}" for name, value in flat(recipe).items() if value != before[name]]


def command_line(settings: list[str]) -> str:
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)


def measure(checkpoint: Path, data: TrainingData) -> float:
    """Bits a byte of all held-out text."""
    if data.heldout is None or data.bytes_per_token is None:
        sys.exit("the tokens have no held-out part; pack them with --heldout")
    model = load_model(checkpoint)
    with torch.no_grad():
        loss = evaluate(model, Windows.of(data.heldout, torch.device("cpu")))
    return bits_per_byte(loss, data.bytes_per_token)


def curve(lines: list[dict[str, Any]]) -> str:
    """The losses of a run over its tokens, in a file of its own."""
    trained = [(line["tokens"], line["recent_loss"]) for line in lines[:: len(lines) // 300 + 1]]
    heldout = [(line["tokens"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]
    drawn = chart([Series("training", trained), Series("held out", heldout)])
    # Wider than in the report, where the last number of the axis may run over.
    frame = rf'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 30} \1">{STYLE}'
    return re.sub(rf'<svg class="curve" viewBox="0 0 {WIDTH} (\d+)">', frame, drawn) + "\n"


def facts(folder: Path, out: Path) -> dict[str, Any]:
    """What the card says, from the files of the run and of the result."""
    recipe = json.loads((folder / "run" / RECIPE).read_text(encoding="utf-8"))
    config = ModelConfig.from_dict(recipe["model"])
    last = read_metrics(folder / "run")[-1]
    train, heldout = (DatasetManifest.read(folder / "tokens" / part) for part in ("train", "heldout"))
    environment = json.loads((folder / "run" / ENVIRONMENT).read_text(encoding="utf-8"))
    return sources(json.loads((folder / "sources.json").read_text(encoding="utf-8"))) | {
        "total": f"{sum(cost.parameters(config).values()):,}",
        "active": f"{sum(cost.active_parameters(config).values()):,}",
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "chosen": config.num_experts_per_tok,
        "context": f"{config.max_position_embeddings:,}",
        "length": f"{recipe['data']['sequence_length']}",
        "tokens": f"{last['tokens']:,}",
        "stored": f"{train.num_tokens:,}",
        "heldout_tokens": f"{heldout.num_tokens:,}",
        "heldout_documents": f"{heldout.num_documents:,}",
        "heldout_bytes": f"{heldout.text_bytes:,}",
        "weight_bytes": f"{sum(file.stat().st_size for file in out.glob('*.safetensors')):,}",
        "minutes": f"{last['elapsed_s'] / 60:.0f}",
        "machine": f"one thread of a CPU, torch {environment['packages']['torch']}",
        "curve": CURVE,
        "bits": " ".join(BITS),
        "calibration": CALIBRATION_TOKENS,
    }


def sources(found: dict[str, Any]) -> dict[str, Any]:
    rows = found["sources"]
    table = [
        f"| {row['name']} | {row['version']} | {row['licence']} | {row['documents']:,} | {row['bytes']:,} |"
        for row in rows
    ]
    return {
        "package_bytes": f"{found['package_bytes']:,}",
        "left_out": ", ".join(f"{row['name']} ({row['licence'] or 'none named'})" for row in found["left_out"]),
        "sources": "\n".join(table),
        "documents": f"{sum(row['documents'] for row in rows):,}",
        "corpus_bytes": f"{sum(row['bytes'] for row in rows):,}",
    }


if __name__ == "__main__":
    main()
