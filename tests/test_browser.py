"""The whole page in a headless Chromium, against a server that answers by a script. Slow; skipped where there is no Chromium.

JEVONS_SCREENSHOTS names a folder that pictures are written to; those in docs/ came from here.
"""

# ruff: noqa: RUF001  (the page's dashes)

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from jevons.server.page import router

pytestmark = pytest.mark.slow

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)

THINKING = """The gate scores every expert, keeps the best $k$, and normalises their scores. So for a token $u_t$ I need $s_{i,t}$ first.

Then the shared expert is added without a gate. Let me also show the load: **bias**, not an auxiliary loss.

A short function will make it concrete; the loop over experts is the clearest form."""

ANSWER = r"""A mixture-of-experts layer replaces one large feed-forward network with many small ones. For each token, a **gate**
picks the few that run.

### The gate

With centroid $e_i$ of expert $i$ and a token's state $u_t$, the affinity is a sigmoid, and only the best $k$ count:

$$
s_{i,t} = \sigma\!\left(u_t^{\top} e_i\right), \qquad
g_{i,t} = \begin{cases} \dfrac{s_{i,t}}{\sum_{j \in \mathcal{T}_t} s_{j,t}} & i \in \mathcal{T}_t \\ 0 & \text{otherwise} \end{cases}
$$

```python
def route(u, centroids, bias, k=8):
    \"\"\"The k experts of each token, and their weights.\"\"\"
    s = torch.sigmoid(u @ centroids.T)
    chosen = (s + bias).topk(k, dim=-1).indices  # bias steers load only
    g = s.gather(-1, chosen)
    return chosen, g / g.sum(-1, keepdim=True)
```

| model | experts | active | share |
|:--|--:|--:|--:|
| DeepSeek-V2 | 160 | 6 | 3.8 % |
| DeepSeek-V3 | 256 | 8 | 3.1 % |

1. The bias is raised for experts with too little work and lowered for those with too much.
2. It changes *which* experts run, never how much they count.
""".replace('\\"', '"')

HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script>

