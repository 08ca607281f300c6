"""The experts view: every token in the colour of its expert, and counts that are those of the routing data."""

import json
import re
import urllib.request
from collections import Counter

import pytest

TEXT = "def add(first, second):\n    return first + second\n\u6625\u5929\u6765\u4e86\n"


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture
def spoken(page, engine, ask):
    """The experts of every token of an answer, [T, L, K], as the engine chose them."""
    page.get_by_role("radio", name="Experts", exact=True).check()
    engine.script = [TEXT]
    ask(page, "code")
    prompt = len(engine.requests[0].prompt_ids)
    ids = engine.tokenizer.encode(TEXT)
    return [engine.experts(token_id, prompt + at) for at, token_id in enumerate(ids)]


def numbers(page):
    return [int(value) for value in page.locator(".token").evaluate_all("nodes => nodes.map((n) => n.dataset.number)")]


def look_at(page, layer):
    page.locator("#layer").fill({0: "0", 2: "1"}[layer])
    expect(page.locator("#layer-name")).to_have_text(str(layer))


def test_as_many_tokens_as_the_answer_has_each_with_its_expert(page, spoken):
    shown = page.locator(".token").all_inner_texts()
    assert len(shown) == len(spoken)
    # A token that only begins a character shows a dot; line breaks are marked.
    assert "".join(shown).replace("\u00b7", "").replace("\u21b5", "").replace("\n", "") == TEXT.replace("\n", "")
    for place, layer in enumerate((0, 2)):
        look_at(page, layer)
        for rank in (0, 1):
            page.locator("#rank").select_option(str(rank))
            assert numbers(page) == [token[place][rank] for token in spoken]
        # The weights fall, so the strongest is the first.
        page.locator("#rank").select_option("strongest")
        assert numbers(page) == [token[place][0] for token in spoken]
    background = "node => [node.dataset.expert, getComputedStyle(node).backgroundColor]"
    colours = {tuple(page.locator(".token").nth(at).evaluate(background)) for at in range(len(spoken))}
    assert len({colour for _, colour in colours}) == len({expert for expert, _ in colours}) > 3


def test_the_heat_map_counts_what_the_routing_says(page, served, spoken, ask):
    page.locator("#heat-values summary").click()
    counts = [Counter(expert for token in spoken for expert in token[place]) for place in (0, 1)]
    expect(page.locator("#heat-values tbody tr")).to_have_count(2)
    table = heat_table(page)
    assert table["0"] == [counts[0][expert] for expert in range(32)]
    assert table["2"] == [counts[1][expert] for expert in range(8)]
    # A second answer: the conversation is the sum, and the server knows of prompts and of everyone too.
    ask(page, "more")
    page.get_by_role("radio", name="Conversation", exact=True).check()
    expect(page.locator("#source-note")).to_have_text(re.compile("The answers shown"))
    assert sum(heat_table(page)["0"]) > 2 * len(spoken)
    page.get_by_role("radio", name="Server", exact=True).check()
    expect(page.locator("#source-note")).to_have_text(re.compile("everyone"))
    page.wait_for_timeout(150)
    with urllib.request.urlopen(f"{served.url}/v1/routing/stats") as response:
        stats = json.load(response)
    assert heat_table(page) == {str(layer["layer"]): layer["visits"] for layer in stats["layers"]}


def heat_table(page):
    rows = page.locator("#heat-values tbody tr").all_inner_texts()
    cells = [row.split("\t") for row in rows]
    return {row[0]: [int(value.replace(",", "")) for value in row[1:]] for row in cells}


