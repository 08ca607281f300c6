"""Who can use the page: languages, themes, keyboard alone, a phone, and what assistive technology is told."""

import re
import urllib.error
import urllib.request

import pytest

from yuanmoe.serve.web.page import read_page

ASSETS = f"/v/{read_page().digest}"
LOOK_UP = f"async (language) => Object.entries((await import(`{ASSETS}/strings/${{language}}.js`)).default)"
CJK = re.compile("[\u4e00-\u9fff]")


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def test_both_languages_have_the_same_strings(page):
    english, chinese = (dict(page.evaluate(LOOK_UP, language)) for language in ("en", "zh"))
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        holes = re.findall(r"\{\w+\}", text)
        assert sorted(holes) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
        assert not CJK.search(text)
    same = {key for key, text in english.items() if not CJK.search(chinese[key])}
    assert same == {"setting.top_p", "setting.top_k", "setting.min_p", "meter.own", "meter.llama"}


def test_the_browsers_language_decides_and_can_be_changed(opened, served, engine, ask):
    page = opened(served.url, locale="zh-CN")
    expect(page.locator("#title")).to_have_text("\u65b0\u5bf9\u8bdd")
    assert page.locator("html").get_attribute("lang") == "zh-Hans"
    ask(page)
    page.locator("#language").select_option("en")
    expect(page.locator("#new-conversation")).to_have_text("New conversation")
    expect(page.locator(".answer").get_by_label("Answer again")).to_have_count(1)
    page.get_by_role("radio", name="Experts", exact=True).check()
    expect(page.locator("#meter .note")).to_contain_text("tokens read and written")
    assert not CJK.search(page.locator("body").inner_text().replace("\u4e2d\u6587", ""))
    page.reload()
    expect(page.locator("#new-conversation")).to_have_text("New conversation")


CACHING = {
    "/": ("text/html", "no-cache"),
    f"{ASSETS}/page.js": ("text/javascript", "public, max-age=31536000, immutable"),
    f"{ASSETS}/styles/base.css": ("text/css", "public, max-age=31536000, immutable"),
    f"{ASSETS}/icons.svg": ("image/svg+xml", "public, max-age=31536000, immutable"),
}


@pytest.mark.parametrize("path", CACHING)
def test_files_are_kept_for_good_and_the_document_may_load_nothing_else(served, path):
    with urllib.request.urlopen(served.url + path) as response:
        kind, caching = CACHING[path]
        assert response.headers["Content-Type"].split(";")[0] == kind
        assert response.headers["Cache-Control"] == caching
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