[click](javascript:window.hacked=1) ![pixel](https://evil.test/p.png) [fine](https://example.test/)

$\\text{<img src=x onerror=window.hacked=1>}$

```html
<script>window.hacked = 1</script>
```
"""


class Script:
    """A server that answers as the last message asks, records what it was sent, and holds replies at a gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.cut = 0  # streams whose client went away
        self.polls = 0
        self.key: str | None = None
        self.random = random.Random(1)

    async def wait(self) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)

    async def stream(self, body: dict, request: Request):
        last = body["messages"][-1]["content"]
        completed = False
        pace = 0.02 if "slowly" in last else 0.001

        def chunk(**fields) -> str:
            common = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
            return f"data: {json.dumps(common | fields)}\n\n"

        def delta(**fields) -> str:
            return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": None}])

        try:
            yield ": keep-alive\n\n"
            yield delta(role="assistant", reasoning_content="")
            if "plainly" not in last:
                for word in re.findall(r"\S+\s*", THINKING):
                    yield delta(reasoning_content=word)
                    await asyncio.sleep(pace)
                await self.wait()
            texts = {"hostile": HOSTILE, "endless": "word " * 5000, "plainly": f"You said: {last}", "": ANSWER}
            text = next(text for word, text in texts.items() if word in last)
            for i, word in enumerate(re.findall(r"\S+\s*", text)):
                yield delta(content=word)
                await asyncio.sleep(pace)
                if "break" in last and i == 20:
                    yield f"data: {json.dumps({'error': {'message': 'the engine was restarted', 'type': 'server_error', 'code': 'x'}})}\n\n"
                    completed = True
                    return
                if "cut" in last and i == 20:
                    completed = True
                    return
            yield chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            usage = {"prompt_tokens": 1310, "completion_tokens": 412, "prompt_cache_hit_tokens": 1024, "prompt_cache_miss_tokens": 286}
            usage |= {"completion_tokens_details": {"reasoning_tokens": 87}, "total_tokens": 1722}
            yield chunk(choices=[], usage=usage | {"jevons": {"cost": 0.000253, "time": {"first_token": 0.21, "duration": 11.03}}})
            yield "data: [DONE]\n\n"
            completed = True
        finally:
            self.cut += not completed

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(router())

        @app.get("/v1/models")
        async def models(request: Request):
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no key", "type": "authentication_error"}}, 401)
            names = ["dsv3-mini", "deepseek-chat", "deepseek-reasoner"]
            return {"object": "list", "data": [{"id": name, "object": "model", "created": 1, "owned_by": "jevons"} for name in names]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            body = await request.json()
            self.bodies.append(body)
            self.keys.append(request.headers.get("authorization"))
            if "too fast" in body["messages"][-1]["content"]:
                error = {"message": "This key may send 2 requests a second.", "type": "rate_limit_error", "param": None, "code": "rate"}
                return JSONResponse({"error": error}, 429, {"retry-after": "1"})
            return StreamingResponse(self.stream(body, request), media_type="text/event-stream")

        @app.get("/state")
        async def state():
            self.polls += 1
            load = 0.55 + 0.3 * math.sin(self.polls / 40) + 0.12 * math.sin(self.polls / 7) + self.random.uniform(-0.05, 0.05)
            return {
                "model": "dsv3-mini", "version": "0.1.0", "uptime": 93784, "requests_today": 4127, "money_today": 1.2345,
                "running": round(16 * load), "waiting": max(0, round(9 * load - 5)), "hit_rate": 0.874,
                "cache": {"total_blocks": 2048, "used_blocks": round(1500 * load), "cached_blocks": 400 + self.polls // 2},
                "prompt_tokens_per_second": max(0, self.random.gauss(1400, 500) * load),
                "completion_tokens_per_second": 140 * load + self.random.uniform(-6, 6),
            }  # fmt: skip

        return app


@pytest.fixture(scope="module")
def script():
    script = Script()
    server = uvicorn.Server(uvicorn.Config(script.app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    script.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    yield script
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, script):
    """`visit(**options)`: a page in a fresh browser profile. At the end: nothing asked of another host, no error on the console."""
    contexts, requests, errors = [], [], []
    script.gate.set()
    script.key = None
    script.bodies.clear()

    def open_page(**options):
        options = {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(script.url)
        page.wait_for_selector("#model option", state="attached")
        return page

    yield SimpleNamespace(page=open_page, errors=errors)
    for context in contexts:
        context.close()
    assert requests and all(url.startswith((script.url, "data:", "blob:")) for url in requests)
    assert errors == []


def send(page, text):
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def finished(page, replies=1):
    ended = f"document.querySelectorAll('.reply[aria-busy=false]').length === {replies}"
    until(page, f"{ended} && document.querySelector('#send').title === 'Send'")


def until(page, expression, arg=None):
    """Playwright's own wait_for_function evaluates strings inside the page, which the page's policy refuses."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def picture(page, name):
    folder = os.environ.get("JEVONS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.mouse.move(640, 5)
        page.wait_for_timeout(300)  # transitions
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_send_watch_the_thinking_and_read_the_reply(visit, script):
    page = visit.page(viewport={"width": 1280, "height": 1080})
    picture(page, "page-empty")
    script.gate.clear()
    send(page, "How does a mixture-of-experts layer route a token?")
    thinking = page.locator(".thinking")
    until(page, "document.querySelector('.thinking .text')?.textContent.includes('clearest form')")
    assert thinking.get_attribute("open") is not None  # seen while it comes
    label = thinking.locator("summary span")
    first = label.inner_text()
    assert re.fullmatch(r"Thinking for \d+\.\d s", first)
    until(page, "text => document.querySelector('.thinking summary span').textContent !== text", arg=first)  # the timer runs
    assert page.locator("#send").get_attribute("title") == "Stop"
    picture(page, "page-thinking")
    script.gate.set()
    finished(page)
    assert thinking.get_attribute("open") is None  # folded
    assert re.fullmatch(r"Thought for [\d.]+ s", label.inner_text())
    label.click()
    assert page.locator(".thinking .text").is_visible()
    label.click()
    body = page.locator(".reply > .text")
    assert body.locator("math[display=block] mtable").count() == 1 and body.locator("td.right").count() == 6
    assert body.locator(".hl-keyword").first.inner_text() == "def" and body.locator("h3").inner_text() == "The gate"
    figures = page.locator(".figures").inner_text()
    for part in ("412 tokens", "38.0 tok/s", "first in 0.21 s", "1,024 cached", "$0.00025", "dsv3-mini"):
        assert part in figures
    body_sent = script.bodies[-1]
    assert body_sent["stream"] and body_sent["stream_options"] == {"include_usage": True} and body_sent["model"] == "dsv3-mini"
    assert "temperature" not in body_sent and "thinking" not in body_sent
    assert page.locator("#conversations .name").inner_text().startswith("How does a mixture")
    picture(page, "page-chat")
    # a second question carries the first reply, without its thinking
    send(page, "and plainly?")
    finished(page, 2)
    assert [m["role"] for m in script.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert script.bodies[-1]["messages"][1]["content"].strip() == ANSWER.strip()


def test_stop_keeps_what_came_and_retry_asks_again(visit, script):
    page = visit.page()
    cut = script.cut
    send(page, "endless, slowly")
    until(page, "document.querySelector('.reply > .text')?.textContent.length > 40")
    page.click("#send")
    finished(page)
    kept = page.locator(".reply > .text").inner_text()
    assert len(kept) > 40 and "Stopped" in page.locator(".figures").inner_text()
    deadline = time.monotonic() + 30
    while script.cut == cut and time.monotonic() < deadline:
        time.sleep(0.02)
    assert script.cut == cut + 1  # the server saw the client go
    page.reload()
    assert page.locator(".reply > .text").inner_text() == kept
    page.wait_for_selector("#model option", state="attached")
    page.locator(".reply").hover()
    page.click("footer .retry")
    until(page, "document.querySelector('.reply > .text')?.textContent.length > 5")
    assert page.locator(".reply").count() == 1 and len(script.bodies) == 2
    assert script.bodies[0]["messages"] == script.bodies[1]["messages"]
    page.keyboard.press("Escape")
    finished(page)


def test_conversations_go_on_side_by_side_and_a_deleted_one_stays_deleted(visit, script):
    page = visit.page()
    send(page, "endless, slowly")
    until(page, "document.querySelector('.reply > .text')?.textContent.length > 5")
    page.click("#new")
    send(page, "plainly")
    finished(page)
    assert page.locator(".dot").count() == 1  # the first is still coming
    page.locator("#conversations .name", has_text="endless").click()
    until(page, "document.querySelector('.bubble')?.textContent === 'endless, slowly'")
    length = len(page.locator(".reply > .text").inner_text())
    until(page, "length => document.querySelector('.reply > .text').textContent.length > length", length)
    page.locator("#conversations li.here").hover()
    page.locator("#conversations li.here").get_by_label("Delete").click()
    until(page, "document.querySelectorAll('.dot').length === 0")
    assert page.locator(".welcome").is_visible()
    page.wait_for_timeout(500)  # longer than a write waits
    page.reload()
    assert page.locator("#conversations .name").all_inner_texts() == ["plainly"]


def test_a_reload_keeps_conversations_also_in_mid_reply(visit, script):
    page = visit.page()
    send(page, "say it plainly")
    finished(page)
    page.click("#new")
    script.gate.clear()
    send(page, "the second one")
    until(page, "document.querySelector('.thinking .text')?.textContent.includes('clearest form')")
    page.reload()
    assert page.locator(".bubble").inner_text() == "the second one"
    assert "clearest form" in page.locator(".thinking .text").text_content()
    assert "interrupted" in page.locator(".reply .trouble").inner_text()
    assert page.locator("#conversations .name").count() == 2
    script.gate.set()
    page.click(".trouble .retry")
    finished(page)
    page.locator("#conversations .name", has_text="say it").click()  # a link: the page turns to it an event later
    until(page, "document.querySelector('.bubble')?.textContent === 'say it plainly'")
    assert page.locator(".reply > .text").inner_text() == "You said: say it plainly"
    page.go_back()
    until(page, "document.querySelector('.bubble')?.textContent === 'the second one'")
    # rename, search, delete, undo
    row = page.locator("#conversations li", has_text="say it")
    row.hover()
    row.get_by_label("Rename").click()
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    page.fill("#search", "renam")
    assert page.locator("#conversations .name").all_inner_texts() == ["Renamed"]
    page.locator("#conversations li").hover()
    page.get_by_label("Delete").click()
    assert page.locator("#conversations .name").count() == 0
    page.click("#toast button")
    assert page.locator("#conversations .name").all_inner_texts() == ["Renamed"]
    page.fill("#search", "")
    # export, and import under new names
    with page.expect_download() as waiting:
        page.click("#export-all")
    exported = json.loads(Path(waiting.value.path()).read_text())
    assert sorted(c["title"] for c in exported["conversations"]) == ["Renamed", "the second one"]
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(exported).encode()})
    until(page, "document.querySelectorAll('#conversations .name').length === 4")
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b"[1]"})
    page.wait_for_selector("text=not an export")


def test_edit_a_message(visit, script):
    page = visit.page()
    send(page, "plainly one")
    finished(page)
    send(page, "plainly two")
    finished(page, 2)
    page.locator(".user").first.hover()
    page.get_by_label("Edit message").first.click()
    page.locator(".editor textarea").fill("plainly three")
    page.keyboard.press("Enter")
    finished(page, 1)
    assert page.locator(".bubble").all_inner_texts() == ["plainly three"]
    assert script.bodies[-1]["messages"] == [{"role": "user", "content": "plainly three"}]


def test_settings_hold_and_are_sent(visit, script):
    page = visit.page()
    page.click("#open-settings")
    texts = {"system": "Be brief.", "temperature": "0.6", "top_p": "0.95", "top_k": "40", "min_p": "0.05"}
    for name, value in (texts | {"max_tokens": "900", "seed": "7", "budget": "256"}).items():
        page.fill(f"#settings [name={name}]", value)
    page.select_option("#settings [name=effort]", "high")
    page.fill("#settings [name=key]", "sk-test")
    page.fill("#settings [name=top_p]", "1.5")  # makes no sense: marked, the last good value holds
    assert page.locator("#settings [name=top_p]").get_attribute("aria-invalid") == "true"
    picture(page, "page-settings")
    page.keyboard.press("Escape")
    page.select_option("#model", "deepseek-reasoner")
    page.select_option("#thinking", "on")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    send(page, "plainly")
    finished(page)
    body = script.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and body["model"] == "deepseek-reasoner"
    sent = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "thinking", "reasoning_effort")}
    assert sent == {
        "temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.05, "max_tokens": 900, "seed": 7,
        "thinking": {"type": "enabled", "budget_tokens": 256}, "reasoning_effort": "high",
    }  # fmt: skip
    assert script.keys[-1] == "Bearer sk-test"


def test_errors_are_shown_as_they_are(visit, script):
    page = visit.page()
    send(page, "too fast")
    finished(page)
    trouble = page.locator(".reply .trouble")
    assert "429 rate_limit_error" in trouble.inner_text() and "2 requests a second" in trouble.inner_text()
    assert trouble.locator("button").is_disabled() and "Retry in 1 s" in trouble.inner_text()
    until(page, "!document.querySelector('.trouble button').disabled")
    page.click("#new")
    send(page, "plainly break: " + "and so on " * 20)
    finished(page)
    assert "the engine was restarted" in trouble.inner_text() and page.locator(".reply > .text").inner_text().startswith("You said")
    page.click("#new")
    send(page, "plainly cut: " + "and so on " * 20)
    finished(page)
    assert "closed before its end" in trouble.inner_text()
    script.key = "sk-right"
    page.reload()
    page.click("#notice button")
    page.keyboard.type("sk-right")
    page.wait_for_selector("#notice", state="hidden")
    assert [e for e in visit.errors if "429" not in e and "401" not in e] == []  # the browser's own lines on failed loads
    visit.errors.clear()


def test_a_hostile_reply_stays_text(visit, script):
    page = visit.page()
    send(page, "hostile")
    finished(page)
    body = page.locator(".reply > .text")
    assert page.evaluate("window.hacked") is None
    assert body.locator("img, script, iframe").count() == 0 and "<script>window.hacked=1</script>" in body.inner_text()
    assert [a.get_attribute("href") for a in body.locator("a").all()] == ["https://evil.test/p.png", "https://example.test/"]
    assert body.locator("a").first.get_attribute("rel") == "noopener noreferrer nofollow"
    # and were markup to slip through, the policy refuses it
    assert page.evaluate("try { document.body.innerHTML = '<b>x</b>'; 'parsed' } catch (error) { error.name }") == "TypeError"
    visit.errors.clear()  # the refusal


def test_on_a_phone(visit, script):
    page = visit.page(viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True)
    fits = "document.scrollingElement.scrollWidth <= innerWidth && document.querySelector('#scroll').scrollWidth <= innerWidth"
    assert page.locator("#sidebar").is_hidden()
    page.tap("[aria-label=Conversations].icon-button")
    until(page, "document.querySelector('#sidebar').getBoundingClientRect().left === 0")
    page.tap("#new")
    until(page, "document.querySelector('#sidebar').getBoundingClientRect().right <= 0")
    page.fill("#prompt", "How does a mixture-of-experts layer route a token?")
    page.tap("#send")
    finished(page)
    assert page.evaluate(fits)
    page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    picture(page, "page-phone")
    buttons = "[...document.querySelectorAll('#bar button, #composer button')].filter((b) => b.offsetParent)"
    assert page.evaluate(f"Math.min(...{buttons}.map((b) => b.getBoundingClientRect().height))") >= 36  # a finger's
    page.tap("#tab-live")
    until(page, "document.querySelector('#live-running').textContent !== '–'")
    assert page.evaluate("document.querySelector('#live').scrollWidth <= innerWidth")
    picture(page, "page-phone-live")
    page.tap("#open-settings")
    assert page.evaluate("document.querySelector('#settings').getBoundingClientRect().width <= innerWidth")
    picture(page, "page-phone-settings")


def test_dark_and_light(visit, script):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit.page(color_scheme="light"), visit.page(color_scheme="dark")
    bright, dim = light.evaluate(ground), dark.evaluate(ground)
    assert bright != dim
    send(dark, "How does a mixture-of-experts layer route a token?")
    finished(dark)
    picture(dark, "page-dark")
    dark.click("#open-settings")
    dark.select_option("#settings [name=theme]", "light")
    assert dark.evaluate(ground) == bright  # a choice goes before the system's
    dark.reload()
    assert dark.evaluate(ground) == bright
    dark.click("#open-settings")
    dark.select_option("#settings [name=theme]", "auto")
    assert dark.evaluate(ground) == dim


def test_the_live_tab(visit, script):
    page = visit.page()
    page.click("#tab-live")
    until(page, "document.querySelector('#live-money').textContent === '$1.23'")
    assert page.locator("#live-hits").inner_text() == "87 %" and int(page.locator("#live-running").inner_text()) > 0
    assert "Jevons 0.1.0 · up 1 d 2 h · 4,127 requests today" in page.locator(".about").inner_text()
    until(page, "document.querySelectorAll('.chart path.line')[0].getAttribute('d').split('L').length >= 3")  # it grows
    page.reload()
    assert page.locator("#live").is_visible()  # the address says so
    if os.environ.get("JEVONS_SCREENSHOTS"):  # a picture with some minutes of history: the clock is ours
        page.clock.install()
        page.reload()
        for _ in range(240):
            page.clock.run_for(1000)
            page.wait_for_timeout(20)
        picture(page, "page-live")
    page.keyboard.press("Tab")
    page.click("#tab-chat")
    polls = script.polls
    page.wait_for_timeout(1500)
    assert script.polls <= polls + 1  # hidden: it does not ask


def test_a_server_that_says_little_gives_dashes(visit, script):
    page = visit.page()
    page.route("**/state", lambda route: route.fulfill(json={"running": 1}))
    page.click("#tab-live")
    until(page, "document.querySelector('#live-running').textContent === '1'")
    assert {page.locator(f"#live-{name}").inner_text() for name in ("waiting", "hits", "cache", "money", "completion")} == {"–"}
