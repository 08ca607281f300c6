"""What the page says when something goes wrong, and what it lets its reader do about it."""

import json

from serving import serving
from yuanmoe.serve.core.keys import entry_line, read_keys
from yuanmoe.serve.core.launch import Settings, launch_engine
from yuanmoe.serve.openai.app import Access

CHAT = "**/v1/chat/completions"


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def refusal(status, message, *, code=None, param=None, headers=None):
    body = json.dumps({"error": {"message": message, "type": "x", "param": param, "code": code}})
    return {"status": status, "body": body, "headers": {"Content-Type": "application/json"} | (headers or {})}


def answer_with(response):
    return lambda route: route.fulfill(**response)


REFUSALS = (
    (refusal(429, "60 a minute", headers={"Retry-After": "7"}), "busy", "Try again in 7 s"),
    (refusal(503, "queue full", headers={"Retry-After": "1"}), "busy", "Try again in 1 s"),
    (refusal(503, "the engine has died"), "went wrong", "server's log"),
    (refusal(400, "too long", code="context_length_exceeded"), "too long", "start a new conversation"),
    (refusal(408, "600 s"), "too long", "ask for fewer tokens"),
    (refusal(500, "a bug"), "went wrong", "server's log"),
    ({"status": 502, "body": "<b>Bad gateway</b>"}, "went wrong", "server's log"),
)


def test_refusals_are_said_in_words_with_what_to_do(opened, served, engine, ask):
    page = opened(served.url, expected=["Failed to load resource"])
    page.locator("#welcome p").wait_for()
    for response, title, advice in REFUSALS:
        page.route(CHAT, answer_with(response))
        ask(page)
        problem = page.locator(".answer:last-child .problem")
        expect(problem.locator("strong")).to_contain_text(title)
        expect(problem).to_contain_text(advice)
        assert problem.locator("b").count() == 0
        page.unroute(CHAT)
        offers = problem.get_by_role("button")
        assert offers.count() > 0
        if offers.first.inner_text() == "Try again":
            offers.first.click()
            expect(page.locator(".answer:last-child .prose")).to_have_text("Yes.")


def test_a_refused_setting_is_one_click_away(opened, served, engine, ask):
    page = opened(served.url, expected=["400"])
    page.locator("#open-settings").click()
    page.locator("#setting-min_p").fill("0.5")
    page.locator("#setting-top_p").fill("0")
    page.get_by_text("Save").click()
    ask(page)
    problem = page.locator(".problem")
    expect(problem).to_contain_text("Change the setting Top-p")
    expect(problem).to_contain_text("top_p is 0")
    problem.get_by_role("button", name="Open settings").click()
    assert page.locator("#setting-top_p").evaluate("node => node === document.activeElement")


def test_a_server_that_is_gone_is_said_to_be(opened, served, engine, ask):
    page = opened(served.url, expected=["Failed to load resource"])
    page.locator("#welcome p").wait_for()
    page.route(CHAT, lambda route: route.abort())
    ask(page)
    expect(page.locator(".problem")).to_contain_text("cannot be reached")
    expect(page.locator(".problem")).to_contain_text("yuanmoe serve")


def test_a_question_asked_before_the_server_is_known_is_sent_once_it_is(opened, served, engine, answers):
    held = []
    page = opened(served.url, prepare=lambda page: page.route("**/v1/info", lambda route: held.append(route)))
    expect(page.locator("#question")).to_be_focused()  # so the page has started
    page.locator("#question").fill("Hello?")
    page.locator("#question").press("Enter")
    page.wait_for_timeout(100)
    assert held
    assert page.locator("#question").input_value() == "Hello?"
    for route in held:
        route.continue_()
    answers(page)
    expect(page.locator(".bubble")).to_have_text(["Hello?"])


def test_a_server_that_comes_back_is_met_again(opened, served, engine, ask):
    page = opened(
        served.url,
        expected=["Failed to load resource", "ERR_FAILED"],
        prepare=lambda page: page.route("**/v1/info", lambda route: route.abort()),
    )
    expect(page.locator(".toast")).to_contain_text("cannot be reached")
    ask(page, "Hello?", wait=False)
    expect(page.locator(".toast")).to_have_count(2)
    assert page.locator("#question").input_value() == "Hello?"
    page.unroute("**/v1/info")
    page.locator(".toast").first.get_by_role("button", name="Try again").click()
    page.locator("#welcome p").wait_for()
    page.keyboard.press("Tab")
    page.locator("#question").press("Enter")
    expect(page.locator(".answer .prose")).to_have_text("Yes.")


def test_an_error_amid_an_answer_keeps_what_was_said(page, engine, ask, answers):
    engine.script, engine.break_after, engine.step_s = ["One two three four."], 4, 0.03
    ask(page)
    expect(page.locator(".problem")).to_contain_text("the test broke this answer")
    said = page.locator(".answer .prose").inner_text()
    assert said
    engine.break_after, engine.script, engine.step_s = None, [" And more."], 0.0
    page.get_by_role("button", name="Continue").click()
    answers(page)
    assert page.locator(".problem").count() == 0
    assert page.locator(".answer .prose").inner_text() == f"{said} And more."


def test_a_stream_that_breaks_off_keeps_what_was_said(page, engine, ask):
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "Half an ans"}, "finish_reason": None}]})
    body = f"data: {chunk}\n\n"
    page.route(CHAT, lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body))
    ask(page)
    assert page.locator(".answer .prose").inner_text() == "Half an ans"
    expect(page.locator(".problem")).to_contain_text("connection was lost")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_a_key_is_asked_for_and_kept_in_the_tab(opened, lm, engine, ask):
    keys = read_keys(None, entry_line("reader", "yuan-secret"))
    settings = Settings(model_id="locked", access=Access(keys=keys))
    with serving(launch_engine(lm, engine, 4096, settings)) as url:
        page = opened(url, expected=["401"])
        page.locator("#setting-key").fill("wrong")
        page.get_by_text("Save").click()
        expect(page.locator("#settings")).to_be_visible()
        page.locator("#setting-key").fill("yuan-secret")
        page.get_by_text("Save").click()
        page.locator("#welcome p").wait_for()
        ask(page)
        assert page.locator(".answer .prose").inner_text() == "Yes."
        kept = page.evaluate("[JSON.stringify(localStorage), sessionStorage['yuanmoe.key']]")
        assert "secret" not in kept[0]
        assert kept[1] == "yuan-secret"
        with page.expect_download() as download:
            page.get_by_text("Export").click()
        assert b"secret" not in download.value.path().read_bytes()
