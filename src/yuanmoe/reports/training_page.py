"""The report of a training run, as one HTML file that needs nothing else: made of what the run's folder holds.

Curves are inline SVG of at most `POINTS` points, so that the file of a long run stays small. Not here: the numbers
(`train/steps/meter.py`), how a heat map is drawn (`page.py`).
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from yuanmoe.reports.routing_page import document, heat_map
from yuanmoe.storage.run_folder import ENVIRONMENT, RECIPE, SAMPLES, read_lines, read_metrics
from yuanmoe.storage.whole_file import write_synced
from yuanmoe.units import format_count

REPORT = "report.html"
POINTS = 800
WIDTH, HEIGHT, LEFT, BOTTOM = 760, 200, 62, 22
COLOURS = ("#3f8fbf", "#c2571a", "#4a9a5b", "#8a5fb0")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b2733 }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem }
p { color: #51606e; margin: .2rem 0 .6rem } .big { font-size: 1.2rem; color: #1b2733 }
svg { width: 100%; height: auto; display: block } svg.load text { font-size: .62px; fill: #51606e }
svg text.r { text-anchor: end } svg text.c { text-anchor: middle } svg.curve text { font-size: 11px; fill: #51606e }
svg.load { max-width: 48rem } polyline { fill: none; stroke-width: 1.6 } line { stroke: #dde4ea }
pre { background: #f3f6f9; padding: .6rem; overflow-x: auto; white-space: pre-wrap; margin: .3rem 0 }
pre b { color: #3f8fbf; font-weight: 600 } table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .1rem .7rem .1rem 0; text-align: left; vertical-align: top } td.n, th.n { text-align: right }
details { border-top: 1px solid #dde4ea; padding: .5rem 0 } summary { cursor: pointer }
"""


class Series(NamedTuple):
    """A named curve over steps."""

    name: str
    points: list[tuple[float, float]]


def write_run_page(folder: Path) -> Path:
    """Writes the report of the run in `folder` beside its numbers."""
    write_synced(folder / REPORT, run_page(folder))
    return folder / REPORT


def run_page(folder: Path) -> str:
    """The report of the run in `folder`, which has at least one step."""
    recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    lines = read_metrics(folder)
    parts = [
        f"<h1>{escape(folder.absolute().name)}</h1>",
        f'<p class="big">{_headline(lines)}</p>',
        *_figure("Loss", "Nats a token: mean of the last steps, and on held-out text.", _losses(lines)),
        *_figure("Learning rate", "", [_series("learning rate", lines, "learning_rate")]),
        *_figure(
            "Throughput", "Tokens a second, mean of the last steps.", [_series("tokens/s", lines, "tokens_per_s")]
        ),
        *_figure("Gradient norm", "Before clipping.", [_series("norm", lines, "gradient_norm")]),
        *_experts(lines),
        *_samples(read_lines(folder / SAMPLES)),
        *_table("Recipe", {f"{s}.{key}": value for s, fields in recipe.items() for key, value in fields.items()}),
        *_table("Environment", environment),
    ]
    return document(folder.absolute().name, parts, style=_STYLE)


def _headline(lines: Sequence[dict[str, Any]]) -> str:
    last = lines[-1]
    bits = [line["heldout_bits_per_byte"] for line in lines if "heldout_bits_per_byte" in line]
    heldout = f", {bits[-1]:.3f} bits a byte on held-out text" if bits else ""
    loss = f"loss {last['recent_loss']:.3f}" if "recent_loss" in last else "no learned token"
    return (
        f"{last['step']:,} steps, {last['tokens']:,} tokens in {last['elapsed_s']:,.0f} s: "
        f"{loss}{heldout}, {last['tokens_per_s']:,.0f} tokens/s, "
        f"{format_count(last['flops_per_s'], 'FLOP/s')}"
    )


def _losses(lines: Sequence[dict[str, Any]]) -> list[Series]:
    return [_series("training", lines, "recent_loss"), _series("held out", lines, "heldout_loss")]


