"""What the report shows, what it leaves out, and what it never lets through."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jevons.plot import EDGES, Axis, dollars, draw_heat, duration, fit_axis, heat_level, mean_loads, number, smooth, spread, thin_out
from jevons.record import read_metrics
from jevons.report import write_report

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\ud83d"


def write_rows(folder: Path, rows: list[dict], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def training_rows(steps: int, stage: str = "pretrain") -> list[dict]:
    return [
        {"stage": stage, "step": s, "tokens": 100 * s, "loss": 1 + 8 / s, "lr": 0.001, "seconds": 2.0 * s, "money": 0.01 * s}
        for s in range(1, steps + 1)
    ]


def full_run(folder: Path, text: str = "plain") -> None:
    """A run with every section, with `text` in every place where a stranger's words can stand."""
    sample = {"prompt": f"p {text}", "reply": f"<think>why {text}</think>so {text}", "correct": False}
    rows = [
        *training_rows(30, stage="pretrain"),
        {"stage": "pretrain", "step": 30, "validation_loss": 1.5, "bits_per_byte": 0.9},
        {"stage": "pretrain", "step": 30, "loads": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4]},
        {"stage": "pretrain", "step": 30, "sample": sample},
        *({"stage": f"odd {text}", "step": s, f"field {text}": s} for s in (1, 2)),
    ]
    write_rows(folder, rows)
    encoded = text.encode(errors="replace").decode()
    (folder / "recipe.toml").write_text(f"name = '''name {encoded}'''\n[model]\nhidden_size = 64\nnum_hidden_layers = 2\n")
    (folder / "environment.json").write_text(json.dumps({"device": f"chip {text}"}))
    (folder / "evaluate").mkdir()
    task = {
        "task": f"sums {text}", "accuracy": 0.834, "low": 0.79, "high": 0.87, "problems": 300, "mean_tokens": 61.2,
        "by_difficulty": {text: 0.5}, "examples": [{"prompt": text, "reply": text, "answer": text, "correct": True}],
    }  # fmt: skip
    (folder / "evaluate" / "results.json").write_text(json.dumps({"tasks": [task], "validation_loss": 1.234, "bits_per_byte": 0.777}))
    stage = {
        "stage": f"pretrain {text}", "tokens": 3000, "flops": 2.5e13, "seconds": 7200, "tokens_per_second": None, "tflops": None,
        "share_of_peak": None, "device": text, "device_hours": 2, "price_per_hour": 1.5, "money": 3.0,
        "planned": {"tokens": 4000, "flops": None, "seconds": 9000, "money": 3.75},
    }  # fmt: skip
    receipt = {"run": "r", "stages": [stage], "total": {"seconds": 7200, "device_hours": 2, "money": 3.0}}
    (folder / "receipt.json").write_text(json.dumps(receipt))


