"""What is reported of a ledger, and that its sums survive kills, re-runs and earlier versions of its tables."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest
import sqlalchemy as sql
from pytest import approx
from rich.console import Console
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateTable
from test_report import Page, headings
from typer.testing import CliRunner

from jevons.cli import app
from jevons.cost.database import add_column
from jevons.cost.ledger import RECEIPTS, Ledger
from jevons.cost.price import Prices
from jevons.cost.receipt import Plan, Receipt, render
from jevons.cost.usage import UsageRow, UsageStore
from jevons.progress import Meter
from jevons.recipe import load
from jevons.run import Run
from jevons.server.uptime import Uptime
from jevons.stages.invoice import Answers, gather
from jevons.stages.printout import document, findings, table
from jevons.stages.statement import course, draw_course, statement
from jevons.stages.step import StepLog


def receipt(**fields):
    return Receipt(**{"run_id": "a1", "run": "tiny", "stage": "pretrain", "device": "cpu", **fields})


def make_earlier_table(url, row):
    """The table of receipts as it was before it had peak memory, with a row in it."""
    engine = sql.create_engine(url)
    earlier = sql.Table("receipts", sql.MetaData(), *(column.copy() for column in RECEIPTS.columns if column.name != "memory"))
    values = {name: value for name, value in row.to_dict().items() if name != "memory"}
    with engine.begin() as connection:
        connection.execute(CreateTable(earlier))
        connection.execute(earlier.insert().values(values | {"planned": {"tokens": 9, "flops": 1e9, "seconds": 3.0, "money": 0.1}}))
    engine.dispose()


def test_an_earlier_ledger_gets_the_new_column(ledger_url):
    old = receipt(tokens=5, seconds=2.0, started=1.0)
    make_earlier_table(ledger_url, old)
    ledger = Ledger(ledger_url)
    old.planned = Plan(9, 1e9, 3.0, 0.1)
    assert ledger.rows() == [old] and old.memory is None
    new = receipt(run_id="b2", started=2.0, memory=3 * 2**40, planned=Plan(1, 1.0, 1.0, 1.0, 2**40))
    ledger.record(new)
    assert ledger.rows() == [old, new]
    ledger.close()
    assert Ledger(ledger_url).rows() == [old, new]


def _open(url, barrier):
    barrier.wait()
    Ledger(url).close()


def test_processes_that_open_an_earlier_ledger_at_once(ledger_url):
    make_earlier_table(ledger_url, receipt())
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_open, args=(ledger_url, barrier)) for _ in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0] * 4


@pytest.mark.parametrize("dialect, kind", [(sqlite.dialect(), "BIGINT"), (postgresql.dialect(), "BIGINT")], ids=["sqlite", "postgresql"])
def test_the_statement_that_adds_a_column(dialect, kind):
    assert add_column(RECEIPTS, RECEIPTS.c.memory, dialect) == f"ALTER TABLE receipts ADD COLUMN memory {kind}"


UP = """
import sys, time
from jevons.cost.ledger import Ledger
from jevons.cost.receipt import Receipt
from jevons.server.uptime import Uptime

