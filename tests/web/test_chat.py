"""Conversations: streaming, stopping, asking again, editing, and what becomes of them."""

import json
import re
import time

import httpx
import pytest

import small_adapters
from serving import serving
from small_lm import small_lm
from yuanmoe.checkpoint.adapters.adapter import Adapter, base_of
from yuanmoe.serve.core.launch import Settings, launch

LONG = "and so on, " * 400


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def prompts(engine):
    return [engine.tokenizer.decode(list(request.prompt_ids)) for request in engine.requests]


def test_an_answer_streams_and_is_shown_as_markdown(page, engine, ask):
    engine.script = ["A **bold** word.\n\n- one\n- two\n"]
    ask(page, "Say something.")
    answer = page.locator(".answer .prose")
    assert answer.locator("strong").inner_text() == "bold"
    assert answer.locator("li").all_inner_texts() == ["one", "two"]
    assert page.locator(".bubble").inner_text() == "Say something."
    assert "Say something." in prompts(engine)[0]
    assert page.locator(".ended").count() == 0
    # Read to its end, not given up. What Chromium itself reports of a stream's end depends on its timing.
    assert engine.cancelled == []


def test_text_appears_while_the_answer_is_written_and_stopping_frees_the_engine(page, engine, ask):
    engine.script, engine.step_s = [LONG], 0.01
    ask(page, wait=False)
    page.locator(".answer .prose p").wait_for()
    page.locator("#stop").click()
    expect(page.locator(".ended")).to_contain_text("Stopped")
    deadline = time.monotonic() + 2
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.has_work
    assert len(engine.cancelled) == 1
    said = page.locator(".answer .prose").inner_text()
    assert LONG.startswith(said.rstrip())
    assert 0 < len(said) < len(LONG)


def test_a_real_model_answers_and_a_stopped_answer_leaves_nothing_behind(opened, ask, answers):
    launched = launch(small_lm(max_position_embeddings=1024), Settings(model_id="real"))
    worker = launched.service.worker
    with serving(launched) as url:
        page = opened(url)
        page.locator("#open-settings").click()
        page.locator("#setting-temperature").fill("0")
        page.get_by_text("Save").click()
        page.get_by_role("radio", name="Experts", exact=True).check()
        ask(page, wait=False)
        page.locator(".token[data-number]").nth(5).wait_for()
        page.keyboard.press("Escape")
        answers(page)
        deadline = time.monotonic() + 2
        while (worker.load or worker.stats.used_pages) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (worker.load, worker.stats.used_pages, worker.stats.running) == (0, 0, 0)


def test_a_model_without_experts_has_a_page_without_them(opened, ask):
    with serving(launch(small_lm(num_experts=0), Settings(model_id="dense"))) as url:
        page = opened(url)
        expect(page.locator("#welcome p")).to_contain_text("no experts")
        page.locator("#open-settings").click()
        page.locator("#setting-max_tokens").fill("8")
        page.get_by_text("Save").click()
        ask(page)
        expect(page.get_by_role("radio", name="Experts", exact=True)).to_be_hidden()
        assert page.locator(".answer .problem").count() == 0


def test_asking_again_keeps_both_answers(page, engine, ask, answers):
    engine.script = ["First.", "Second."]
    ask(page)
    page.get_by_label("Answer again").click()
    answers(page)
    assert page.locator(".answer").count() == 1
    assert page.locator(".answer .prose").inner_text() == "Second."
    assert page.locator(".place").inner_text() == "2 of 2"
    assert prompts(engine)[0] == prompts(engine)[1]
    page.get_by_label("Previous version").click()
    expect(page.locator(".answer .prose")).to_have_text("First.")


def test_an_edited_question_branches_from_there(page, engine, ask, answers):
    engine.script = ["To one.", "To two.", "To another one."]
    ask(page, "one")
    ask(page, "two")
    page.locator(".question").first.get_by_label("Edit").click()
    page.get_by_label("Edit the question").fill("another one")
    page.keyboard.press("Enter")
    answers(page)
    assert page.locator(".bubble").all_inner_texts() == ["another one"]
    assert page.locator(".answer .prose").all_inner_texts() == ["To another one."]
    assert "two" not in prompts(engine)[2]
    page.get_by_label("Previous version").click()
    expect(page.locator(".bubble")).to_have_text(["one", "two"])
    expect(page.locator(".answer .prose")).to_have_text(["To one.", "To two."])