class Page(HTMLParser):
    """Tags, attributes and text of a page as a browser sees them; asserts that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def headings(html: str) -> list[str]:
    return re.findall(r"<h[23]>(.*?)</h[23]>", html)


def test_full_report_tells_what_how_well_and_what_it_cost(tmp_path: Path) -> None:
    full_run(tmp_path)
    path = write_report(tmp_path)
    html = path.read_text()
    words = " ".join(Page(html).text)
    assert path == tmp_path / "report.html" and not list(tmp_path.glob(".report*"))
    assert headings(html) == [
        "Evaluation", "Pretraining", "The same problems, step by step", "Load of the experts", "odd plain", "Receipt", "Run it again",
    ]  # fmt: skip
    for word in ("83.4%", "79% to 87%", "1.23", "0.777 bits", "2 h", "$3.00", "planned 4,000", "planned $3.75", "2.5e13", "2 layers"):
        assert word in words, word
    assert "2 of 8 experts are dead" in words and "layer 0 expert 2, layer 0 expert 3" in words


@pytest.mark.parametrize(
    ("file", "gone"),
    [
        ("recipe.toml", []),
        ("evaluate/results.json", ["Evaluation"]),
        ("receipt.json", ["Receipt"]),
        ("metrics.jsonl", ["Pretraining", "The same problems, step by step", "Load of the experts", "odd plain"]),
    ],
)
def test_missing_file_leaves_its_section_out(tmp_path: Path, file: str, gone: list[str]) -> None:
    full_run(tmp_path)
    before = headings(write_report(tmp_path).read_text())
    (tmp_path / file).unlink()
    after = write_report(tmp_path).read_text()
    Page(after)
    assert headings(after) == [heading for heading in before if heading not in gone]


def test_empty_folder_is_a_page_with_its_name(tmp_path: Path) -> None:
    html = write_report(tmp_path).read_text()
    assert headings(html) == [] and f"<h1>{tmp_path.name}</h1>" in html


def test_running_run_counts_from_its_metrics(tmp_path: Path) -> None:
    write_rows(tmp_path, [*training_rows(30), {"stage": "pretrain", "step": 30, "loads": []}, *training_rows(10, "sft")])
    words = " ".join(Page(write_report(tmp_path).read_text()).text)
    assert "No receipt yet" in words
    for word in ("4,000", "40 steps", "1 min", "$0.40"):
        assert word in words, word


def test_torn_last_line_is_skipped_and_counted(tmp_path: Path) -> None:
    write_rows(tmp_path, training_rows(3), tail='{"stage":"pretrain","step":4,"lo')
    stages, torn = read_metrics(tmp_path / "metrics.jsonl")
    assert torn == 1 and sorted(stages["pretrain"].series["loss"]) == [1, 2, 3]
    assert "cut short by a kill" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("bad", ['{"stage":"pretrain","st', "[]", '{"step": 1}', '{"stage":"x","step":"1"}', "\ufffd"])
def test_bad_line_elsewhere_names_file_and_line(tmp_path: Path, bad: str) -> None:
    good = json.dumps(training_rows(1)[0])
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2"):
        write_report(tmp_path)
    assert not list(tmp_path.glob("*report*"))


def test_unreadable_json_and_toml_name_the_file(tmp_path: Path) -> None:
    for name in ("receipt.json", "recipe.toml"):
        (tmp_path / name).write_text("{ no")
        with pytest.raises(ValueError, match=name):
            write_report(tmp_path)
        (tmp_path / name).unlink()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """The same tags and attributes as with harmless words, and every hostile word is there to read."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    full_run(tmp_path / "a", "x" * len(HOSTILE))
    full_run(tmp_path / "b", HOSTILE)
    plain, hostile = (Page(write_report(tmp_path / name).read_text(encoding="utf-8")) for name in "ab")
    assert hostile.tags == plain.tags and hostile.attributes == plain.attributes
    assert hostile.tags.count("script") == 1 and "img" not in hostile.tags and "onerror" not in hostile.attributes
    assert sum("</script><img src=x onerror=alert(1)>" in text for text in hostile.text) >= 10


def test_page_stands_alone(tmp_path: Path) -> None:
    full_run(tmp_path)
    html = write_report(tmp_path).read_text()
    assert not re.search(r"https?://|@import|url\(|\bsrc=|\bhref=", html)
    assert "prefers-color-scheme:dark" in html and "width=device-width" in html


def rl_rows(steps: int, *, parts: bool = True, text: str = "") -> list[dict]:
    """What a stage of reinforcement learning logs: rows, measurements on held-out problems, and answers to the same problem."""
    rows: list[dict] = [{"stage": "rl", "step": 0, "held_out": 0.125}]
    for s in range(1, steps + 1):
        row: dict = {"stage": "rl", "step": s, "accuracy": 0.1 + s / 100, "reward": 0.1 + s / 100, "loss": -0.001 * s, "lr": 1e-4}
        row |= {"no_signal": 0.25, "mismatch_max": 0.01 * s, "kl": 0.0, "ratio": 1 + 1e-5 * s, "response_tokens": 90.0 - s}
        row |= {"tokens": 800 * s, "seconds": 2.0 * s}
        row |= {"reward_correct": 0.1 + s / 100, "reward_format": 0.2, "reward": 0.3 + s / 100} if parts else {}
        rows.append(row | {f"oddity {text}": s / 2} if text else row)
        if s % 10 == 0:
            sample = {"prompt": f"p {text}", "reply": f"<think>r {text}</think>right {s}", "correct": s > 10}
            sample |= {"other": {"reply": f"wrong {s} {text}", "correct": False}} if s > 10 else {}
            rows += [{"stage": "rl", "step": s, "sample": sample}, {"stage": "rl", "step": s, "held_out": 0.125 + s / 100}]
    return rows