def _series(name: str, lines: Sequence[dict[str, Any]], key: str) -> Series:
    points = [(line["step"], line[key]) for line in lines if key in line]
    return Series(name, points[:: -(-len(points) // POINTS) or 1])


def _figure(title: str, caption: str, series: Sequence[Series]) -> list[str]:
    drawn = [each for each in series if each.points]
    return [f"<h2>{title}</h2>", f"<p>{caption}</p>", chart(drawn)] if drawn else []


def chart(series: Sequence[Series]) -> str:
    """The curves in one frame that holds all of them, with their ends and extremes on the axes."""
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
    wide, high = (x1 - x0) or 1.0, (y1 - y0) or 1.0

    def place(x: float, y: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - 8) * (x - x0) / wide:.1f},{8 + (HEIGHT - 8) * (1 - (y - y0) / high):.1f}"

    drawing = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 8 + (HEIGHT - 8) * (1 - share)
        drawing.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawing.append(f'<text class="r" x="{LEFT - 6}" y="{y + 4:.1f}">{y0 + share * (y1 - y0):.4g}</text>')
        x = LEFT + (WIDTH - LEFT - 8) * share
        drawing.append(f'<text class="c" x="{x:.1f}" y="{HEIGHT + 16}">{x0 + share * (x1 - x0):,.0f}</text>')
    for (_, points), colour in zip(series, COLOURS, strict=False):
        drawing.append(f'<polyline stroke="{colour}" points="{" ".join(place(*point) for point in points)}"/>')
        ends = place(*points[-1]).split(",")
        drawing.append(f'<circle cx="{ends[0]}" cy="{ends[1]}" r="3" fill="{colour}"/>')
    for row, (name, colour) in enumerate(zip([each.name for each in series], COLOURS, strict=False)):
        y = 22 + 14 * row
        drawing.append(f'<text class="r" style="fill:{colour}" x="{WIDTH - 14}" y="{y}">{escape(name)}</text>')
    return f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT + BOTTOM}">{"".join(drawing)}</svg>'


def _experts(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The load of every expert at the last milestone, and what it says of each layer."""
    loads = [line["load"] for line in lines if line.get("load")]
    if not loads:
        return []
    shares = [[count / sum(layer) for count in layer] for layer in loads[-1]]
    rows = "".join(
        f'<tr><td class="n">{place}</td><td class="n">{layer["max_over_mean"]:.2f}</td>'
        f'<td class="n">{layer["coefficient_of_variation"]:.2f}</td><td class="n">{layer["entropy"]:.2f}</td>'
        f'<td class="n">{layer["effective_experts"]:.1f}</td><td class="n">{layer["dead_experts"]}</td></tr>'
        for place, layer in enumerate(lines[-1]["balance"])
    )
    heads = ("layer", "busiest, of even", "variation", "entropy, nats", "in effect", "dead")
    return [
        "<h2>Load of every expert</h2>",
        "<p>In the steps before the last milestone. Rows are layers with experts, columns experts; the darker, the "
        "more of the layer's choices.</p>",
        heat_map(shares, "load", rows=range(len(shares))),
        f"<table><tr>{''.join(f'<th class=n>{head}</th>' for head in heads)}</tr>{rows}</table>",
    ]


def _samples(samples: Sequence[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    steps = list(dict.fromkeys(sample["step"] for sample in samples))
    parts = ["<h2>Samples</h2>", "<p>The likeliest tokens after the beginnings in blue, as training went on.</p>"]
    for step in reversed(steps):
        texts = "".join(
            f"<pre><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</pre>"
            for sample in samples
            if sample["step"] == step
        )
        parts.append(
            f"<details{' open' if step == steps[-1] else ''}><summary>step {step:,}</summary>{texts}</details>"
        )
    return parts


def _table(title: str, values: dict[str, Any]) -> list[str]:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(json.dumps(value))}</code></td></tr>"
        for name, value in values.items()
    )
    return [f"<details><summary><b>{title}</b></summary><table>{rows}</table></details>"]
