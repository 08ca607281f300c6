"""The options of every command that say which model, which tokenizer, and where it is computed.

A model is a folder, or the shipped model's name.
Not here: what is opened then (`yuanmoe.lm`, `yuanmoe.checkpoint`).
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from yuanmoe.shipped import CARD, SMALL, model_folder, small_folder

SHIPPED = f"{SMALL} is the one that comes with yuanmoe"
_MODEL = typer.Option(metavar="<path>", parser=model_folder, help=f"Folder of a checkpoint, of any format; {SHIPPED}.")

Model = Annotated[Path, _MODEL]
OptionalModel = Annotated[Path | None, _MODEL]
Checkpoint = Annotated[
    Path, typer.Argument(parser=model_folder, help=f"Folder of a checkpoint, of any format; {SHIPPED}.")
]
FullPrecisionBase = Annotated[
    Path,
    typer.Option("--model", metavar="<path>", parser=model_folder, help="Folder of its base, in full precision."),
]
QuantizedModel = Annotated[
    Path | None,
    typer.Option(metavar="<path>", parser=model_folder, help=f"A quantized checkpoint instead; {SHIPPED}."),
]
Init = Annotated[
    Path | None,
    typer.Option(
        metavar="<path>", parser=model_folder, help=f"Checkpoint of any format to start from; {SHIPPED}, in 4 bits."
    ),
]
Tokenizer = Annotated[
    Path,
    typer.Option(
        "--tokenizer", metavar="<path>", parser=model_folder, help=f"A model or its tokenizer file; {SHIPPED}."
    ),
]
OptionalTokenizer = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="<path>",
        parser=model_folder,
        help=f"A model or its tokenizer file, where no dataset brings its own; {SHIPPED}.",
    ),
]

Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. [default: the checkpoint's own; float32 if quantized]"),
]
KvDtype = Annotated[
    str | None,
    typer.Option(help="Of keys and values: bf16, or int8, which takes half. [default: the dtype; bf16 if quantized]"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default as many as there are cores.")]


def model_or_shipped(model: Path | None) -> Path:
    """The model that was named; without one the shipped one, of which a line on stderr says what it is good for."""
    if model is not None:
        return model
    folder = small_folder()
    print(f"no --model: the small one that comes with yuanmoe completes Python ({folder / CARD})", file=sys.stderr)
    return folder