def taught_run(folder: Path, text: str = "plain") -> None:
    """A run that was pretrained, taught by reinforcement, and measured before and after that."""
    write_rows(folder, [*training_rows(10), *rl_rows(30, text=text)])
    task = {"task": f"sums {text}", "problems": 200, "mean_tokens": 61.2, "by_category": {f"kind {text}": 0.5, "other": 1.0}}
    before = {**task, "accuracy": 0.125, "low": 0.08, "high": 0.18, "by_difficulty": {text: 0.125}}
    after = {**task, "accuracy": 0.655, "low": 0.59, "high": 0.72, "by_difficulty": {text: 0.5, "2": 0.75}}
    after["gain"] = {"value": 0.53, "low": 0.46, "high": 0.6}
    (folder / "evaluate").mkdir()
    (folder / "evaluate/results.json").write_text(json.dumps({"tasks": [after], "before": {"model": "m", "tasks": [before]}}))


def charts(html: str) -> dict[str, str]:
    """Charts by their title."""
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    return {re.search(r"<figcaption>([^<]*)", figure).group(1).strip(): figure for figure in figures}  # type: ignore[union-attr]


def test_before_and_after_reinforcement_learning_stand_beside_each_other(tmp_path: Path) -> None:
    taught_run(tmp_path)
    html = write_report(tmp_path).read_text()
    words = " ".join(Page(html).text)
    assert "12.5% \u2192 65.5%" in words and "+53 points (+46 to +60), 200 problems" in words
    assert "It solves 65.5% of sums plain (12.5% before reinforcement learning)" in words
    assert html.count('class="track was"') == html.count('class="track"') == 1
    assert html.count('class="was" style="width:12.5%"') == 1  # the level that both have
    assert "by difficulty" in words and "by category" in words


def test_reinforcement_learning_shows_right_answers_large_and_its_loss_small(tmp_path: Path) -> None:
    taught_run(tmp_path)
    html = write_report(tmp_path).read_text()
    section = html[html.index("<h2>Reinforcement learning</h2>") :]
    drawn = charts(section)
    assert list(drawn)[:2] == ["Right answers, percent", "Reward and its parts"]
    assert "height:280px" in drawn["Right answers, percent"] and "height:120px" in drawn["Loss"]
    assert re.findall(r'data-name="(.*?)"', drawn["Right answers, percent"]) == ["training", "held out"]
    assert re.findall(r'data-name="(.*?)"', drawn["Reward and its parts"]) == ["reward", "correct", "format"]
    assert {"Tokens of a reply", "Sampler against trainer, worst token", "Ratio of new to old probability"} <= drawn.keys()
    words = " ".join(Page(section[: section.index("</section>")]).text)
    assert "42.5% of held-out problems are answered right, 12.5% at the start." in words
    assert "25% of the groups had equal rewards and taught nothing." in words and "differ by more than 0.3 nats" in words
    assert "The same at all steps:" in words and "KL to the reference, nats per token 0" in words and "Learning rate 0.0001" in words


def test_a_reward_that_is_the_accuracy_is_drawn_once(tmp_path: Path) -> None:
    write_rows(tmp_path, rl_rows(12, parts=False))
    html = write_report(tmp_path).read_text()
    drawn = charts(html)
    assert "Right answers, percent" in drawn and not [title for title in drawn if title.startswith("Reward")]
    assert "training loss" not in html  # the policy's is nobody's measure


