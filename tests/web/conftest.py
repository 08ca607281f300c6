"""A real browser on the page of a real server, whose engine says what the test tells it.

Every page is watched: an error in its console, a violation of its content security policy, or a request to anywhere
but its own server fails the test.
"""

from types import SimpleNamespace

import pytest

import chromium
from scripted_engine import ScriptedEngine
from serving import serving
from small_lm import lm_config
from small_models import random_model
from small_tokenizers import bpe
from yuanmoe.lm import LanguageModel
from yuanmoe.serve.core.launch import Settings, launch_engine

TIMEOUT_MS = 10_000
OPTIONS = {"locale": "en-US", "viewport": {"width": 1280, "height": 800}}


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (yuanmoe[dev])")
    if chromium.CHROMIUM is None:
        pytest.skip("chromium is not on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = chromium.start(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lm():
    """Three layers, the middle one without experts, so that a layer's number is not its place."""
    sizes = {"num_hidden_layers": 3, "num_experts": (32, 0, 8), "max_position_embeddings": 4096}
    return LanguageModel(random_model(lm_config(bpe(), **sizes)), bpe())


@pytest.fixture(scope="session")
def served(lm, browser):
    """`url`, and the `engine` behind it."""
    engine = ScriptedEngine(lm.config, lm.tokenizer)
    with serving(launch_engine(lm, engine, 4096, Settings(model_id="yuan-test"))) as url:
        yield SimpleNamespace(url=url, engine=engine)


@pytest.fixture
def engine(served):
    """The engine, as if nothing had been asked of it."""
    served.engine.script = ["Yes."]
    served.engine.step_s = 0.0
    served.engine.break_after = None
    served.engine.requests.clear()
    served.engine.cancelled.clear()
    return served.engine


@pytest.fixture
def opened(browser):
    """Opens pages of a URL, each in a browser profile of its own, and watches them."""
    contexts, seen = [], []

    def open_page(url, *, expected=(), prepare=lambda page: None, **options):
        """`expected` are parts of console errors that belong to the test; `prepare` sees the page while it is empty."""
        context = browser.new_context(**OPTIONS | options)
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        watch(page, "/".join(url.split("/")[:3]), expected, seen)
        prepare(page)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


def watch(page, url, expected, seen):
    def on_console(message):
        if message.type in ("error", "warning") and not any(part in message.text for part in expected):
            seen.append(message.text)

    def on_request(request):
        if not request.url.startswith((url, "blob:" + url, "data:")):
            seen.append(f"a request to {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", on_request)
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (event) => console.error(event.violatedDirective))"
    )


@pytest.fixture(scope="session")
def profile(browser):
    """One browser profile for many tests: what it loaded once it need not load again."""
    context = browser.new_context(**OPTIONS)
    context.set_default_timeout(TIMEOUT_MS)
    yield context
    context.close()


@pytest.fixture
def page(profile, served, engine):
    """The page as on a first visit, in English."""
    seen = []
    page = profile.new_page()
    everything = {"origin": served.url, "storageTypes": "local_storage,indexeddb"}
    profile.new_cdp_session(page).send("Storage.clearDataForOrigin", everything)
    watch(page, served.url, (), seen)
    page.goto(served.url)
    page.locator("#welcome p").wait_for()
    yield page
    page.close()
    assert seen == []


@pytest.fixture
def ask():
    """Asks a question and waits until its answer ended."""

    def ask(page, question="Hello?", *, wait=True):
        page.locator("#question").fill(question)
        page.keyboard.press("Enter")
        if wait:
            answered(page)

    return ask


@pytest.fixture
def answers():
    return answered


def answered(page):
    page.locator(".answer:last-child[aria-busy=false]").wait_for(state="attached")
    page.locator("#send:not([hidden])").wait_for()
