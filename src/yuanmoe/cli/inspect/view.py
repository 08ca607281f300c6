"""The reports of `yuanmoe inspect` as tables on a terminal; they are the same JSON objects that it prints."""

import math
from typing import Any

from rich.markup import escape

from yuanmoe.cli.terminal.output import people, print_table

# From an eighth of a character's height to all of it; nothing for an expert without a token.
_BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def show_rope(report: dict[str, Any]) -> None:
    """Every setting, and the verdict in words."""
    console = people()
    configured = report["configured"]
    rows = []
    for row in report["settings"]:
        own = all(row[key] == configured[key] for key in configured)
        error = row["standard_error_nats"]
        rows.append(
            (
                f"base {row['rope_theta']:.10g}, {row['rope_angles']} angles" + (" (config.json)" if own else ""),
                f"{row['perplexity']:,.3f}",
                f"{row['nats_per_token']:.4f}",
                f"{row['behind_best_nats']:.4f}",
                "?" if error is None else f"{error:.4f}",
            )
        )
    print_table(console, _title(report), ("", "perplexity", "nats a token", "behind the best", "+-"), rows)
    verdict = report["verdict"]
    console.print(f"[bold]{verdict['text']}[/]")
    if verdict["more_tokens"] and report["tokens"] < report["text_tokens"]:
        wanted = min(report["text_tokens"], report["tokens"] + verdict["more_tokens"])
        console.print(f"The text has {report['text_tokens']:,}: try --tokens {wanted}.")
    wanted, own = verdict["rope_theta"], configured["rope_theta"]
    if wanted not in (None, own):
        command = f"yuanmoe convert {escape(report['model'])} NEW --rope-theta {wanted:.10g}"
        console.print(f"config.json says {own:.10g}. To change it: {command}")


def show_routing(report: dict[str, Any], layer: int | None) -> None:
    """The text's likelihood, the load of every layer, and the experts of one; by default of the middle one."""
    console = people()
    bits = f"{report['bits_per_byte']:.3f} bits a byte"
    console.print(f"[bold]{_title(report)}[/]\nperplexity {report['perplexity']:,.3f}, {bits}\n")
    layers = report["layers"]
    if not layers:
        console.print("No layer of this model has experts.")
        return
    print_table(
        console,
        "Load of the experts",
        ("layer", "experts", "in effect", "busiest", "spread", "idle", "first", "each expert's share", "most together"),
        [_load_row(each) for each in layers],
        left=(0, 7, 8),
    )
    console.print(
        "in effect: as many equally busy ones would be as hard to guess (exp of the entropy). busiest: times the mean. "
        "spread: standard deviation over mean.\nidle: without a token. first: mean weight of a token's first expert. "
        "most together: two experts that shared tokens most beyond chance.\n"
    )
    chosen = layers[len(layers) // 2] if layer is None else next(each for each in layers if each["layer"] == layer)
    print_table(
        console,
        f"Experts of layer {chosen['layer']}",
        ("expert", "load", "works with", "regards", "tokens beyond chance"),
        [_expert_row(chosen, expert) for expert in range(chosen["experts"])],
        left=(0, 4),
    )


def _title(report: dict[str, Any]) -> str:
    part = "" if report["tokens"] == report["text_tokens"] else f" of {report['text_tokens']:,}"
    return f"{escape(report['text'])}: {report['tokens']:,}{part} tokens, in windows of {report['context']:,}"


def _load_row(layer: dict[str, Any]) -> tuple[str, ...]:
    most = max(layer["load"])
    bars = "".join(_BARS[math.ceil(8 * share / most)] for share in layer["load"])
    best = layer["pairs"][0] if layer["pairs"] else None
    return (
        str(layer["layer"]),
        str(layer["experts"]),
        f"{layer['effective_experts']:.1f}",
        f"{layer['max_over_mean']:.2f}",
        f"{layer['variation']:.2f}",
        str(len(layer["dead_experts"])),
        f"{layer['first_weight']:.2f}",
        bars,
        f"{best['experts'][0]} + {best['experts'][1]}: {best['times_chance']:.1f} x chance" if best else "",
    )


def _expert_row(layer: dict[str, Any], expert: int) -> tuple[str, ...]:
    together, relations = layer["matrices"]["together"][expert], layer["matrices"]["relations"]
    tokens = (escape(repr(token["token"])[1:-1]) for token in layer["favourites"][expert])
    return (
        str(expert),
        f"{layer['load'][expert]:.1%}",
        _largest(together, "{:.0%}"),
        "" if relations is None else _largest(relations[expert], "{:.3f}"),
        "  ".join(tokens),
    )


def _largest(row: list[float], form: str) -> str:
    place = max(range(len(row)), key=row.__getitem__)
    return f"{place}: {form.format(row[place])}" if row[place] > 0 else ""
