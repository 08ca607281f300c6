"""Takes the pictures of docs/page.md: `python tests/page_pictures.py docs/images`.

The server and the page are real; the answer was written by people, and a rule routes it (`scripted_engine`).
"""

# ruff: noqa: RUF001
# Chinese commas are meant.

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import chromium
from scripted_engine import ScriptedEngine
from serving import serving
from small_lm import lm_config
from small_models import random_model
from yuanmoe.lm import LanguageModel
from yuanmoe.serve.core.launch import Settings, launch_engine
from yuanmoe.text.bpe import train_bpe

ANSWER = """A **mixture of experts** replaces one large feed-forward network by many small ones, and a *router* that \
picks a few of them for every token.

1. The router scores all experts for the token at hand.
2. The best two do the work; the other thirty rest.
3. Their results are added, weighted by the scores.

```python
def route(scores, chosen=2):
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])
    return order[:chosen]
```

So the model *knows* as much as a large one and *costs* as little as a small one.
"""
CHINESE = """**混合专家模型**把一个大的前馈网络换成许多小的专家，再由路由器为每个词元挑选其中几位。

- 路由器给每位专家打分；
- 得分最高的**两位**参与计算，其余的休息；
- 结果按权重相加。
"""
PHONE = {"viewport": {"width": 375, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


def take(folder: Path) -> None:
    """Writes the pictures into a folder."""
    tokenizer = train_bpe([ANSWER, CHINESE] * 4, 700)
    sizes = {"num_hidden_layers": 24, "num_experts": 32, "max_position_embeddings": 4096}
    lm = LanguageModel(random_model(lm_config(tokenizer, **sizes)), tokenizer)
    engine = ScriptedEngine(lm.config, tokenizer)
    with serving(launch_engine(lm, engine, 4096, Settings(model_id="small"))) as url, sync_playwright() as playwright:
        engine.step_s = 0.02  # as somebody reads
        browser = chromium.start(playwright)

        def visit(answer: str, question: str, **options) -> Page:
            page = browser.new_page(**{"viewport": {"width": 1200, "height": 760}} | options)
            page.goto(url)
            page.locator("#welcome p").wait_for()
            engine.script = [answer]
            page.locator("#question").fill(question)
            page.keyboard.press("Enter")
            page.locator(".answer[aria-busy=false]").wait_for()
            return page

        page = visit(ANSWER, "What is a mixture of experts?")
        page.screenshot(path=folder / "page-chat.png")
        page.get_by_role("radio", name="Experts", exact=True).check()
        page.set_viewport_size({"width": 1200, "height": 660})
        page.locator(".token").nth(14).hover()
        page.wait_for_timeout(400)
        page.screenshot(path=folder / "page-experts.png")
        page = visit(CHINESE, "什么是混合专家模型？", locale="zh-CN", color_scheme="dark", **PHONE)
        page.get_by_role("radio", name="专家", exact=True).check()
        page.wait_for_timeout(400)
        page.screenshot(path=folder / "page-phone.png", scale="css")
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]))