ledger = Ledger(sys.argv[1])
receipt = Receipt(run_id=sys.argv[2], run="m", stage="serve", device="cpu", price_per_hour=3600.0, started=time.time(), seconds=2.0)
began = time.perf_counter()
Uptime(ledger, receipt, memory=lambda: 7, seconds=0.02)
print(2.0 + time.perf_counter() - began, flush=True)
time.sleep(100)
"""


def test_a_killed_server_leaves_its_uptime(ledger_url):
    """Its row grows while it lives, however busy the machine, keeps what it said when the kill came, and no kill is counted again."""
    ledger, seen, most = Ledger(ledger_url), {}, {}
    for session in ("s1", "s2"):
        began = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", UP, ledger_url, session], stdout=subprocess.PIPE, text=True) as process:
            said = float(process.stdout.readline())
            while seen.get(session, 0.0) < said + 0.1:  # several times the interval after its first words
                assert time.monotonic() - began < 60
                seen |= {row.run_id: row.seconds for row in ledger.rows()}
            process.kill()
        most[session] = 2.0 + time.monotonic() - began
    rows = ledger.rows()
    ledger.close()
    assert [(r.run_id, r.stage, r.finished, r.memory) for r in rows] == [(s, "serve", None, 7) for s in most]
    for row in rows:
        assert seen[row.run_id] <= row.seconds < most[row.run_id] and row.money == pytest.approx(row.seconds)


def test_uptime_ends_and_outlives_a_database_that_is_down(tmp_path, monkeypatch, caplog):
    ledger, tried = Ledger(tmp_path / "ledger.db"), threading.Event()
    began = time.perf_counter()
    uptime = Uptime(ledger, receipt(stage="serve", seconds=5.0), seconds=0.01)
    record = ledger.record

    def fail(receipt):
        tried.set()
        raise OperationalError("INSERT", {}, Exception("disk I/O error"))

    monkeypatch.setattr(ledger, "record", fail)
    assert tried.wait(60)
    monkeypatch.setattr(ledger, "record", record)
    uptime.close()
    passed = time.perf_counter() - began
    (row,) = Ledger(tmp_path / "ledger.db").rows()
    assert row.finished is not None and 5.0 < row.seconds <= 5.0 + passed and row == uptime.receipt
    assert [r.levelname for r in caplog.records if "disk I/O error" in r.message] == ["ERROR"]


@pytest.mark.parametrize(
    "seed, kills", [(2, 5), *(pytest.param(seed, 15, marks=pytest.mark.slow) for seed in range(10, 16))], ids=lambda value: str(value)
)
def test_totals_survive_kills_and_runs_that_begin_again(tmp_path, seed, kills):
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(seed), str(kills), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_stage_that_only_has_to_finish(tmp_path):
    # killed between its last checkpoint and the ledger's next row: no step follows that would bring the totals up
    run = Run(load("quickstart"), tmp_path, "cpu")
    with run.spend("pretrain") as spending:
        spending.update(tokens=63, flops=126.0)
    with run.spend("pretrain") as spending, Meter("pretrain", 10) as meter:
        StepLog(run, "pretrain", spending, meter, flops=2.0, tokens=70)
    (row,) = run.ledger.rows()
    assert (row.tokens, row.flops) == (70, 140.0)


def test_a_stage_that_starts_over_is_planned_on_top_of_what_was_spent(tmp_path):
    recipe = load("quickstart", ["price_per_hour=3600"])
    for again in (None, "rl"):
        began = time.perf_counter()
        run = Run(recipe, tmp_path, "cpu", again=again)
        with run.spend("rl", planned=Plan(5, 1.0, 1.0, 1.0)) as spending:
            spending.receipt.seconds += 2.0  # as if they had passed
            spending.update(tokens=7)
        run._lock.close()
        (row,) = run.ledger.rows()
        run.ledger.close()
        if again is None:
            first, passed = row, time.perf_counter() - began
    assert first.planned.seconds == 1.0 and first.difference("seconds") == approx(first.seconds - 1.0)
    assert 2.0 <= first.seconds <= 2.0 + passed
    assert 2.0 <= row.seconds - first.seconds <= 2.0 + time.perf_counter() - began and row.tokens == 7 and row.started == first.started
    assert row.planned.seconds == row.planned.money == approx(1.0 + first.seconds)  # of a dollar a second


# --- reports

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()  # off-peak at DeepSeek's
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"


def task(accuracy, tokens, **more):
    return {"task": "sums", "accuracy": accuracy, "problems": 200, "samples": 2, "mean_tokens": tokens} | more


def fill(root, name="tiny"):
    """A run of three stages that were planned, an evaluation before and after RL, and two server sessions of which one was cut off."""
    ledger, store = Ledger(root / "ledger.db"), UsageStore(root / "ledger.db")
    common = {"run_id": "r" * 32, "run": name, "price_per_hour": 36.0}  # a cent a second
    for i, (stage, seconds, plan) in enumerate((("pretrain", 110, 100), ("rl", 50, 40), ("evaluate", 20, None))):
        planned = Plan(1000, 1e12, plan, plan / 100, 2**30) if plan else None
        spent = {"tokens": 1000, "flops": 1e12, "seconds": seconds, "memory": 2**30 + 2**29, "planned": planned}
        ledger.record(receipt(**common, **spent, stage=stage, started=NOON + 200 * i, finished=NOON + 200 * i + seconds))
    folder = root / name.replace("/", "_")
    (folder / "evaluate").mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    (folder / "environment.json").write_text(json.dumps({"run_id": "r" * 32}))
    gain = {"value": 0.5, "low": 0.4, "high": 0.625}
    results = {"tasks": [task(0.75, 30, gain=gain)], "before": {"tasks": [task(0.25, 10)]}}
    (folder / "evaluate" / "results.json").write_text(json.dumps(results))
    for session, start, seconds, requests in (("s1", 1000, 100, 4), ("s2", 2000, 50, 0)):
        end = None if session == "s2" else NOON + start + seconds
        row = {"run_id": session, "run": name, "stage": "serve", "price_per_hour": 36.0, "seconds": seconds}
        ledger.record(receipt(**row, started=NOON + start, finished=end))
        used = {"key_id": "k", "key_name": name, "model": name, "endpoint": "e", "request_id": "r", "money": 0.05, "session": session}
        counts = {"prompt": 900_000, "cached": 500_000, "completion": 100_000, "device_seconds": 5.0}
        store.insert([UsageRow(**used, **counts, started=NOON + start + 20 * i) for i in range(requests)])
    store.insert([UsageRow(**{**used, "session": None}, prompt=7, started=NOON)])  # of a server that left no receipt
    ledger.close()
    store.close()


def found(root, run=None, **options):
    return gather(root, run, prices=Prices.load(), compare="deepseek-flash", **options)


def report(root, run=None, **options):
    return document(found(root, run, **options))


def test_figures(tmp_path):
    fill(tmp_path)
    figures = report(tmp_path)
    assert [(s["stage"], s["money"], s["tokens"]) for s in figures["stages"]] == [
        ("pretrain", approx(1.10), 1000), ("rl", approx(0.50), 1000), ("evaluate", approx(0.20), 1000), ("serve", approx(1.0), 4_000_000),
        ("serve", approx(0.5), 0),
    ]  # fmt: skip
    assert figures["total"]["money"] == approx(3.3) == approx(sum(s["share"] for s in figures["stages"]) * 3.3)
    assert figures["stages"][0]["difference"] == approx({"tokens": 0, "flops": 0, "seconds": 0.1, "money": 0.1, "memory": 0.5})
    before, after = figures["answers"]  # 20 cents, by 2 x 200 x 10 and 2 x 200 x 30 tokens
    assert (before["model"], before["correct"], before["money_per_correct"]) == ("before", 100, approx(0.05 / 100))
    assert (after["model"], after["correct"], after["money_per_correct"]) == ("after", 300, approx(0.15 / 300))
    (gain,) = figures["gains"]
    assert [gain[f"money_per_point{end}"] for end in ("", "_low", "_high")] == approx([0.01, 0.008, 0.0125])
    served = figures["served"]
    assert (served["money"], served["tokens"], served["money_per_million"]) == (approx(1.5), 4_000_000, approx(0.375))
    assert [s["busy"] for s in served["sessions"]] == approx([0.2, 0.0]) and served["sessions"][1]["money_per_million"] is None
    assert served["elsewhere"]["deepseek-flash"] == approx(4 * (0.5 * 0.003 + 0.4 * 0.15 + 0.1 * 0.6))
    assert list(served["elsewhere"].values()) == sorted(served["elsewhere"].values())
    assert "keys" not in figures and report(tmp_path, keys=True)["keys"][0]["requests"] == 5
    for name in ("tiny", str(tmp_path / "tiny")):
        assert report(tmp_path, name) == figures | {"run": "tiny", "date": mock.ANY}


def test_what_began_later(tmp_path):
    fill(tmp_path)
    later = report(tmp_path, since=NOON + 1050)  # in the middle of a session: half of it, and one of its four requests
    assert [(s["run_id"], s["money"], s["tokens"]) for s in later["stages"]] == [("s1", approx(0.5), 1_000_000), ("s2", approx(0.5), 0)]
    assert later["answers"] == report(tmp_path, since=NOON + 3000)["stages"] == []
    assert "Nothing was spent" in statement(found(tmp_path, since=NOON + 3000))
    assert len(report(tmp_path, since=NOON + 100)["stages"]) == 4  # a stage that began before it is out, whole
    both = (report(tmp_path, since=since)["served"]["money"] for since in (NOON, NOON + 1099))
    assert list(both) == approx([1.5, 0.51])


def test_results_of_another_run_of_the_name_are_not_taken(tmp_path):
    fill(tmp_path)
    (tmp_path / "tiny" / "environment.json").write_text(json.dumps({"run_id": "new"}))
    assert report(tmp_path)["answers"] == report(tmp_path)["gains"] == []


def test_nothing_gained_has_no_price(tmp_path):
    fill(tmp_path)
    path = tmp_path / "tiny" / "evaluate" / "results.json"
    lost = task(0.0, 30, gain={"value": -0.25, "low": -0.3, "high": 0.1})
    path.write_text(json.dumps({"tasks": [lost], "before": {"tasks": [task(0.25, 10)]}}))
    figures = report(tmp_path)
    assert figures["gains"][0]["money_per_point"] is None and figures["answers"][1]["money_per_correct"] is None
    words = findings(found(tmp_path))[2]
    assert "-25.0 points by RL for $0.50" in words and "a point" not in words
    assert "none right" in statement(found(tmp_path))


def test_evaluations_of_several_models(tmp_path):
    """What `jevons eval` left, by its file's name; a file that another contest wrote over is not taken for its."""
    ledger = Ledger(tmp_path / "ledger.db")
    for run_id, tokens in (("new", 500), ("old", 400)):
        ledger.record(receipt(run_id=run_id, run="sums m", stage="eval", tokens=tokens, seconds=10.0, price_per_hour=36.0, finished=1.0))
    ledger.close()
    (tmp_path / "evaluations").mkdir()
    entry = {"model": "m", "accuracy": 0.5, "problems": 20, "tokens": 500, "money": 0.1}
    (tmp_path / "evaluations" / "sums.json").write_text(json.dumps({"task": "sums", "samples": 4, "models": [entry]}))
    (answers,) = report(tmp_path)["answers"]
    assert (answers["correct"], answers["answers"], answers["money_per_correct"]) == (40, 80, approx(0.1 / 40))
    invoice = found(tmp_path)
    invoice.answers.append(Answers("other", "sums", "", 4, 0, 0.1))
    assert [line.partition(":")[0] for line in findings(invoice)] == ["sums m of sums", "sums of other"]


