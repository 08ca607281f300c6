"""What helps around a conversation: search, shortcuts, files, how an answer is shown, the words of errors."""

import json
import re
from pathlib import Path

import pytest

from yuanmoe import serve

CHAT = "**/v1/chat/completions"
CJK = re.compile("[\u4e00-\u9fff]")

DROP = """([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  for (const kind of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}"""


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def test_conversations_are_found_by_title_and_by_what_was_said(page, engine, ask):
    engine.script = ["The Tortoise wins.", "No animals here."]
    ask(page, "a race")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "a recipe")
    titles = page.locator("#conversations .title")
    expect(page.locator("#conversations h2")).to_have_text(["Today"])
    for text, found in {"tortoise": ["a race"], "RECIPE": ["a recipe"], "a r": ["a recipe", "a race"]}.items():
        page.locator("#search").fill(text)
        expect(titles).to_have_text(found)
    page.locator("#search").fill("hare")
    expect(titles).to_have_count(0)
    expect(page.locator("#conversations .note")).to_have_text("Nothing found.")
    page.locator("#search").fill("race")
    expect(titles).to_have_text(["a race"])
    page.locator("#search").press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .prose")).to_have_text("The Tortoise wins.")


def test_old_conversations_stand_under_their_day(page):
    days = page.evaluate(
        """async (module) => {
          const { day } = await import(module);
          return [0, 1, 3, 400].map((ago) => day(new Date().setHours(12, 0, 0, 0) - ago * 86400000));
        }""",
        page.locator('link[href$="core/language.js"]').evaluate("node => node.href"),
    )
    assert days[:2] == ["Today", "Yesterday"]
    assert re.fullmatch(r"[A-Z][a-z]+day", days[2])
    assert re.fullmatch(r"[A-Z][a-z]+ 20\d\d", days[3])


def test_shortcuts_do_what_their_list_says(page, ask):
    ask(page, "a question")
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Control+b")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.reload()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.keyboard.press("Control+k")
    expect(page.locator("#sidebar")).to_be_visible()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#transcript li")).to_have_count(0)
    # While one types, a letter is a letter.
    page.keyboard.type("what?/")
    assert page.locator("#question").input_value() == "what?/"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    assert page.locator("#shortcut-list dt").count() == page.locator("#shortcut-list dd").count() == 8
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()


def test_a_dropped_text_file_becomes_part_of_the_question(page, engine, ask):
    page.locator("#question").fill("What is wrong here?")
    page.evaluate(DROP, ["a`b.md", list(b"# Hi\r\n```\nx\n```\n")])
    asked = "What is wrong here?\na`b.md:\n````\n# Hi\n```\nx\n```\n````\n"
    expect(page.locator("#question")).to_have_value(asked)
    expect(page.locator("#drop-here")).to_be_hidden()
    page.locator("#send").click()
    expect(page.locator(".bubble")).to_have_text(asked.strip(), use_inner_text=True)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x00", b"text\xff", b"null\x00byte"])
def test_a_file_that_is_no_text_is_refused_in_words(page, content):
    page.locator("#attach-file").set_input_files({"name": "x.bin", "mimeType": "text/plain", "buffer": content})
    expect(page.locator(".toast")).to_contain_text("x.bin is not a text file")
    assert page.locator("#question").input_value() == ""


def test_a_file_that_is_too_large_is_refused_with_its_size(page):
    page.locator("#attach-file").set_input_files(
        {"name": "big.txt", "mimeType": "text/plain", "buffer": b"x" * 2_000_000}
    )
    expect(page.locator(".toast")).to_contain_text("big.txt has 1,953 KiB; a file may have 1,024 KiB")


def test_an_answer_can_be_shown_as_text_and_as_markdown(page, engine, ask):
    engine.script = ["A *word*.\n    indented"]
    ask(page)
    assert page.locator(".answer em").inner_text() == "word"
    page.get_by_role("button", name="As text").click()
    assert page.locator(".answer pre.plain").text_content() == "A *word*.\n    indented"
    page.get_by_role("button", name="As Markdown").click()
    assert page.locator(".answer em").inner_text() == "word"


def test_a_reader_who_knows_better_makes_a_chat_model_continue(page, engine, ask):
    page.locator("#open-settings").click()
    page.locator("#setting-kind").select_option("completion")
    page.get_by_text("Save").click()
    ask(page, "    indented")
    assert engine.tokenizer.decode(list(engine.requests[0].prompt_ids)) == "    indented"
    expect(page.locator(".answer pre.plain")).to_have_text("Yes.")


def test_a_stopped_answer_says_so_and_how_fast_it_came(page, engine, ask, answers):
    engine.script, engine.step_s = ["and so on, " * 400], 0.01
    ask(page, wait=False)
    page.locator(".answer .prose p").wait_for()
    page.keyboard.press("Escape")
    answers(page)
    expect(page.locator(".ended")).to_have_text(re.compile("^Stopped."))
    expect(page.locator(".facts")).to_have_text(re.compile(r"^\d+ tokens · [\d.,]+ tokens/s · first after [\d.]+ s$"))


CODES = {
    "queue_full": (503, "\u7b49\u5f85\u4e2d"),
    "rate_limit_exceeded": (429, "\u8fd9\u4e00\u5206\u949f"),
    "model_not_found": (404, "\u9002\u914d\u5668"),
    "context_length_exceeded": (400, "\u4e0a\u4e0b\u6587"),
}


@pytest.mark.parametrize("code", CODES)
def test_the_servers_codes_are_said_in_the_readers_language(opened, served, engine, ask, code):
    status, said = CODES[code]
    page = opened(served.url, locale="zh-CN", expected=["Failed to load resource"])
    page.locator("#welcome p").wait_for()
    body = json.dumps({"error": {"message": "17 are too many here", "type": "x", "param": None, "code": code}})
    page.route(
        CHAT, lambda route: route.fulfill(status=status, body=body, headers={"Content-Type": "application/json"})
    )
    ask(page)
    problem = page.locator(".problem")
    expect(problem).to_contain_text(said)
    # Its own sentence, with its numbers, is one click away.
    expect(problem.locator(".server-words")).to_be_hidden()
    problem.locator("summary").click()
    expect(problem.locator(".server-words")).to_have_text("17 are too many here")


def test_the_browsers_words_are_not_shown(opened, served, engine, ask):
    page = opened(served.url, locale="zh-CN", expected=["Failed to load resource"])
    page.locator("#welcome p").wait_for()
    page.route(CHAT, lambda route: route.abort())
    ask(page)
    said = page.locator(".problem").inner_text()
    assert CJK.search(said)
    assert "fetch" not in said


def test_every_code_of_the_server_has_a_string(page):
    sources = "".join(path.read_text() for path in Path(serve.__file__).parent.rglob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', sources))
    table = page.evaluate(
        "async (module) => Object.keys((await import(module)).default)",
        page.locator('link[href$="strings/zh.js"]').evaluate("node => node.href"),
    )
    assert len(codes) > 10
    assert {f"code.{code}" for code in codes} <= set(table)