def test_each_task_has_a_curve_where_several_are_trained(tmp_path: Path) -> None:
    more = [{"stage": "rl", "step": s, "held_out": 0.5, "held_out_sums": 0.4, "held_out_games": 0.6} for s in (0, 10)]
    write_rows(tmp_path, [*rl_rows(9), *more])
    chart = charts(write_report(tmp_path).read_text())["Right answers, percent"]
    assert re.findall(r'data-name="(.*?)"', chart) == ["training", "held out", "sums", "games"]


def test_a_right_answer_stands_beside_a_wrong_one(tmp_path: Path) -> None:
    taught_run(tmp_path)
    rows = re.findall(r"<li>.*?</li>", write_report(tmp_path).read_text(), re.DOTALL)
    assert [re.findall(r'title="(right|wrong)"', row) for row in rows] == [["wrong"], ["right", "wrong"], ["right", "wrong"]]
    assert "right 20" in rows[1] and "wrong 20 plain" in rows[1]


def test_hostile_answers_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    taught_run(tmp_path / "a", "x" * len(HOSTILE))
    taught_run(tmp_path / "b", HOSTILE)
    plain, hostile = (Page(write_report(tmp_path / name).read_text(encoding="utf-8")) for name in "ab")
    assert hostile.tags == plain.tags and hostile.attributes == plain.attributes and "img" not in hostile.tags


def test_ticks_are_told_apart(tmp_path: Path) -> None:
    write_rows(tmp_path, rl_rows(30))
    for chart in charts(write_report(tmp_path).read_text()).values():
        ticks = re.findall(r'<i class="y"[^>]*>(.*?)</i>', chart)
        assert len(set(ticks)) == len(ticks)


def test_drawings_are_well_formed_and_inside_their_box(tmp_path: Path) -> None:
    full_run(tmp_path)
    drawings = re.findall(r"<svg.*?</svg>", write_report(tmp_path).read_text(), re.DOTALL)
    assert len(drawings) > 6
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for path in root.iter("path"):
            points = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"].replace(" .", " 0."))
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


def test_loss_that_breaks_is_called_out_and_repeated_steps_count_once(tmp_path: Path) -> None:
    rows = [*training_rows(30), {"stage": "pretrain", "step": 29, "loss": 5.0}, {"stage": "pretrain", "step": 31, "loss": math.nan}]
    write_rows(tmp_path, rows)
    html = write_report(tmp_path).read_text()
    assert "loss is not finite</b> from step 31" in html and "nan" not in re.sub(r"<script>.*</script>", "", html).lower()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["pretrain"].series["loss"][29] == 5.0


def test_hundred_thousand_steps_stay_below_a_megabyte(tmp_path: Path) -> None:
    line = '{"stage":"pretrain","step":%d,"tokens":%d,"loss":%f,"lr":%f,"grad_norm":%f,"max_violation":%f}\n'
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for s in range(1, 100_001):
            noise = (s * 7919 % 1000) / 1000
            file.write(line % (s, s * 8, 2 + noise, 1e-3 + noise, 1 + noise, noise))
        for s in range(1, 2001):
            file.write(json.dumps({"stage": "pretrain", "step": s, "sample": {"prompt": "p", "reply": "r" * 9000, "correct": True}}) + "\n")
    assert write_report(tmp_path).stat().st_size < 300_000


def test_downsampling_keeps_ends_and_extremes() -> None:
    points = [(float(x), math.sin(x / 900) + (x * 7919 % 13) / 50) for x in range(100_000)]
    points[31_234], points[77_001] = (31_234.0, 50.0), (77_001.0, -50.0)
    kept = thin_out(points)
    assert len(kept) <= 1000 and kept == sorted(set(kept)) and set(kept) <= set(points)
    assert {points[0], points[-1], points[31_234], points[77_001]} <= set(kept)
    assert thin_out(points[:1000]) == points[:1000]


