"""The report of where a text's tokens went, as one HTML file that needs nothing else: no server, no other file.

Heat maps are inline SVG, one path for each shade, so that 24 layers of 32 x 32 experts stay small; the numbers behind
them are in the page as JSON, where pointing at a cell finds them, and programs too. Not here: the numbers (`routing`).
"""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

SHADES = 16
_ANCHORS = ((0xF3, 0xF6, 0xF9), (0x3F, 0x8F, 0xBF), (0x08, 0x1D, 0x44))

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1b2733 }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem }
p, figcaption { color: #51606e; margin: .2rem 0 .6rem } figure { margin: 0 0 1rem; flex: 1 1 24rem; max-width: 32rem }
.maps { display: flex; flex-wrap: wrap; gap: 2rem } svg { width: 100%; height: auto; display: block }
svg.load { max-width: 60rem } svg text { font-size: .62px; fill: #51606e } svg text.r { text-anchor: end }
svg text.c { text-anchor: middle } details { border-top: 1px solid #dde4ea; padding: .5rem 0 }
summary { cursor: pointer } summary b { display: inline-block; min-width: 5rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem } td, th { padding: .15rem .5rem; text-align: left }
td.n, th.n { text-align: right } tr:nth-child(even) { background: #f6f8fa } .big { font-size: 1.2rem; color: #1b2733 }
code { background: #e9eef3; border-radius: 3px; padding: 0 .25em; white-space: pre-wrap }
.bar { display: inline-block; height: .7em; background: #3f8fbf; vertical-align: baseline; margin-right: .4em }
#tip { position: fixed; pointer-events: none; background: #1b2733; color: #fff; padding: .2rem .5rem;
  border-radius: 4px; font-size: .85rem; display: none }
"""

# Which cell the pointer is on follows from the drawing: a margin of 2 units, then one unit a cell.
_SCRIPT = """
const report = JSON.parse(document.getElementById("report").textContent);
const tip = document.getElementById("tip");
const said = {
  load: (row, column, value) => `layer ${report.layers[row].layer}, expert ${column}: ${(100 * value).toFixed(2)} %`,
  together: (row, column, value) => `${(100 * value).toFixed(1)} % of expert ${row}'s tokens also went to ${column}`,
  relations: (row, column, value) => `expert ${row} regards ${column}: ${value.toFixed(4)}`,
};
for (const svg of document.querySelectorAll("svg")) {
  const { map, layer } = svg.dataset;
  const values = layer ? report.layers[layer].matrices[map] : report.layers.map((each) => each.load);
  svg.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  svg.addEventListener("mousemove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const row = Math.floor(at.y) - 2, column = Math.floor(at.x) - 2;
    const value = values[row]?.[column];
    tip.style.display = value === undefined ? "none" : "block";
    if (value === undefined) return;
    tip.textContent = said[map](row, column, value);
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
}
"""


def page(report: dict[str, Any]) -> str:
    """The whole file. `report` is what `yuanmoe inspect` prints, with the `matrices` of every layer."""
    layers = report["layers"]
    loads = heat_map([layer["load"] for layer in layers], "load", rows=[layer["layer"] for layer in layers])
    parts = [
        f"<h1>Where the tokens of {escape(report['text'])} went</h1>",
        f"<p>in {escape(report['model'])}</p>",
        f'<p class="big">{headline(report)}</p>',
        "<h2>Load of every expert</h2>",
        "<p>Rows are layers, columns experts; the darker, the more of the layer's choices.</p>",
        loads,
        "<h2>Layer by layer</h2>",
        *(_layer(index, layer) for index, layer in enumerate(layers)),
    ]
    title = f"{report['text']} in {report['model']}"
    return document(title, parts, style=_STYLE, data=report, script=_SCRIPT)


def document(title: str, parts: Sequence[str], *, style: str, data: Any = None, script: str = "") -> str:
    """A whole file of these parts, which asks nobody for anything; `data` is for `script`, and for programs."""
    # "<" could end the script element.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{chr(10).join(parts)}
<div id="tip"></div>
<script type="application/json" id="report">{text}</script>
<script>{script}</script>
</body>
</html>
"""


def headline(report: dict[str, Any]) -> str:
    """The text's likelihood in a line."""
    return (
        f"{report['tokens']:,} tokens, {report['bytes']:,} bytes: perplexity {report['perplexity']:,.2f}, "
        f"{report['bits_per_byte']:.3f} bits a byte"
    )


def _layer(index: int, layer: dict[str, Any]) -> str:
    matrices = layer["matrices"]
    figures = [
        _figure(index, "together", matrices["together"], "Together: the share of a row's tokens that a column had too")
    ]
    if matrices["relations"]:
        caption = "Expert correlation: how much a row's expert regards a column's, averaged over tokens"
        figures.append(_figure(index, "relations", matrices["relations"], caption))
    rows = "".join(
        _expert(expert, share, max(layer["load"]), layer["favourites"][expert])
        for expert, share in enumerate(layer["load"])
    )
    dead = f", {len(layer['dead_experts'])} without a token" if layer["dead_experts"] else ""
    return (
        f"<details{' open' if index == 0 else ''}><summary><b>Layer {layer['layer']}</b> "
        f"{layer['effective_experts']:.1f} of {layer['experts']} experts in effect{dead}, the busiest has "
        f"{layer['max_over_mean']:.1f} times the mean</summary>"
        f'<div class="maps">{"".join(figures)}</div>'
        '<table><tr><th class="n">expert</th><th>load</th><th>tokens beyond chance</th></tr>'
        f"{rows}</table></details>"
    )


def _figure(index: int, name: str, matrix: list[list[float]], caption: str) -> str:
    legend = f"{caption}; the darkest is {max(map(max, matrix)):.2f}"
    return f"<figure>{heat_map(matrix, name, layer=index)}<figcaption>{legend}</figcaption></figure>"


def _expert(expert: int, share: float, most: float, favourites: list[dict[str, Any]]) -> str:
    tokens = " ".join(
        f'<code title="{token["tokens"]} times, {token["times_chance"]} times chance">'
        f"{escape(visible_token(token['token']))}</code>"
        for token in favourites
    )
    bar = f'<span class="bar" style="width:{6 * share / most:.2f}em"></span>'
    return f'<tr><td class="n">{expert}</td><td>{bar}{share:.1%}</td><td>{tokens}</td></tr>'


def heat_map(
    values: Sequence[Sequence[float]], name: str, *, layer: int | None = None, rows: Sequence[int] | None = None
) -> str:
    """`values` as shades from 0 to the largest; `rows` names the rows, by default by number."""
    most = max(max(row) for row in values) or 1.0
    cells: list[list[str]] = [[] for _ in range(SHADES)]
    for y, row in enumerate(values, start=2):
        for x, value in enumerate(row, start=2):
            cells[min(SHADES - 1, int(SHADES * value / most))].append(f"M{x} {y}h1v1h-1z")
    paths = [f'<path fill="{_colour(shade)}" d="{"".join(each)}"/>' for shade, each in enumerate(cells) if each]
    height, width = len(values), max(len(row) for row in values)
    every = 1 if width <= 16 else 4
    columns = [f'<text class="c" x="{x + 2.5}" y="1.7">{x}</text>' for x in range(0, width, every)]
    named = enumerate(range(height) if rows is None else rows)
    step = every if rows is None else 1
    names = [f'<text class="r" x="1.7" y="{y + 2.72}">{label}</text>' for y, label in named if y % step == 0]
    place = "" if layer is None else f' data-layer="{layer}"'
    drawing = "".join([*columns, *names, *paths])
    return f'<svg class="{name}" data-map="{name}"{place} viewBox="0 0 {width + 2.5} {height + 2.5}">{drawing}</svg>'


def visible_token(token: str) -> str:
    """A token's text with whitespace that can be seen."""
    return token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r").replace(" ", "\u00b7")


def _colour(shade: int) -> str:
    """From nearly white through blue to nearly black."""
    place = 2 * shade / (SHADES - 1)
    lower, upper = _ANCHORS[:2] if place <= 1 else _ANCHORS[1:]
    part = place if place <= 1 else place - 1
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(lower, upper, strict=True))
