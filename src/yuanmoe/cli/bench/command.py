"""`yuanmoe bench`: how fast this machine runs a model, beside its peers and its bounds."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from yuanmoe.cli.bench.view import print_decode, print_phase
from yuanmoe.cli.terminal.models import QuantizedModel
from yuanmoe.cli.terminal.output import Json, people, print_result
from yuanmoe.errors import UsageError

if TYPE_CHECKING:
    from yuanmoe.bench.decode import DecodeSettings
    from yuanmoe.config import ModelConfig
    from yuanmoe.model.decoder import CausalLM
    from yuanmoe.plan.cost import Precision

bench = typer.Typer(
    help="Measure speed side by side with peers and with what the machine can do.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 takes all cores.")]
Record = Annotated[
    Path | None,
    typer.Option("--record", metavar="DIR", help="Write the result there too, with machine, date and this command."),
]
Runs = Annotated[int, typer.Option(min=1, help="Counted runs of each contender.")]


@bench.command()
def layers(
    preset: Annotated[str, typer.Option(help="Whose layer sizes.")] = "yuan2-m32",
    layers: Annotated[int, typer.Option(min=1, help="How many of its layers.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the prefill.")] = 256,
    runs: Runs = 5,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = 0,
    peer: Annotated[bool, typer.Option(help="Run transformers' Mixtral of the same sizes beside.")] = True,
    record_in: Record = None,
    json_only: Json = False,
) -> None:
    """Prefill and single-token decode of a few layers at full width, side by side with transformers' Mixtral.

    Contenders take turns in one run; every figure is a median with the slowest and fastest run. Needs memory for
    the layers: 6.5 GiB for two of M32's in bfloat16.
    """
    import torch

    from yuanmoe.bench.layers import compare_layers
    from yuanmoe.checkpoint.formats.native_config import parse_dtype
    from yuanmoe.checkpoint.load import usable_device
    from yuanmoe.plan.device.machine import measure_bandwidth, usable_cores
    from yuanmoe.presets import preset as named

    device = str(usable_device(device))
    torch.set_num_threads(threads or usable_cores())
    console = people()
    with console.status("building layers") as status:
        result = compare_layers(
            named(preset),
            num_hidden_layers=layers,
            prompt_tokens=prompt_tokens,
            runs=runs,
            dtype=parse_dtype(dtype),
            device=device,
            peer=peer,
            on_run=lambda name, seconds: status.update(f"{name}: {seconds * 1e3:.1f} ms"),
        )
    if device == "cpu":
        bandwidth = measure_bandwidth()
        result["read_bytes_per_s"] = asdict(bandwidth)
        bytes_per_s = result["decode_bytes"] / result["decode"]["yuanmoe"]["median_s"]
        result["decode"]["share_of_read_bandwidth"] = bytes_per_s / bandwidth.median
    result |= {"preset": preset, "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for phase in () if json_only else ("prefill", "decode"):
        print_phase(console, phase, result)
    _record(record_in, "layers", result)
    print_result(result, json_only)


@bench.command()
def decode(
    preset: Annotated[str, typer.Option(help="Whose sizes.")] = "yuan2-m32",
    model: QuantizedModel = None,
    weights: Annotated[
        Literal["synthetic"], typer.Option(help="Of a preset: random ones, made in the packed layout.")
    ] = "synthetic",
    bits: Annotated[int, typer.Option(help="4 or 8, of a preset.")] = 4,
    layers: Annotated[int | None, typer.Option(min=1, help="How many of the preset's layers; default: all.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens before the one that is decoded.")] = "16,512,2048",
    batch: Annotated[str, typer.Option(help="Sequences at once; those after the first at the shortest context.")] = "1",
    prompts: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "32,128,512",
    kv_dtype: Annotated[Literal["bf16", "int8"], typer.Option(help="Of keys and values.")] = "bf16",
    runs: Runs = 5,
    threads: Threads = 0,
    peer: Annotated[bool, typer.Option(help="Measure torch's int4 products of the same shapes beside.")] = True,
    record_in: Record = None,
    json_only: Json = False,
) -> None:
    """Decoding and prefill of a whole quantized model, beside this machine's read bandwidth and 8-bit arithmetic.

    Everything in one run, medians with the slowest and fastest run. Memory is looked at before it is taken: M32 in 4
    bits needs 21 GiB.
    """
    import torch

    from yuanmoe.bench.decode import DecodeSettings, beside_torch, measure_decode
    from yuanmoe.checkpoint.formats.packed_weight import quantization_record
    from yuanmoe.ops import native
    from yuanmoe.plan.device.machine import read_machine, usable_cores

    torch.set_num_threads(threads or usable_cores())
    load = DecodeSettings(
        contexts=_numbers("--contexts", contexts),
        batches=_numbers("--batch", batch),
        prompts=_numbers("--prompts", prompts),
        kv_dtype=torch.int8 if kv_dtype == "int8" else torch.bfloat16,
        runs=runs,
    )
    subject = _checkpoint(model) if model else _synthetic(preset, bits, layers, load)
    beside = {}
    console = people()
    with console.status("building weights") as status:
        show: Callable[[str, float], None] = lambda name, s: status.update(f"{name}: {s * 1e3:.1f} ms")  # noqa: E731
        report = measure_decode(subject.build(), subject.precision, load, show)
        if peer and native.available():
            status.update("torch's int4 products")
            sizes = {"decode": 1, "prefill": max(load.prompts)}
            beside = {phase: beside_torch(subject.config, tokens, runs) for phase, tokens in sizes.items()}
    machine = read_machine()
    roles = quantization_record(subject.config, subject.precision, weights)["roles"]
    result = {
        "model": str(model or preset),
        "weights": "checkpoint" if model else weights,
        "bits": min(roles.values()),
        "role_bits": roles,
        "layers": subject.config.num_hidden_layers,
        "kv_dtype": kv_dtype,
        "threads": torch.get_num_threads(),
        "variant": native.variant(),
        "torch": torch.__version__,
        "cpu": machine.cpu,
        "load": machine.load,
        **report,
        "beside_torch_int4": beside,
    }
    if not json_only:
        print_decode(console, result)
    _record(record_in, "decode", result)
    print_result(result, json_only)


@bench.command()
def table(
    pages: Annotated[list[Path], typer.Argument(help="Pages with marks where the table is; *_zh in Chinese.")],
    measurements: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path("docs/measurements"),
    json_only: Json = False,
) -> None:
    """Write the table of measurements into pages, from the files that --record writes."""
    from yuanmoe.bench.record import write_table

    if not measurements.is_dir():
        raise UsageError(f"there is no folder {measurements}; name that of the measurements with --measurements")
    changed = [str(page) for page in pages if write_table(page, measurements)]
    people().print(f"changed: {', '.join(changed) or 'nothing'}", soft_wrap=True, markup=False)
    print_result({"command": "bench table", "changed": changed}, json_only)


def _record(folder: Path | None, name: str, result: dict[str, Any]) -> None:
    if folder is None:
        return
    from yuanmoe.bench.record import record

    file = record(folder, name, shlex.join(["yuanmoe", *sys.argv[1:]]), result)
    people().print(f"recorded in {file}", soft_wrap=True, markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is measured, before it takes memory."""

    config: "ModelConfig"
    precision: "Precision"
    build: "Callable[[], CausalLM]"


def _checkpoint(path: Path) -> _Subject:
    from yuanmoe.checkpoint.load import load_model
    from yuanmoe.checkpoint.open import open_checkpoint

    source = open_checkpoint(path)
    if source.precision is None:
        raise UsageError(f"{path} is not quantized; quantize it first: yuanmoe quantize {path} NEW --bits 4")
    return _Subject(config=source.config, precision=source.precision, build=lambda: load_model(path))


def _synthetic(name: str, bits: int, layers: int | None, load: "DecodeSettings") -> _Subject:
    from yuanmoe.bench.decode import check_decode_settings
    from yuanmoe.bench.synthetic import synthetic_model
    from yuanmoe.checkpoint.formats.packed_weight import policy
    from yuanmoe.presets import preset as named

    config = named(name) if layers is None else named(name, num_hidden_layers=layers)
    precision = policy(config, bits)
    check_decode_settings(name, config, precision, load)
    return _Subject(config=config, precision=precision, build=lambda: synthetic_model(config, precision))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`16,512`: at least one number, each at least 1. Raises UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text!r} is not a list of numbers from 1 on; write it like 16,512")
    return tuple(int(part) for part in parts)
