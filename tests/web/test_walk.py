"""A new user's first minutes with the shipped model's card: on a desk and a phone, light and dark, in both languages.

The model behind the card is small and scripted, with the shipped one's context: it answers until it may no more.
`YUANMOE_WALK=FOLDER` keeps a picture of each step.
"""

import itertools
import os
import re
from pathlib import Path

import pytest

from scripted_engine import ScriptedEngine
from serving import serving
from small_lm import lm_config
from small_models import random_model
from small_tokenizers import bpe
from yuanmoe.checkpoint.card import UsageCard, read_card
from yuanmoe.lm import LanguageModel
from yuanmoe.serve.core.launch import Settings, launch_engine
from yuanmoe.shipped import small_folder

CONTEXT = 1024
CODE = 'def _get_atta(path, &rest):\n    # a comment\n    """*Not* italic."""\n    return _join_(path)\n'
DESK = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
WALKS = list(itertools.product(("desk", "phone"), ("light", "dark"), ("en", "zh")))
CJK = re.compile("[\u4e00-\u9fff]")
ENGLISH_SENTENCE = re.compile(r"\b(the|is|are|of|this|that|you)\b", re.IGNORECASE)

SMALL_ON_TOUCH = """() => {
  const small = [];
  const inline = ".prose a, td button, th button, #load button, .token, .skip";
  for (const node of document.querySelectorAll("button, select, input, textarea, summary, a[href]")) {
    if (!node.checkVisibility({ visibilityProperty: true }) || node.matches(inline)) continue;
    // A radio or a box is as large as the label around it.
    const { width, height } = (node.closest("label:has(input)") ?? node).getBoundingClientRect();
    if (Math.min(width, height) < 44) small.push(`${node.outerHTML.slice(0, 80)} ${width}x${height}`);
  }
  return small;
}"""


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def scripted(card):
    sizes = {"num_hidden_layers": 4, "num_experts": 32, "max_position_embeddings": CONTEXT}
    lm = LanguageModel(random_model(lm_config(bpe(), **sizes)), bpe())
    engine = ScriptedEngine(lm.config, lm.tokenizer)
    return engine, launch_engine(lm, engine, 4 * CONTEXT, Settings(model_id="small", card=card))


@pytest.fixture(scope="module")
def shipped(browser):
    """`url` and `engine` of a server that says of itself what the shipped model does."""
    engine, launched = scripted(read_card(small_folder()))
    with serving(launched) as url:
        yield url, engine


@pytest.fixture
def steps(request):
    """Keeps a picture of each step where somebody wants to look."""
    folder = os.environ.get("YUANMOE_WALK")
    name = request.node.callspec.id if hasattr(request.node, "callspec") else request.node.name

    def picture(page, step):
        if folder:
            page.wait_for_timeout(250)
            page.screenshot(path=Path(folder) / f"{name}-{step}.png")

    return picture


@pytest.mark.parametrize(("device", "theme", "language"), WALKS)
def test_a_new_user_gets_two_answers_and_sees_what_the_model_is(opened, shipped, ask, steps, device, theme, language):
    url, engine = shipped
    engine.requests.clear()
    options = PHONE if device == "phone" else DESK
    page = opened(url, **options, color_scheme=theme, locale={"en": "en-US", "zh": "zh-CN"}[language])

    def look(step):
        steps(page, step)
        in_one_language(page, language)
        if device == "phone":
            assert page.evaluate(SMALL_ON_TOUCH) == []

    welcomed(page, look)
    answered_as_advised(page, engine, look)
    answered_again(page, engine, ask, look)
    settings_say_what_is_used(page, look)
    page.locator('input[name="view"][value="experts"]').check()
    expect(page.locator("#to-end")).to_be_hidden()  # the end was in sight, and is in the other view
    look("6-experts")
    (on_a_phone if device == "phone" else on_a_desk)(page, look)


def welcomed(page, look):
    """It offers code to continue, says what it cannot do, and who it is."""
    examples = page.locator("#welcome .example")
    expect(examples).to_have_count(3)
    assert examples.first.inner_text().startswith("def read_lines(path):\n    ")
    expect(page.locator("#welcome .limits")).to_contain_text("Python")
    expect(page.locator("#who")).to_have_text("small")
    expect(page.locator("#to-end")).to_be_hidden()
    look("1-welcome")


def answered_as_advised(page, engine, look):
    """What is continued is the text itself, as the card advises, up to half of the context; code stays code."""
    page.locator("#welcome .example").first.click()
    engine.script = [CODE * 60]
    page.locator("#send").click()
    page.locator(".answer[aria-busy=false]").wait_for(state="attached")
    request = engine.requests[0]
    assert engine.tokenizer.decode(list(request.prompt_ids)).endswith('lines of a text file."""\n')
    assert (request.params.temperature, request.params.repetition_penalty) == (0.5, 1.1)
    assert request.params.max_new_tokens == CONTEXT // 2
    assert page.locator(".answer pre.plain").text_content().startswith(CODE)
    assert page.locator(".answer em").count() == 0
    expect(page.locator(".answer .facts")).to_contain_text("512")
    expect(page.locator("#context-said")).to_contain_text("1,024")
    look("2-answer")


