"""The chat page without a browser: how its files are served, and what its readers of markdown, TeX, code and events do, run in
node where there is one. tests/test_browser.py drives the whole page."""

# ruff: noqa: RUF001  (letters of mathematics)

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from jevons.server.page import load, router

FOLDER = Path(__file__).parents[1] / "jevons" / "server" / "page"
SOURCES = sorted(FOLDER.iterdir())
PLAYWRIGHT = importlib.util.find_spec("playwright")  # its package has a node inside
NODE = shutil.which("node") or (PLAYWRIGHT and shutil.which(str(Path(PLAYWRIGHT.origin).parent / "driver" / "node")))


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(router())
    return TestClient(app)


def test_every_file_is_served_with_its_type_and_the_policy(client):
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in SOURCES:
        reply = client.get("/" if file.name == "index.html" else f"/page/{file.name}")
        assert reply.status_code == 200 and reply.content == file.read_bytes()
        assert reply.headers["content-type"].partition(";")[0] == types[file.suffix]
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["referrer-policy"] == "no-referrer"
    assert {file.name for file in SOURCES} == load().keys()


def test_an_unchanged_file_is_not_sent_again(client):
    first = client.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client.get("/page/app.js", headers={"if-none-match": known})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == first.headers["etag"]
    assert client.get("/page/app.js", headers={"if-none-match": '"other"'}).content == first.content
    head = client.head("/")
    assert head.status_code == 200 and not head.content