def test_running_mean_bends_no_line_and_keeps_its_start() -> None:
    line = [(float(x), 3.0 * x + 1) for x in range(1000)]
    smoothed = smooth(line)
    assert [y for _, y in smoothed[:980]] == pytest.approx([y for _, y in line[:980]])
    assert smoothed[-1][1] == pytest.approx(sum(y for _, y in line[-16:]) / 16)


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 3000), [0, 1000, 2000, 3000]),
        (Axis(-0.2, 1.1), [0, 0.5, 1]),
        (Axis(1.4, 11, log=True), [2, 5, 10]),
        (Axis(1e-4, 1e2, log=True), [1e-4, 1e-2, 1, 100]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks(3) == pytest.approx(ticks)


def test_axis_is_logarithmic_only_where_it_fits() -> None:
    assert fit_axis([1, 10], log_ratio=3).log and not fit_axis([1, 2], log_ratio=3).log and not fit_axis([0, 10], log_ratio=3).log
    assert fit_axis([4.0], zero=True).low == 0 and fit_axis([-1, 1], zero=True).low < -1
    for flat in (fit_axis([0.0]), fit_axis([5.0, 5.0]), fit_axis([1e-9])):
        assert flat.ticks() and 0 < flat.place((flat.low + flat.high) / 2) < 1


def test_labels_are_spread_and_stay_inside() -> None:
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.5, 0.6])
    assert spread([0.99, 0.98], 0.1) == pytest.approx([0.95, 0.85])


def test_heat_map_cells_are_load_over_fair_share() -> None:
    loads = [[[0.5, 0.5, 0, 0]], [[0.5, 0.3, 0.2, 0]], [[0.25] * 4], [[0.25] * 4]]
    cells = mean_loads(loads, 2)[0]
    assert [round(cell, 9) for row in cells for cell in row] == [2, 1, 1.6, 1, 0.4, 1, 0, 1]
    assert mean_loads(loads, 80)[0][1] == pytest.approx([2, 1.2, 1, 1])
    assert heat_level(0) == 0 and heat_level(1) == 5 and heat_level(20) == len(EDGES) == 10
    assert all(heat_level(1 / v) == 10 - heat_level(v) for v in (0.05, 0.2, 0.3, 0.6, 0.8, 1))
    svg = draw_heat("MoE layer 0", [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]], [1, 2, 3, 4])
    assert '<path class="h0" d="M0 0.5h2"/>' in svg and '<path class="h5" d="M2 0.5h1M0 1.5h3"/>' in svg


def test_loads_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"stage": "pretrain", "step": s, "loads": [[1 / s] * s]} for s in (2, 3)])
    with pytest.raises(ValueError, match=r"line 2.*loads"):
        write_report(tmp_path)


def test_numbers_for_people() -> None:
    values = (0, 0.00031, 1.2e-7, 1.6, 83, 1234, 12_345, 999_999, 49.2e6, 15e12, 2.1e15, -0.5)
    assert [number(v) for v in values] == ["0", "0.00031", "1.2e-7", "1.6", "83", "1,234", "12.3k", "1M", "49.2M", "15T", "2.1e15", "-0.5"]
    assert [duration(s) for s in (0.5, 19.2, 59.9, 9660, 7200, 100_000)] == ["0.5 s", "19 s", "60 s", "2 h 41 min", "2 h", "1 d 3 h"]
    money = {0: "$0.00", 4.26e-7: "$0.00000043", 0.0003: "$0.0003", 0.0999: "$0.1", 0.35: "$0.35", 1234.5: "$1,234.50"}
    assert {m: dollars(m) for m in money} == money


def test_moments_of_one_problem():
    from jevons.stages.moment import moments

    def row(stage, step, prompt, correct):
        return {"stage": stage, "step": step, "sample": {"prompt": prompt, "reply": f"{stage}{step}", "correct": correct}}

    rows = [row("pretrain", 10, "1+1", False), row("pretrain", 10, "2+2", False), row("pretrain", 20, "1+1", True)]
    rows += [row("sft", 5, "1+1", False), row("rl", 10, "1+1", False), row("rl", 20, "1+1", True), {"stage": "rl", "step": 20, "loss": 1.0}]
    prompt, shown = moments(rows)
    assert prompt == "1+1" and [m[:2] for m in shown] == [("pretrain", 10), ("pretrain", 20), ("sft", 5), ("rl", 20)]
    assert moments([{"stage": "rl", "step": 1, "sample": {"prompt": "once", "reply": "upon"}}]) == ("", [])