def test_the_map_is_drawn_and_says_its_cells(page, spoken):
    heat = page.locator("#heat")
    heat.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    visits = Counter(expert for token in spoken for expert in token[1])
    share = visits[1] / visits.total()
    expect(page.locator("#heat-cell")).to_have_text(f"Layer 2, expert 1: {visits[1]} visits, {share:.1%}")
    shades = heat.evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const shades = new Set();
          for (let at = 0; at < data.length; at += 4) shades.add(data.slice(at, at + 3).join());
          return shades.size;
        }"""
    )
    assert shades > 5
    page.keyboard.press("Enter")
    lit = [number == 1 for number in numbers(page)]
    assert page.locator(".token").evaluate_all("nodes => nodes.map((n) => !n.classList.contains('dim'))") == lit


def test_load_and_balance_are_those_of_the_layer(page, spoken):
    look_at(page, 2)
    visits = Counter(expert for token in spoken for expert in token[1])
    bars = page.locator("#load button")
    expect(bars).to_have_count(8)
    for expert in range(8):
        expect(bars.nth(expert)).to_have_attribute(
            "aria-label", f"Expert {expert}: {visits[expert]} visits, {visits[expert] / visits.total():.1%}"
        )
    figures = page.locator("#load-figures").inner_text()
    assert f"{len(visits)}/8 experts used" in figures
    assert f"{max(visits.values()) * 8 / visits.total():.1f} times the mean" in figures
    page.locator("#layers summary").click()
    assert page.locator("#layers tbody th").all_inner_texts() == ["0", "2"]
    bars.nth(3).click()
    expect(bars.nth(3)).to_have_attribute("aria-pressed", "true")


def test_a_token_says_its_experts_in_every_layer(page, spoken):
    page.locator(".token").nth(2).hover()
    card = page.locator("#token-card")
    assert card.locator("li").count() == 2
    for place in (0, 1):
        said = card.locator("li").nth(place).locator(".swatch").all_inner_texts()
        assert said == [str(expert) for expert in spoken[2][place]]
        shares = re.findall(r"(\d+)%", card.locator("li").nth(place).inner_text())
        assert abs(sum(map(int, shares)) - 100) <= 1
    assert "% likely" in card.inner_text()
    page.mouse.move(2, 2)
    expect(card).to_be_hidden()
    # The same by keyboard: one stop for Tab, arrows inside.
    page.locator(".tokens [tabindex='0']").focus()
    page.keyboard.press("End")
    expect(card).to_be_visible()
    assert page.evaluate("document.activeElement.dataset.at") == str(len(spoken) - 1)
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()


def test_the_meter_counts_with_the_servers_numbers(page, served, spoken):
    with urllib.request.urlopen(f"{served.url}/v1/info") as response:
        gflop = json.load(response)["gflop_per_token"]
    prompt = len(served.engine.requests[0].prompt_ids)
    tokens = prompt + len(spoken) + 1
    note = page.locator("#meter .note")
    expect(note).to_contain_text(f"{tokens} tokens")
    spent = {row.get_attribute("data-model"): row.locator("b").inner_text() for row in page.locator(".meter-row").all()}
    assert float(spent["llama"].split()[0]) == pytest.approx(tokens * gflop["llama3_70b"] / 1000, rel=0.01)
    assert spent["llama"].endswith("TFLOP")
    assert float(spent["own"].split()[0]) == pytest.approx(tokens * gflop["this"] * 1000, rel=0.01)
    assert spent["own"].endswith("MFLOP")


def test_colours_of_32_experts_are_readable_and_apart(page):
    found = page.evaluate(
        """() => {
          const rgb = (colour) => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
            const context = canvas.getContext("2d", { willReadFrequently: true });
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const found = {};
          for (const theme of ["light", "dark"]) {
            document.documentElement.dataset.theme = theme;
            const node = document.body.appendChild(document.createElement("span"));
            node.className = "token";
            found[theme] = Array.from({ length: 32 }, (_, expert) => {
              node.dataset.expert = expert;
              const style = getComputedStyle(node);
              return [style.borderBottomColor, style.backgroundColor, style.color].map(rgb);
            });
            node.remove();
          }
          return found;
        }"""
    )
    for pairs in found.values():
        # Text stands on a tint, and in the bars and cards on the colour itself.
        assert min(contrast(tint, ink) for _, tint, ink in pairs) >= 7
        assert min(contrast(colour, ink) for colour, _, ink in pairs) >= 4.5
        places = [oklab(colour) for colour, _, _ in pairs]
        gaps = [distance(one, other) for at, one in enumerate(places) for other in places[:at]]
        # Colours 0.02 apart in OKLab are just told from one another side by side.
        assert min(gaps) > 0.07


def linear(rgb):
    return [value / 3294.6 if value <= 10.31475 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb]


def contrast(one, other):
    """WCAG 2.2's ratio."""
    lights = sorted(sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def oklab(rgb):
    r, g, b = linear(rgb)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5