@pytest.mark.parametrize(
    "path", ["../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "index.html", "", "app.js/", "app.js%00", ".", "APP.JS"]
)
def test_nothing_but_the_table_is_served(client, path):
    reply = client.get(f"/page/{path}")
    assert reply.status_code == 404 and "import" not in reply.text


def test_sources_name_no_other_host_and_hold_nothing_inline():
    names = {file.name for file in SOURCES}
    for file in SOURCES:
        text = file.read_text(encoding="utf-8")
        hosts = set(re.findall(r"(?:https?:)?//([\w-]+(?:\.[\w-]+)+)", text))
        assert hosts <= {"www.w3.org"}, file.name  # names of the SVG and MathML languages
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= names
        assert set(re.findall(r'(?:href|src)="page/([^"]+)"', text)) <= names
        if file.suffix == ".js":
            markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc"
            assert not re.search(markup, text), file.name
            assert len(text.splitlines()) <= 400
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", page)


# ---- markdown, TeX, highlighting, events: run in node

MODULES = ("markdown", "math", "highlight", "stream")


def node(expression, data=None):
    """The value of a JavaScript expression that may use the modules by name, and `data`."""
    if NODE is None:
        pytest.skip("no node here")
    code = "".join(f"import * as {name} from {json.dumps((FOLDER / name).with_suffix('.js').as_uri())};\n" for name in MODULES)
    code += 'import { readFileSync } from "node:fs";\nconst data = JSON.parse(readFileSync(0, "utf-8"));\n'
    code += f"console.log(JSON.stringify(await {expression}));"
    command = [NODE, "--input-type=module", "-e", code]
    done = subprocess.run(command, input=json.dumps(data), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def markdown(*texts):
    return node("data.map((text) => markdown.blocks(text).map(markdown.tree))", texts)


def show(tree) -> str:
    if isinstance(tree, str):
        return tree
    if not tree or isinstance(tree[0], list) or not (len(tree) > 1 and isinstance(tree[1], dict)):
        return "".join(map(show, tree))
    tag, _, *children = tree
    return f"<{tag}>{''.join(map(show, children))}</{tag}>"


def tags(tree):
    if isinstance(tree, list):
        if len(tree) > 1 and isinstance(tree[0], str) and isinstance(tree[1], dict):
            yield tree[0], tree[1]
        for child in tree:
            yield from tags(child)


MARKDOWN = {
    "**bold *both*** and __b__ _i_ snake_case_name ~~gone~~": (
        "<p><strong>bold <em>both</em></strong> and <strong>b</strong> <em>i</em> snake_case_name <del>gone</del></p>"
    ),
    "2*3*4 and * no *": "<p>2*3*4 and * no *</p>",
    "`a*b*` ``x`y`` \\*raw\\*": "<p><code>a*b*</code> <code>x`y</code> *raw*</p>",
    "# One #\n### Three": "<h1>One</h1><h3>Three</h3>",
    "a\nb  \nc\\\nd": "<p>a\nb<br></br>c<br></br>d</p>",
    "1. x\n   - y\n   - z\n2. w": "<ol><li>x<ul><li>y</li><li>z</li></ul></li><li>w</li></ol>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "> q\n> > r": "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>",
    "text\n---\nmore": "<p>text</p><hr></hr><p>more</p>",
    "it cost $5 and then $6": "<p>it cost $5 and then $6</p>",
    "[t](https://a.b/c_(d)) ![i](https://x.y/z.png)": "<p><a>t</a> <a>i</a></p>",
    "see https://a.b/c. (or http://d.e)": "<p>see <a>https://a.b/c</a>. (or <a>http://d.e</a>)</p>",
}


def test_markdown_reads_as_it_should():
    for text, tree in zip(MARKDOWN, markdown(*MARKDOWN)):
        assert show(tree) == MARKDOWN[text], text
    [table] = markdown("| a | b |\n|:-:|--:|\n| `x|y` | 1 \\| 2 |\n| only |")
    assert show(table) == (
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td><code>x|y</code></td><td>1 | 2</td></tr>"
        "<tr><td>only</td><td></td></tr></tbody></table></div>"
    )
    for text in ("$x$ y", "\\(x\\)", "$$x$$", "\\[\nx\n\\]", "$$\nx", "\\begin{align}x\\end{align}", "so $$x$$ is"):
        assert "math" in dict(tags(markdown(text))), text


def test_what_a_model_writes_stays_text():
    hostile = [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](JaVaScRiPt:alert(1))",
        "[a]( data:text/html,x)",
    ]
    hostile += [
        "![x](javascript:alert(1))",
        "<javascript:alert(1)>",
        "[a](vbscript:x)",
        "[a](//evil.test)",
        "$\\href{javascript:alert(1)}{x}$",
        "$<script>x</script>$",
    ]
    hostile += ["```html\n<script>alert(1)</script>\n```", "| <script> |\n|---|\n| <iframe src=x> |", "$\\color{red;background:url(x)}{y}$"]
    known = {"p", "a", "span", "code", "br", "em", "strong", "del", "figure", "figcaption", "button", "pre", "div"}
    known |= {"table", "thead", "tbody", "tr", "th", "td", "math", "semantics", "annotation"}
    known |= {"mrow", "mi", "mo", "mn", "mtext", "mstyle", "mspace", "msub", "msup"}
    for text, tree in zip(hostile, markdown(*hostile)):
        for tag, attributes in tags(tree):
            assert tag in known, text
            assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")], text
            assert re.match(r"https?://|mailto:", attributes.get("href", "https://")), text
            assert ";" not in attributes.get("mathcolor", ""), text


def test_hostile_texts_take_linear_time():
    pieces = ["[", "](", "[a](", "*a ", "_a", "`", "` `` ", "$a", "$$", "\\(", "> ", "- ", "<", "![", "http://", "| a |\n", "~~a", "[]("]
    pieces += ["**a *b ", "```\n", "\\begin{align}", "`a|", "$\\frac", "$\\left(", "1. \n", "((", "\\[", "a|b\n-|-\n", "<!--", "#", "\\\\"]
    codes = ['"', "/*", "'''", "${", "@a", "#[", "a:", "---", "<a ", "0x", "\\", "[\n", "a=", "#!"]
    languages = ("python", "js", "c", "rust", "bash", "yaml", "css", "html", "toml", "json")
    texts = [piece * (100_000 // len(piece)) for piece in pieces]
    texts += [f"```{language}\n{code * 20_000}" for code in codes for language in languages]
    seconds = """data.map((text) => {
        const start = process.cpuUsage().user;
        markdown.blocks(text).map(markdown.tree);
        return (process.cpuUsage().user - start) / 1e6;
    })"""
    slow = {text[:20]: taken for text, taken in zip(texts, node(seconds, texts)) if taken > 1.5}
    assert not slow  # a tenth of that if linear; what was quadratic took 3 to 12


MATH = {
    "\\frac12": "<mfrac><mn>1</mn><mn>2</mn></mfrac>",
    "\\sqrt[3]{x+1}": "<mroot><mrow><mi>x</mi><mo>+</mo><mn>1</mn></mrow><mn>3</mn></mroot>",
    "x_i^2": "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>",
    "f''": "<msup><mi>f</mi><mrow><mo>′</mo><mo>′</mo></mrow></msup>",
    "\\sum_{i=1}^n i": "<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover><mi>i</mi>",
    "\\left[\\frac{a}{b}\\right)": "<mrow><mo>[</mo><mfrac><mi>a</mi><mi>b</mi></mfrac><mo>)</mo></mrow>",
    "\\mathbb{R}\\mathcal{L}\\mathbf{x}\\mathrm{d}": "<mi>ℝ</mi><mi>ℒ</mi><mi>𝐱</mi><mi>d</mi>",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}": (
        "<mrow><mo>(</mo><mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>2</mn></mtd></mtr>"
        "<mtr><mtd><mn>3</mn></mtd><mtd><mn>4</mn></mtd></mtr></mtable><mo>)</mo></mrow>"
    ),
    "\\text{if } x \\ne 1,024": "<mtext>if\u00a0</mtext><mi>x</mi><mo>≠</mo><mn>1,024</mn>",
    "\\hat{y}=\\operatorname{softmax}(z)": "<mover><mi>y</mi><mo>^</mo></mover><mo>=</mo><mi>softmax</mi><mo>(</mo><mi>z</mi><mo>)</mo>",
    "\\unknown{x}": "<mtext>\\unknown</mtext><mi>x</mi>",
}


def test_tex_becomes_mathml():
    for (text, expected), tree in zip(MATH.items(), node("data.map((text) => math.math(text))", list(MATH))):
        [_, _, [_, _, [_, _, *nodes], annotation]] = tree
        assert "".join(map(show, nodes)) == expected, text
        assert annotation[2] == text
    signs = [attributes.get("form") for tag, attributes in tags(node("math.math(data)", "-a=-b-c)-d")) if tag == "mo"]
    assert signs == ["prefix", None, "prefix", None, None, None]  # a sign before, an operator between
    # what is broken or too deep is shown, and never throws
    broken = [
        "}",
        "\\end{x}",
        "\\left(",
        "\\right)",
        "&",
        "^",
        "_",
        "\\frac",
        "\\begin{pmatrix}1&",
        "\\begin{aligned}}\\end{aligned}",
        "\\sqrt[",
        "\\text{",
        "\\",
    ]
    assert all(tree[0] == "math" for tree in node("data.map((text) => math.math(text))", broken))
    assert [tree[0] for tree in node("data.map((text) => math.math(text))", ["{" * 1000, "\\sqrt" * 1000, "x" * 30_000])] == ["code"] * 3


def test_highlighting_keeps_the_text_and_marks_it():
    python = 'def f(x):  # why\n    """doc"""\n    return g(x, 0x1F, \'a\') if x else None\n'
    sources = [
        [python, "python"],
        ["const a = `x${1}`; // c\n/* d */", "ts"],
        ["SELECT a FROM t -- c", "sql"],
        ["<a href='x'>&amp;</a>", "html"],
        ["x", "nolanguage"],
    ]
    sources += [
        ['{"a": [1, true]}', "json"],
        ["a: 1 # c\n- b: no", "yaml"],
        ["+a\n-b\n c", "diff"],
        ['let x: &\'a str = "";', "rust"],
        ["echo $A --x # c", "sh"],
    ]
    for (code, name), pieces in zip(sources, node("data.map(([code, name]) => highlight.highlight(code, name))", sources)):
        assert "".join(map(show, [p if isinstance(p, str) else p[2] for p in pieces])) == code, name
    pieces = node("highlight.highlight(data, 'python')", python)
    marked = {p[2]: p[1]["class"] for p in pieces if not isinstance(p, str)}
    assert marked["def"] == marked["return"] == "hl-keyword" and marked["# why"] == "hl-comment" and marked["g"] == "hl-call"
    assert marked['"""doc"""'] == marked["'a'"] == "hl-string" and marked["0x1F"] == "hl-number" and marked["None"] == "hl-constant"


def test_events_are_read_however_the_bytes_are_cut():
    text = 'data: {"a": "é"}\n\n: keep-alive\n\ndata: one\r\ndata: two\r\n\r\nevent: x\ndata:three\r\rdata: [DONE]\n\n'
    collect = """Promise.all([1, 2, 3, 7, 1000].map(async (size) => {
        async function* cut() { for (let i = 0; i < data.length; i += size) yield new Uint8Array(data.slice(i, i + size)); }
        const out = [];
        for await (const event of stream.events(cut())) out.push(event);
        return out;
    }))"""
    assert node(collect, list(text.encode())) == [['{"a": "é"}', "one\ntwo", "three", "[DONE]"]] * 5


def test_requests_hold_what_is_set_and_nothing_else():
    empty = {"model": "m", "system": "", "thinking": "auto", "effort": "", "budget": ""}
    empty |= dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"), "")
    messages = [{"role": "user", "content": "q", "id": "1"}, {"role": "assistant", "content": "a", "reasoning": "r"}]
    full = empty | {"system": "s", "thinking": "on", "effort": "low", "budget": "64", "temperature": "0", "top_k": "40", "seed": "7"}
    plain, rich, off = node(
        "data.map((pair) => stream.requestBody(...pair))", [[empty, messages], [full, messages], [full | {"thinking": "off"}, []]]
    )
    assert plain == {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert rich["messages"][0] == {"role": "system", "content": "s"} and rich["thinking"] == {"type": "enabled", "budget_tokens": 64}
    assert (rich["temperature"], rich["top_k"], rich["seed"], rich["reasoning_effort"]) == (0, 40, 7, "low")
    assert off["thinking"] == {"type": "disabled"} and "reasoning_effort" not in off
