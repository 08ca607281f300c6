"""`yuanmoe adapter`: what LoRA learned, looked at, merged into the weights that it corrects, or written for PEFT.

Making one is `yuanmoe train m32-lora`, using one `--adapter DIR` of the commands that answer.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from yuanmoe.cli.terminal.models import FullPrecisionBase
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.cli.terminal.progress import bytes_progress
from yuanmoe.config import ModelConfig
from yuanmoe.model.lora.targets import LoraSettings, Shape, lora_role_of, num_parameters, targets
from yuanmoe.plan import cost
from yuanmoe.units import format_count, format_size

adapter = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What LoRA learned.")

Source = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of an adapter, such as a run's checkpoint.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DST, once the new one is whole.")]


@adapter.command()
def show(source: Source, json_only: Json = False) -> None:
    """What it adapts, with how many parameters, and which base it belongs to."""
    from yuanmoe.checkpoint.adapters.adapter import adapted_shapes, open_adapter

    opened = open_adapter(source)
    shapes = adapted_shapes(opened)
    console = people()
    console.print(f"{source}: an adapter of {opened.base.name}, fingerprint {opened.base.fingerprint[:12]}")
    _print_table(console, shapes, opened.settings)
    print_result(
        {
            "command": "adapter show",
            "adapter": str(source),
            "base": opened.base.name,
            "fingerprint": opened.base.fingerprint,
            "rank": opened.settings.rank,
            "scale": opened.settings.scale,
            "roles": list(opened.settings.roles),
            "parameters": sum(num_parameters(shape, opened.settings.rank) for shape in shapes.values()),
        },
        json_only,
    )


@adapter.command()
def merge(
    source: Source,
    dst: Target,
    model: FullPrecisionBase,
    overwrite: Overwrite = False,
    json_only: Json = False,
) -> None:
    """Write the base with the adapter in its weights. Interrupted, it goes on where it was when called again."""
    from yuanmoe.checkpoint.adapters.merge import merge_adapter

    console = people()
    with bytes_progress(f"{model.name} + {source.name} -> {dst.name}") as progress:
        written = merge_adapter(model, source, dst, overwrite=overwrite, progress=progress, say=console.print)
    console.print(f"{dst}: {written.tensors} tensors, {format_size(written.nbytes)} in {written.shards} files")
    print_result(
        {"command": "adapter merge", "path": str(written.path), "tensors": written.tensors, "bytes": written.nbytes},
        json_only,
    )


@adapter.command("export-peft")
def write_peft(
    source: Source,
    dst: Target,
    base: Annotated[str | None, typer.Option(help="Directory or hub name where PEFT finds the base model.")] = None,
    overwrite: Overwrite = False,
    json_only: Json = False,
) -> None:
    """Write it in PEFT's format, for PEFT over `yuanmoe.hf`; experts and routers become target_parameters."""
    from yuanmoe.checkpoint.adapters.adapter import open_adapter
    from yuanmoe.checkpoint.adapters.peft import export_peft as export

    path = export(open_adapter(source), dst, base=base, overwrite=overwrite)
    people().print(f"{dst}: load it with peft.PeftModel.from_pretrained over yuanmoe.hf.YuanForCausalLM")
    print_result({"command": "adapter export-peft", "path": str(path)}, json_only)


def num_adapted(config: ModelConfig, settings: LoraSettings) -> int:
    """What learns in a model of that configuration."""
    from yuanmoe.checkpoint.adapters.adapter import adaptable_matrices

    shapes = targets(adaptable_matrices(config), settings)
    return sum(num_parameters(shape, settings.rank) for shape in shapes.values())


def print_adapted(console: Console, config: ModelConfig, settings: LoraSettings) -> None:
    """What is attached to a model, and what share of it learns."""
    from yuanmoe.checkpoint.adapters.adapter import adaptable_matrices

    _print_table(console, targets(adaptable_matrices(config), settings), settings)
    learned, whole = num_adapted(config, settings), sum(cost.parameters(config).values())
    console.print(f"  {learned:,} parameters learn beside {format_count(whole)} frozen ones: {learned / whole:.2%}\n")


def _print_table(console: Console, shapes: dict[str, Shape], settings: LoraSettings) -> None:
    """Matrices and parameters of each role; a stack of experts counts as many matrices as it has."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("role", "matrices", "parameters"):
        table.add_column(name, justify="left" if name == "role" else "right")
    for role in settings.roles:
        members = [shape for name, shape in shapes.items() if lora_role_of(name) == role]
        matrices = sum(shape[0] if len(shape) == 3 else 1 for shape in members)
        parameters = sum(num_parameters(shape, settings.rank) for shape in members)
        table.add_row(role, f"{matrices:,}", f"{parameters:,}")
    frozen = "" if settings.router else ", routers frozen"
    console.print(f"LoRA of rank {settings.rank}, scale {settings.scale:g}{frozen}")
    console.print(table)