@pytest.mark.parametrize(
    "path", ["/page.js", "/v/0123456789abcdef/page.js", f"{ASSETS}/page.py", f"{ASSETS}/../app.py"]
)
def test_no_other_file_and_no_other_version_is_served(served, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(served.url + path)


def test_a_second_visit_asks_for_the_document_alone(browser, served):
    with browser.new_context() as context:
        page = context.new_page()
        for visit in ("first", "second"):
            page.goto(served.url)
            page.locator("#welcome p").first.wait_for()
            # What crossed the network has a size; what comes from the cache has none.
            loaded = page.evaluate("performance.getEntriesByType('resource').map((e) => [e.name, e.transferSize])")
            assert len(loaded) > 40
            sent = [url.removeprefix(served.url) for url, size in loaded if size]
            assert sent == ["/v1/info"] if visit == "second" else len(sent) > 40


def test_the_systems_theme_decides_and_can_be_changed(opened, served, engine):
    page = opened(served.url, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.locator("#theme").select_option("light")
    light = page.evaluate(paper)
    assert sum(map(int, re.findall(r"\d+", light))) > 3 * 230
    assert sum(map(int, re.findall(r"\d+", dark))) < 3 * 40
    page.reload()
    assert page.evaluate(paper) == light
    page.locator("#theme").select_option("system")
    assert page.evaluate(paper) == dark


def test_everything_is_reached_by_keyboard_and_shows_its_focus(page, engine, ask):
    engine.script = ["Some `code`:\n\n```\nx\n```\n"]
    # The page begins where one types.
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .prose pre")).to_have_count(1)
    assert page.locator(".bubble").inner_text() == "one\ntwo"
    page.get_by_role("radio", name="Experts", exact=True).check()
    page.get_by_role("radio", name="Chat", exact=True).check()
    page.evaluate("document.activeElement.blur()")
    seen = {}
    ends = 0
    while ends < 2:
        page.keyboard.press("Tab")
        name, visible = page.evaluate(
            """() => {
              const node = document.activeElement;
              const around = node.closest(".field") ?? node.nextElementSibling;
              const shows = (each) => {
                const { outlineStyle, boxShadow } = each ? getComputedStyle(each) : {};
                return each && (outlineStyle !== "none" || boxShadow !== "none");
              };
              return [node.id || node.name || node.ariaLabel || node.tagName, Boolean(shows(node) || shows(around))];
            }"""
        )
        ends += name == "BODY"
        if name != "BODY":
            seen[name] = visible
    wanted = {"new-conversation", "export", "import", "language", "theme", "view", "open-settings", "question", "PRE"}
    wanted |= {"Rename", "Delete", "Copy", "Edit", "Answer again", "Copy code"}
    assert wanted <= seen.keys()
    assert [name for name, visible in seen.items() if not visible] == []


def test_enter_that_ends_a_chinese_word_does_not_send(page, engine):
    page.locator("#question").fill("nihao")
    page.locator("#question").dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
    assert engine.requests == []
    page.locator("#question").press("Enter")
    expect(page.locator(".answer .prose")).to_have_text("Yes.")


def test_escape_stops_and_dialogs_give_the_focus_back(page, engine, ask):
    engine.script, engine.step_s = ["and so on " * 200], 0.01
    ask(page, wait=False)
    page.locator(".answer .prose p").wait_for()
    page.locator("#open-settings").click()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "open-settings"
    expect(page.locator(".ended")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.locator(".ended")).to_contain_text("Stopped")


AUDIT = """() => {
  const problems = [];
  const seen = (node) => node.checkVisibility({ visibilityProperty: true });
  const named = (node) =>
    node.ariaLabel || node.labels?.length || node.textContent.trim() || node.hasAttribute("aria-labelledby");
  const controls = "button, a[href], input, select, textarea, summary, [tabindex], dialog[open]";
  for (const node of document.querySelectorAll(controls)) {
    if (!seen(node)) continue;
    if (!named(node) && !node.matches(".scroll, pre, .token")) problems.push(`no name: ${node.outerHTML.slice(0, 90)}`);
    const box = node.getBoundingClientRect();
    if (node.matches("button, select") && !node.closest("table, #load") && Math.min(box.width, box.height) < 24) {
      problems.push(`too small: ${node.outerHTML.slice(0, 90)}`);
    }
  }
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push(`id twice: ${id}`);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const node of document.querySelectorAll(`[${name}]`)) {
      const target = document.getElementById(node.getAttribute(name));
      if (!target) problems.push(`${name} leads nowhere: ${node.outerHTML.slice(0, 90)}`);
    }
  }
  for (const node of document.querySelectorAll("[aria-hidden=true]")) {
    if (node.querySelector("button, a, input")) problems.push("a control is hidden from some");
  }
  for (const selector of ["main", "header", "h1", "html[lang]", "title"]) {
    if (document.querySelectorAll(selector).length !== 1) problems.push(`not one ${selector}`);
  }
  return problems;
}"""

CONTRASTS = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "white";
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const seen = node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!text || !seen || node.closest(":disabled, option, noscript")) continue;
    const [one, other] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${node.tagName}.${node.className} ${node.textContent}`);
  }
  return poor;
}"""


def test_names_sizes_and_contrast_in_every_view(page, engine, ask):
    engine.script, engine.break_after = (
        ["Text with a [link](https://a.example).\n\n> quote\n\n| a |\n|---|\n| b |\n", "More text."],
        None,
    )
    ask(page)
    engine.break_after = 3
    ask(page)
    page.locator("#heat-values").evaluate("node => (node.open = true)")
    for theme in ("light", "dark"):
        page.locator("#theme").select_option(theme)
        for view in ("Chat", "Experts"):
            page.get_by_role("radio", name=view, exact=True).check()
            page.wait_for_timeout(250)
            assert page.evaluate(AUDIT) == []
            assert page.evaluate(CONTRASTS) == []
        page.locator("#open-settings").click()
        assert page.evaluate(AUDIT) == []
        assert page.evaluate(CONTRASTS) == []
        page.keyboard.press("Escape")


def test_a_phone_scrolls_one_way_only(opened, served, engine, ask):
    phone = {"viewport": {"width": 375, "height": 667}, "has_touch": True, "is_mobile": True}
    page = opened(served.url, **phone)
    page.locator("#welcome p").wait_for()
    engine.script = ["x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n|" + " a |" * 40 + "\n|" + "-|" * 40 + "\n"]
    ask(page, "z" * 300)
    too_wide = (
        "[document.documentElement, document.querySelector('main')].some((node) => node.scrollWidth > node.clientWidth)"
    )
    assert not page.evaluate(too_wide)
    page.locator("#open-sidebar").tap()
    expect(page.locator("#sidebar")).to_be_in_viewport(ratio=1)
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.get_by_role("radio", name="Experts", exact=True).check()
    assert not page.evaluate(too_wide)
    page.locator(".token").nth(5).tap()
    box = page.locator("#token-card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    page.locator("#open-panel").tap()
    expect(page.locator("#heat")).to_be_in_viewport()
    page.locator("#close-panel").tap()
    expect(page.locator("#panel")).not_to_be_in_viewport()


def test_reading_back_is_not_disturbed_by_what_comes(page, engine, ask):
    engine.script, engine.step_s = ["def\n\n" * 150], 0.005
    ask(page, wait=False)
    scroller = page.locator("#main")
    expect(page.locator(".answer .prose p").nth(25)).to_be_attached(timeout=10000)
    assert scroller.evaluate("node => node.scrollHeight - node.scrollTop - node.clientHeight") < 80
    scroller.evaluate("node => (node.scrollTop = 0)")
    page.wait_for_timeout(200)
    assert scroller.evaluate("node => node.scrollTop") == 0
    page.locator("#to-end").click()
    page.keyboard.press("Escape")
    expect(page.locator(".ended")).to_be_in_viewport()