def answered_again(page, engine, ask, look):
    """A second text is continued until the context is full; what is offered then works."""
    ask(page, "def second():")
    assert len(engine.requests) == 2
    assert page.locator(".answer .problem").count() == 0
    assert "def read_lines" in engine.tokenizer.decode(list(engine.requests[1].prompt_ids))
    offers = page.locator(".answer:last-child .ended button")
    expect(offers).to_have_count(2)
    look("3-full")
    offers.first.click()
    expect(page.locator(".edge")).to_have_count(1)
    engine.script = ["    pass\n"]
    ask(page, "def third():")
    assert page.locator(".problem").count() == 0
    read = engine.tokenizer.decode(list(engine.requests[-1].prompt_ids))
    assert "def read_lines" not in read
    assert "def second():" in read
    look("4-left-out")


def settings_say_what_is_used(page, look):
    """Defaults stand in the empty fields, and what cannot be meant is said in the page's language."""
    page.locator("#open-settings").click()
    assert page.locator("#setting-temperature").get_attribute("placeholder").startswith("0.5")
    assert page.locator("#setting-max_tokens").get_attribute("placeholder") == "512"
    page.locator("#setting-temperature").fill("3")
    page.locator("#settings [type=submit]").click()
    expect(page.locator("#setting-temperature ~ div .invalid")).to_contain_text("2")
    assert page.evaluate("document.activeElement.name") == "temperature"
    look("5-settings")
    page.locator("#close-settings").click()


def on_a_desk(page, look):
    for width in (1200, 1280, 1330, 1600, 1000):
        page.set_viewport_size({"width": width, "height": 800})
        boxes = [tool.bounding_box() for tool in page.locator("#lens > :visible").all()]
        assert len(boxes) >= 3
        assert len({round(box["y"] + box["height"] / 2, -1) for box in boxes}) == 1, f"one row of tools at {width}"
    page.set_viewport_size(DESK["viewport"])
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    look("8-list")


def on_a_phone(page, look):
    page.locator("#open-panel").tap()
    look("7-panel")
    page.locator("#close-panel").tap()
    page.locator("#open-sidebar").tap()
    look("8-list")
    item = page.locator("#conversations li")
    rename, remove = (item.locator("button.icon").nth(at).bounding_box() for at in (0, 1))
    assert abs(rename["x"] - remove["x"]) >= 44 + 8, "nobody deletes who means to rename"


def in_one_language(page, language):
    """No word of the other language outside of code and of names."""
    text = page.locator("body").inner_text().replace("\u4e2d\u6587", "").replace("English", "")
    codes = page.locator(".plain, .example, .tokens, .title, #title").all_inner_texts()
    for code in sorted(codes, key=len, reverse=True):
        text = text.replace(code, "")
    if language == "en":
        assert not CJK.search(text)
    else:
        assert not ENGLISH_SENTENCE.search(text), text


def test_a_chat_model_is_offered_questions_and_answers_a_second(opened, ask):
    engine, launched = scripted(UsageCard())
    with serving(launched) as url:
        page = opened(url)
        expect(page.locator(".example").last).to_contain_text("poem")
        expect(page.locator(".limits")).to_have_count(0)
        engine.script = ["word " * 2000, "A short one."]
        ask(page, "A long one?")
        expect(page.locator(".ended")).to_contain_text("longest length")
        ask(page, "A short one?")
        expect(page.locator(".answer .prose").last).to_have_text("A short one.")
        expect(page.locator(".answer:last-child .facts")).to_contain_text("complete")


def test_a_question_that_does_not_fit_offers_to_leave_turns_out(opened, ask, answers):
    engine, launched = scripted(UsageCard())
    with serving(launched) as url:
        page = opened(url)
        engine.script = ["word " * 2000]
        ask(page, "first")
        engine.script = ["Yes."]
        ids = engine.tokenizer.encode("word " * 2000)
        ask(page, engine.tokenizer.decode(ids[: CONTEXT * 3 // 4]))
        problem = page.locator(".problem")
        expect(problem).to_contain_text("the context holds 1,024")
        problem.get_by_role("button", name="Leave out the oldest turns").click()
        answers(page)
        expect(page.locator(".answer .prose").last).to_have_text("Yes.")
        assert page.locator(".problem").count() == 0
        # It took the place of the refused one, which said nothing.
        assert page.locator(".place").count() == 0
        assert page.locator(".left-out").count() == 2
        page.reload()
        assert page.locator(".left-out").count() == 2
        page.get_by_role("button", name="Send them again").click()
        expect(page.locator(".left-out")).to_have_count(0)
