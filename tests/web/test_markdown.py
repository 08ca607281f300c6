"""The Markdown of answers: what it makes of text, of hostile text, and of text that is still on its way."""

import pytest

from yuanmoe.serve.web.page import read_page

ASSETS = f"/v/{read_page().digest}"
ALLOWED_TAGS = {
    *("DIV", "P", "SPAN", "H3", "H4", "H5", "H6", "HR", "BLOCKQUOTE", "PRE", "CODE", "UL", "OL", "LI", "TABLE"),
    *("THEAD", "TBODY", "TR", "TH", "TD", "STRONG", "EM", "DEL", "A", "BUTTON", "SVG", "USE"),
}
ALLOWED_ATTRIBUTES = {
    *("class", "tabindex", "start", "href", "title", "target", "rel", "type"),
    *("aria-label", "aria-hidden", "data-t-label"),
}

RENDER = """async (text) => {
  const { MarkdownView } = await import("ASSETS/markdown/view.js");
  const view = new MarkdownView();
  view.update(text);
  document.body.append(view.node);
  const all = [...view.node.querySelectorAll("*")];
  const found = {
    html: view.node.innerHTML.replaceAll(/<div class="code-head">.*?<\\/div>/g, ""),
    tags: all.map((node) => node.tagName.toUpperCase()),
    attributes: all.flatMap((node) => node.getAttributeNames()),
    links: [...view.node.querySelectorAll("a")].map((node) => [node.protocol, node.rel, node.getAttribute("href")]),
    text: view.node.textContent,
  };
  view.node.remove();
  return found;
}""".replace("ASSETS", ASSETS)