def test_settings_reach_the_engine_and_the_next_conversation(page, engine, ask):
    page.locator("#open-settings").click()
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 7}
    for name, value in (values | {"max_tokens": 5}).items():
        page.locator(f"#setting-{name}").fill(str(value))
    page.locator("#setting-system").fill("Be brief.")
    page.locator("#setting-stop").fill("zebra\n\\n\\n")
    page.get_by_text("Save").click()
    engine.script = ["One two three four five six seven eight."]
    ask(page)
    params = engine.requests[0].params
    assert {name: getattr(params, name) for name in values} == values
    assert params.max_new_tokens == 5
    assert prompts(engine)[0].startswith("Be brief.\n")
    expect(page.locator(".ended")).to_contain_text("longest length")
    page.get_by_role("button", name="New conversation").click()
    page.locator("#open-settings").click()
    assert page.locator("#setting-top_k").input_value() == "40"
    assert page.locator("#setting-stop").input_value() == "zebra\n\\n\\n"


def test_an_adapter_can_be_chosen_where_the_server_has_one(opened, page, ask):
    expect(page.locator("#who")).to_have_text("yuan-test")
    expect(page.locator("#who select")).to_have_count(0)
    lm = small_lm(max_position_embeddings=1024)
    made = small_adapters.settings("q", "experts")
    poet = Adapter(settings=made, base=base_of(lm.model, "small"), tensors=small_adapters.factors(lm.model, made))
    launched = launch(lm, Settings(model_id="base"), {"poet": poet})
    with serving(launched) as url:
        page = opened(url)
        asked = []
        page.on("request", lambda request: asked.append(request.post_data_json) if request.post_data else None)
        page.locator("#welcome p").wait_for()
        assert page.locator("#model option").all_inner_texts() == ["base", "base + poet"]
        page.locator("#model").select_option("poet")
        page.locator("#open-settings").click()
        page.locator("#setting-max_tokens").fill("4")
        page.get_by_text("Save").click()
        ask(page)
        assert page.locator("#model").input_value() == "poet"
        page.locator("#model").select_option("base")
        ask(page)
        assert [body["model"] for body in asked if "stream" in body] == ["poet", "base"]
        assert 'yuanmoe_requests_total{adapter="poet"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_stop_string_with_a_line_break_ends_the_answer(page, engine, ask):
    page.locator("#open-settings").click()
    page.locator("#setting-stop").fill("\\n\\n")
    page.get_by_text("Save").click()
    engine.script = ["Before.\n\nAfter."]
    ask(page)
    assert page.locator(".answer .prose").inner_text() == "Before."


def test_conversations_outlive_a_reload(page, engine, ask):
    engine.script = ["To the first.", "To the second."]
    ask(page, "first")
    page.get_by_role("button", name="New conversation").click()
    ask(page, "second")
    page.reload()
    expect(page.locator("#conversations .title")).to_have_text(["second", "first"])
    expect(page.locator(".answer .prose")).to_have_text("To the second.")
    page.locator("#conversations .title", has_text="first").click()
    expect(page.locator(".answer .prose")).to_have_text("To the first.")


def test_a_conversation_is_renamed_deleted_and_brought_back(page, ask):
    ask(page, "a question")
    item = page.locator("#conversations li")
    item.hover()
    item.get_by_label("Rename").click()
    page.get_by_label("New name").fill("a name")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("a name")
    item.hover()
    item.get_by_label("Delete").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    assert page.locator("#transcript li").count() == 0
    page.get_by_text("Undo").click()
    expect(page.locator("#conversations .title")).to_have_text("a name")
    page.reload()
    expect(page.locator(".answer .prose")).to_have_text("Yes.")