def test_a_bound_is_not_missed_but_kept(tmp_path):
    """RL's plan where nothing was calibrated is the most that its longest answers could take: staying below it is no error. The
    memory of those is an estimate like any other."""
    ledger = Ledger(tmp_path / "ledger.db")
    for stage, plan in (("pretrain", Plan(10, 1e9, 10.0, 0.1, 100)), ("rl", Plan(90, 9e9, 90.0, 0.9, 900, bound=True))):
        spent = {"tokens": 10, "flops": 1e9, "seconds": 11.0, "memory": plan.memory * 5 // 4, "price_per_hour": 36.0, "finished": 1.0}
        ledger.record(receipt(run_id="b" * 32, run="tiny", stage=stage, planned=plan, **spent))
    assert [row.planned.bound for row in ledger.rows("b" * 32)] == [False, True]
    ledger.close()
    figures = report(tmp_path)["stages"]
    assert figures[0]["difference"]["money"] == approx(0.1)
    assert figures[1]["difference"] == {"tokens": None, "flops": None, "seconds": None, "money": None, "memory": approx(0.25)}
    words = " ".join(Page(statement(found(tmp_path))).text)
    assert "+10.0%" in words and "of at most $0.90" in words and "at most 90" in words and "-87.8%" not in words
    first, second = csv.DictReader(io.StringIO(table(found(tmp_path))))
    assert (first["planned_bound"], second["planned_bound"], second["difference_money"]) == ("False", "True", "")
    assert float(second["difference_memory"]) == approx(0.25)
    console = Console(file=io.StringIO(), width=80)
    console.print(render([Receipt.from_dict(row.to_dict()) for row in found(tmp_path).receipts]))
    lines = [line.split()[0] for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[-6:] == ["planned", "off", "rl", "at", "off", "total"]


def test_csv(tmp_path):
    fill(tmp_path, "=cmd")
    rows = list(csv.DictReader(io.StringIO(table(found(tmp_path)))))
    assert [row["stage"] for row in rows] == ["pretrain", "rl", "evaluate", "serve", "serve"]
    assert [float(rows[0][name]) for name in ("money", "planned_money", "difference_money")] == approx([1.1, 1.0, 0.1])
    assert rows[2]["planned_money"] == "" and rows[0]["started"] == "2026-11-25 12:00:00" and rows[4]["finished"] == ""
    assert {row["run"] for row in rows} == {"'=cmd"}  # not a formula
    for kind in ({}, {"runs": False, "keys": True}):  # the same columns where there is nothing
        assert table(found(tmp_path, since=NOON + 1e9, **kind)) == table(found(tmp_path, **kind)).partition("\n")[0] + "\n"
    (row,) = csv.DictReader(io.StringIO(table(found(tmp_path, runs=False, keys=True))))
    assert (row["label"], row["requests"], float(row["money"])) == ("'=cmd", "5", approx(0.25))


def test_money_over_time():
    spent = {"price_per_hour": 3600.0}
    rows = [receipt(started=100.0, seconds=10.0, finished=120.0, **spent), receipt(started=110.0, seconds=10.0, **spent)]
    assert course(rows) == [(0.0, 0.0), (10.0, 5.0), (20.0, 20.0)]  # the first paused for ten seconds, the second was cut off
    assert course([]) == []
    assert draw_course(rows) and not draw_course(rows[:1])  # one pace, a straight line


def test_the_page(tmp_path):
    fill(tmp_path)
    html = statement(found(tmp_path, "tiny", keys=True))
    words = " ".join(Page(html).text)
    assert headings(html) == [
        "Where the money went", "Planned and actual", "Money", "Time", "Peak memory", "Money over time",
        "What it bought", "Right answers, and what they cost each", "Points of accuracy",
        "Served", "A million tokens, here and elsewhere", "Sessions", "Keys", "Receipt",
    ]  # fmt: skip
    parts = "$3.30|+14.3%|$0.38|45%|$1.10 +10.0%|1.50 GiB +50.0%|$0.01|$0.008 to $0.013|deepseek-flash|$0.12"
    assert [part for part in parts.split("|") if part not in words] == []
    assert "no end recorded" in words and "default-src 'none'" in html


def test_the_page_lets_no_stranger_in(tmp_path):
    fill(tmp_path, HOSTILE)
    page = Page(statement(found(tmp_path, keys=True)))
    assert page.tags.count("script") == 1 and "img" not in page.tags and "onerror" not in page.attributes
    assert " ".join(page.text).count(HOSTILE) > 5


def test_the_command(tmp_path):
    fill(tmp_path)

    def jevons(*arguments):
        result = CliRunner().invoke(app, ["receipt", "--runs", str(tmp_path), *map(str, arguments)], env={"COLUMNS": "80"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    out = jevons("--all")
    parts = "off by|+10.0%|1.50 GiB|served, uptime counted|$0.50 a thousand right answers|$0.01 a point|idle time counted: $0.38|in all"
    assert [part for part in parts.split("|") if part not in out] == [] and "\N{HORIZONTAL ELLIPSIS}" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "no key was used since then" in jevons("--keys", "--since", "2027-01-01")
    assert json.loads(jevons("tiny", "--json", "-"))["total"]["stages"] == 5
    assert jevons("--csv", "-").startswith("run_id,run,stage,")
    files = [str(tmp_path / name) for name in ("a.json", "a.html")]
    assert jevons("--html", files[1], "--json", files[0]).split() == files
    assert json.loads((tmp_path / "a.json").read_text())["total"]["money"] == approx(3.3)
    with pytest.raises(ValueError, match="--compare: prices: no model 'deepseek-flush'; did you mean"):
        jevons("--compare", "deepseek-flush")
    nowhere = tmp_path / "nowhere" / "file"
    missing = {"--prices": "--prices .*: no such file", "--ledger": "--ledger .*: no such file", "--csv": "there is no folder"}
    for flag, said in missing.items():
        with pytest.raises(ValueError, match=said):
            jevons(flag, nowhere)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        jevons("--html", tmp_path)
    with pytest.raises(ValueError, match="--json, --csv, --html: one of them"):
        jevons("--json", "-", "--csv", "-")
    assert not nowhere.parent.exists()  # what is asked about is not made
    with pytest.raises(ValueError, match="--all: is about"):
        jevons("tiny", "--all")


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(tmp_path, width, scheme):
    """No message of the browser's, nothing cut off at the side, and a reading where the pointer is."""
    sync = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no Chromium")
    fill(tmp_path)
    (tmp_path / "a.html").write_text(statement(found(tmp_path, keys=True)))
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"file://{tmp_path / 'a.html'}")
        assert page.evaluate("document.documentElement.scrollWidth") == width and said == []
        page.locator(".chart .plot").hover()
        assert "spent" in page.locator(".read").inner_text()
        browser.close()