EXAMPLES = {
    "# Title #\ntext": "<h3>Title</h3><p>text</p>",
    "####### no": "<p>####### no</p>",
    "**bold** *em* ***both*** ~~gone~~": "<p><strong>bold</strong> <em>em</em> <em><strong>both</strong></em> "
    "<del>gone</del></p>",
    "\u8fd9**\u201c\u5f15\u7528\u201d**\u540e": "<p>\u8fd9<strong>\u201c\u5f15\u7528\u201d</strong>\u540e</p>",
    "2 * 3 * 4, snake_case_name, a ~ b": "<p>2 * 3 * 4, snake_case_name, a ~ b</p>",
    "**open *and `not closed": "<p>**open *and `not closed</p>",
    "`` a ` b `` and `<b>`": "<p><code>a ` b</code> and <code>&lt;b&gt;</code></p>",
    "\\*plain\\*": "<p>*plain*</p>",
    "- a\n- b\n  - c": '<ul><li><span class="item">a</span></li><li><span class="item">b</span><ul><li>'
    '<span class="item">c</span></li></ul></li></ul>',
    "3. a\n4. b": '<ol start="3"><li><span class="item">a</span></li><li><span class="item">b</span></li></ol>',
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- [x] done": '<ul><li><span class="item">\u2611 done</span></li></ul>',
    "It was in\n1999. Then": "<p>It was in\n1999. Then</p>",
    "1. do\n   ```\n   x\n   ```\nAfter": '<ol start="1"><li><span class="item">do</span><div class="code"><pre '
    'tabindex="0"><code>x</code></pre></div></li></ol><p>After</p>',
    "> a\nb\n\nc": "<blockquote><p>a\nb</p></blockquote><p>c</p>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "```js\n*x*\n": '<div class="code"><pre tabindex="0"><code>*x*\n</code></pre></div>',
    "|a|b\\|c|\n|-|:-:|\n|1|": '<div class="scroll" tabindex="0"><table><thead><tr><th class="align-start">a</th>'
    '<th class="align-center">b|c</th></tr></thead><tbody><tr><td class="align-start">1</td>'
    '<td class="align-center"></td></tr></tbody></table></div>',
}


def test_what_is_understood_looks_as_it_should(page):
    for text, html in EXAMPLES.items():
        assert page.evaluate(RENDER, text)["html"] == html, text


HOSTILE = (
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'><svg onload=window.pwned=1><iframe src=javascript:pwned=1>",
    "[x](javascript:window.pwned=1) [x](JaVaScRiPt:alert(1)) [x](\x01javascript:alert(1)) [x](java\nscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>) [x](vbscript:x) [x](file:///etc/passwd)",
    "[x](//evil.example) [x](/admin) [x](https:evil.example) [x](http:\\\\evil.example)",
    "[x](&#106;avascript:alert(1)) [x](javascript&colon;alert(1)) <javascript:alert(1)> <data:text/html,x>",
    '[x](https://evil.example/" onclick="window.pwned=1) [x](<https://evil.example/ onmouseover=1>)',
    "![x](https://evil.example/pixel.png) ![](https://evil.example/2.png) [![x](https://evil.example/3.png)](https://evil.example)",
    '```"><script>window.pwned=1</script>\n</code></pre><script>window.pwned=1</script>\n```',
    "| <img src=x onerror=1> | [a](javascript:1) |\n|---|---|\n| <b onclick=1>x</b> | `<script>` |",
    "# <style>*{display:none}</style>\n- <form action=//evil.example><input>\n> <base href=//evil.example>",
    "https://evil.example/<script>pwned=1</script> http://[::1 https://%zz https://user:pass@evil.example/",
    "<!-- --><![CDATA[<script>pwned=1</script>]]><?xml?><math><mtext><img src=x onerror=1>",
    "\u202e\u2066[gnp.exe](https://evil.example)\u2028\u2029\0\ufeff\ud800",
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(shared_page, text):
    found = shared_page.evaluate(RENDER, text)
    assert set(found["tags"]) <= ALLOWED_TAGS
    assert set(found["attributes"]) <= ALLOWED_ATTRIBUTES
    for protocol, rel, _ in found["links"]:
        assert protocol in ("http:", "https:")
        assert "noopener" in rel
    assert shared_page.evaluate("window.pwned") is None


@pytest.fixture(scope="module")
def shared_page(browser, served):
    """One page for many texts."""
    page = browser.new_page()
    page.goto(served.url)
    yield page
    page.close()


def test_links_lead_where_they_say(page):
    text = "[a](https://a.example/x_(y) 'title') https://b.example/?q=1, (https://c.example/d). \u89c1https://e.example\u3002"
    links = [href for _, _, href in page.evaluate(RENDER, text)["links"]]
    assert links == [
        "https://a.example/x_(y)",
        "https://b.example/?q=1",
        "https://c.example/d",
        "https://e.example/",
    ]


def test_a_hostile_answer_shows_and_does_nothing(page, engine, ask):
    engine.script = ["\n\n".join(HOSTILE[:8]).replace("\x01", "")]
    ask(page, "<img src=x onerror='window.pwned = 1'>")
    assert "<script>window.pwned = 1</script>" in page.locator(".answer .prose").inner_text()
    assert page.locator("#title").inner_text().startswith("<img")
    page.get_by_role("radio", name="Experts", exact=True).check()
    assert "<script>" in page.locator(".tokens").inner_text()
    page.locator(".token").nth(3).hover()
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script, main iframe, main form:not(.edit)").count() == 0


LONG = (
    *("[", "[a](", "![", "*a ", "**", "_a_", "`", "``a`", "~~", "<", "(", "](", "h", "\\", " ", "\t"),
    *("https://a.b/(", "<https://", "> ", "- ", "# ", "1. ", "|", "|-"),
    *("a\n\n", "- a\n\n", "> a\n", "| a\n|-\n", "```\n"),
)


def test_no_text_takes_long(page):
    """Nothing backtracks, and nothing nests without bound."""
    took = page.evaluate(
        """async ([pieces, times]) => {
          const { parseBlocks } = await import("ASSETS/markdown/blocks.js");
          const { renderBlock } = await import("ASSETS/markdown/render.js");
          const took = {};
          for (const piece of pieces) {
            const start = performance.now();
            parseBlocks(piece.repeat(times / piece.length).split("\\n")).slice(0, 500).map(renderBlock);
            took[piece] = performance.now() - start;
          }
          return took;
        }""".replace("ASSETS", ASSETS),
        [LONG, 60_000],
    )
    assert {piece: ms for piece, ms in took.items() if ms > 2000} == {}


TRICKY = """para
- 5 degrees
-5 more

1. a

   b
2. c
   - d

     e
lazy
> q
lazy

| a | b |
|---|---|
| 1 | 2 |
3 | 4

```py
x

# y
```

text
***
* a
* b


* c
# h\r
end **bo
ld** `co
de`
~~~
open"""


def test_what_streams_ends_as_what_comes_at_once(page):
    """However a text is cut, and whatever a line looked like before it was whole."""
    broken = page.evaluate(
        """async ([texts, rounds]) => {
          const { MarkdownView } = await import("ASSETS/markdown/view.js");
          let seed = 1;
          const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
          for (let round = 0; round < rounds; round++) {
            const lines = texts.split("\\n");
            const text = Array.from({ length: 1 + random(30) }, () => lines[random(lines.length)]).join("\\n");
            const whole = new MarkdownView();
            whole.update(text);
            const growing = new MarkdownView();
            for (let end = 0; end < text.length; ) growing.update(text.slice(0, (end += 1 + random(6))));
            if (whole.node.innerHTML !== growing.node.innerHTML) {
              return { text, whole: whole.node.innerHTML, growing: growing.node.innerHTML };
            }
          }
          return null;
        }""".replace("ASSETS", ASSETS),
        [TRICKY, 150],
    )
    assert broken is None


def test_copy_buttons_copy(opened, served, engine, ask):
    page = opened(served.url, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#welcome p").wait_for()
    engine.script = ["See:\n\n```py\ndef f():\n    return '<b>'\n```\n"]
    ask(page)
    page.get_by_label("Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n    return '<b>'"
    page.locator(".code").get_by_label("Copied").wait_for()
    page.locator(".answer .actions").get_by_label("Copy").click()
    page.locator(".answer .actions").get_by_label("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == engine.script[0]