def test_a_page_that_goes_away_at_once_keeps_what_was_asked(page, ask):
    ask(page, "a question")
    for _ in range(10):
        page.get_by_label("Delete").click()
        expect(page.locator("#conversations li")).to_have_count(0)
        undo = page.get_by_text("Undo")
        undo.evaluate("button => { button.click(); location.reload(); }")
        page.wait_for_load_state()
        expect(page.locator(".answer .prose")).to_have_text("Yes.")


def test_export_and_import_round_trip(page, opened, served, engine, ask, answers, tmp_path):
    engine.script = ["First.", "Second."]
    ask(page, "a question")
    page.get_by_label("Answer again").click()
    answers(page)
    with page.expect_download() as download:
        page.get_by_text("Export").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text())
    assert [message["content"] for message in exported["conversations"][0]["messages"]].count("a question") == 1
    other = opened(served.url)
    with other.expect_file_chooser() as chooser:
        other.get_by_text("Import").click()
    chooser.value.set_files(file)
    expect(other.locator(".toast")).to_contain_text("Conversations added: 1")
    expect(other.locator(".answer .prose")).to_have_text("Second.")
    expect(other.locator(".place")).to_have_text("2 of 2")
    other.get_by_role("radio", name="Experts", exact=True).check()
    other.locator(".token[data-number]").first.wait_for()


HOSTILE_FILES = {
    "no JSON": "{",
    "another format": '{"conversations": []}',
    "a circle": {"messages": [{"id": n, "parent": 1 - n, "role": "user", "content": "x"} for n in (0, 1)]},
    "a role of its own": {"messages": [{"id": 1, "role": "<b>", "content": "x"}]},
    "experts beyond the last": {
        "messages": [
            {
                "id": 1,
                "role": "assistant",
                "content": "x",
                "routing": {
                    "layers": [{"layer": 0, "experts": 2}],
                    "chosen": 1,
                    "length": 1,
                    "experts": "CQA=",
                    "weights": "AAA=",
                },
            }
        ]
    },
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_file_that_is_no_export_is_refused_in_words(page, name):
    content = HOSTILE_FILES[name]
    if isinstance(content, dict):
        content = json.dumps({"format": "yuanmoe-conversations", "version": 1, "conversations": [content]})
    page.locator("#import-file").set_input_files(
        {"name": "x.json", "mimeType": "application/json", "buffer": content.encode()}
    )
    expect(page.locator(".toast")).to_contain_text("could not be read")
    assert page.locator("#conversations li").count() == 0


def test_an_answer_goes_on_in_the_background(page, engine, ask):
    engine.script, engine.step_s = ["one two three four five six seven eight nine ten", "Short."], 0.02
    ask(page, "long", wait=False)
    page.locator(".answer .prose p").wait_for()
    page.get_by_role("button", name="New conversation").click()
    ask(page, "short")
    assert page.locator(".answer .prose").inner_text() == "Short."
    page.locator("#conversations .title", has_text="long").click()
    expect(page.locator(".answer .prose")).to_have_text(re.compile("ten$"))
    assert engine.cancelled == []


def test_a_reload_amid_an_answer_keeps_what_was_said_and_offers_to_go_on(page, engine, ask, answers):
    text = "one two three four five six seven eight nine ten eleven twelve"
    engine.script, engine.step_s = [text], 0.1
    ask(page, "count", wait=False)
    # Saved every two seconds.
    page.wait_for_timeout(2600)
    page.reload()
    expect(page.locator(".problem")).to_contain_text("What was said is kept")
    said = page.locator(".answer .prose").inner_text()
    assert 0 < len(said) < len(text)
    engine.script, engine.step_s = [" and the rest."], 0.0
    page.get_by_role("button", name="Continue").click()
    answers(page)
    assert page.locator(".answer .prose").inner_text() == f"{said} and the rest."
    # What the engine read was the conversation and the beginning of the answer, as one prompt.
    assert prompts(engine)[1].rstrip().endswith(said)
    assert prompts(engine)[1].startswith("count")
    page.get_by_role("radio", name="Experts", exact=True).check()
    page.locator(".token").first.wait_for()
    assert page.locator(".token:not([data-number])").count() == 0
