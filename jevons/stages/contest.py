"""`jevons eval`: one exam for one or several models, as a table, a page and a file.

    FILE.json   everything, each answer's score included       FILE.html   the same for people: intervals, difficulties, failures

The models are loaded one after the other, so the largest alone must fit. Their replies come from the engine that also serves, with weights
packed as it would pack them. Ctrl-C stops the model that is answering and says what is known by then.
"""

from __future__ import annotations

import gc
import signal
import time
import uuid
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jevons.cost.ledger import Ledger
from jevons.cost.receipt import Receipt
from jevons.data.disk import write_json, write_text
from jevons.data.tokenizer import Tokenizer
from jevons.model.folder import load_config, resolve
from jevons.recipe import override
from jevons.run import Interrupt, newest_model
from jevons.stages.dialogue import template_of
from jevons.stages.estimate import difference
from jevons.stages.exam import Exam, results, sit
from jevons.stages.scoreboard import heading, render
from jevons.stages.serve import Options as ServeOptions
from jevons.stages.serve import load_engine
from jevons.tasks.grade import check_gold
from jevons.tasks.task import check_split, get_task
from jevons.train import device

GOLD = 16  # problems whose own answers are graded before a model is asked
READ = 2048  # tokens of prompts a step: nobody waits for single tokens
LETTERS = 300  # of a failed reply, on the terminal


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line decides."""

    models: tuple[str, ...]
    task: str
    task_options: tuple[str, ...] = ()  # key=value
    problems: int = 200
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    max_turns: int = 1
    seed: int = 0
    split: str = "test"
    system: str = ""
    dtype: str = "auto"
    weights: str = "auto"
    concurrency: int = 64
    cache_gb: float = 1.0
    examples: int = 20  # kept of each model
    failures: int = 3  # shown on the terminal
    price_per_hour: float = 0.0
    json: Path | None = None
    root: Path = Path("runs")

    def exam(self) -> Exam:
        check_split(self.split)
        for assignment in self.task_options:
            if "=" not in assignment:
                raise ValueError(f"--option {assignment}: options look like digits=3")
        values: dict[str, Any] = {}
        override(values, self.task_options)
        return Exam(
            task=get_task(self.task, **values),
            problems=self.problems,
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            max_turns=self.max_turns,
            split="train" if self.split == "train" else "test",
            seed=self.seed,
            system=self.system,
        )


def contest(options: Options) -> int:
    """Examine the models and print how they did; the exit code. ValueError for what cannot be asked, before a model is loaded."""
    console = Console(highlight=False, soft_wrap=True)
    exam = options.exam()
    loading = ServeOptions(
        model="",
        dtype=options.dtype,
        weights=options.weights,
        cache_gb=options.cache_gb,
        max_sequences=options.concurrency,
        max_batch_tokens=READ,
        draft="none",
    )
    file = options.json or options.root / "evaluations" / f"{options.task}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    if file.suffix == ".html":
        raise ValueError(f"--json {file}: the page will have this name; end it in .json")
    folders = [_folder(name) for name in options.models]
    names = _names(options.models, folders)
    tokenizers = [_tokenizer(folder) for folder in folders]
    check_gold(exam.task, GOLD)
    for notice in exam.task.notices():
        console.print(f"[yellow]{escape(notice)}[/]")
    where = device.describe(device.choose("auto"))
    document: dict[str, Any] = {
        "task": options.task,
        "options": list(options.task_options),
        **{key: getattr(options, key) for key in ("split", "seed", "samples", "temperature", "top_p", "max_tokens", "max_turns", "system")},
        "device": where,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "jevons": version("jevons"),
        "models": [],
    }
    entries: list[dict[str, Any]] = document["models"]
    rates: list[list[float]] = []  # by model and problem
    options.root.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(options.root / "ledger.db")
    with Interrupt() as interrupt:
        for name, folder, tokenizer in zip(names, folders, tokenizers):
            if interrupt.requested:
                break
            started = time.time()
            engine = load_engine(folder, tokenizer, loading, Console(stderr=True, highlight=False, soft_wrap=True))
            sheet = sit(exam, engine, tokenizer, interrupt, name)
            dtype = str(engine.model.model.norm.weight.dtype).removeprefix("torch.")
            del engine
            gc.collect()
            receipt = Receipt(
                run_id=uuid.uuid4().hex,
                run=f"{file.stem} {name}",
                stage="eval",
                device=where,
                tokens=sheet.tokens,
                seconds=sheet.seconds + sheet.grading,
                price_per_hour=options.price_per_hour,
                started=started,
                finished=time.time(),
            )
            ledger.record(receipt)
            if not sheet.groups:
                break
            entry: dict[str, Any] = {"model": name, "folder": str(folder), "dtype": dtype, "weights": options.weights}
            entry |= results(sheet, options.examples)
            entry |= {"tokens": sheet.tokens, "seconds": sheet.seconds, "grading_seconds": sheet.grading, "money": receipt.money}
            entry["tokens_per_second"] = sheet.tokens / sheet.seconds
            if rates and len(rates[0]) == len(sheet.rates) and not sheet.stopped:
                entry["gain"] = asdict(difference(rates[0], sheet.rates, exam.samples))
            rates.append(sheet.rates)
            entries.append(entry)
    if interrupt.requested:
        console.print(f"[yellow]stopped[/]: {sum('stopped' not in e for e in entries)} of {len(names)} models have answered everything")
    if not entries:
        console.print("no problem was answered by all its samples, so there is nothing to report")
        return 128 + (interrupt.signal or signal.SIGINT)
    show(document, options.failures, console)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)
    write_text(file.with_suffix(".html"), render(document))
    console.print(f"results: {file}\npage:    {file.with_suffix('.html')}")
    return 128 + interrupt.signal if interrupt.signal else 0


def _folder(name: str) -> Path:
    path = newest_model(Path(name).expanduser())
    return path if path.is_dir() else resolve(name)


def _names(given: tuple[str, ...], folders: list[Path]) -> list[str]:
    """What models are called: runs/quickstart is quickstart, its rl/model quickstart/rl; names that are not unique stay as given."""
    names = []
    for name, folder in zip(given, folders):
        path = folder.resolve()
        if (path.parent.parent / "recipe.toml").exists():
            names.append(path.parent.parent.name if Path(name).resolve() != path else f"{path.parent.parent.name}/{path.parent.name}")
        else:
            names.append(path.name if Path(name).is_dir() else name)
    return [name if names.count(name) == 1 else given[i] for i, name in enumerate(names)]


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    load_config(folder)
    try:
        template_of(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return tokenizer


def show(document: dict[str, Any], failures: int, console: Console) -> None:
    """Tables of results, what went wrong, and what it cost."""
    entries = document["models"]
    console.print(_table(document))
    for entry in entries:
        wrong = [example for example in entry["examples"] if not example["correct"]][:failures]
        if wrong:
            console.print(f"\n[bold]{escape(entry['model'])}[/], answers that are wrong:")
        for example in wrong:
            cut = "  [yellow](cut off)[/]" if example["unfinished"] else ""
            console.print(Text(f"  {_short(example['prompt'])}", style="bold"))
            console.print(Text(f"  -> {_short(example['reply'])}"), end="")
            console.print(f"{cut}\n  [dim]right:[/] {escape(_short(example['answer']))}")
    console.print()
    for entry in entries:
        failed = f"; the verifier failed on {entry['verifier_failures']}" if entry["verifier_failures"] else ""
        stopped = f"; [yellow]stopped {entry['stopped']}[/]" if "stopped" in entry else ""
        cost = f", ${entry['money']:.4f}" if entry["money"] else ""
        console.print(
            f"{escape(entry['model'])}: {entry['tokens']:,} tokens in {entry['seconds']:.1f} s, "
            f"{entry['tokens_per_second']:,.0f} tokens/s; graded in {entry['grading_seconds']:.1f} s{cost}{failed}{stopped}"
        )


def _table(document: dict[str, Any]) -> Table:
    """Models side by side: measures down, and below them accuracy by difficulty and category."""
    entries, samples = document["models"], document["samples"]
    how = f" x {samples} samples at temperature {document['temperature']:g}" if samples > 1 else ""
    title = f"{heading(document)}: {max(e['problems'] for e in entries):,} {document['split']} problems{how}"
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for entry in entries:
        table.add_column(escape(entry["model"]), justify="right", overflow="fold")

    table.add_row("pass@1", *(f"[bold]{e['accuracy']:.1%}[/] ({100 * e['low']:.1f} to {100 * e['high']:.1f})" for e in entries))
    for k in [k for k in entries[0].get("pass_at", {}) if k != "1"]:
        table.add_row(f"pass@{k}", *(_share(e["pass_at"][k]) for e in entries))
    if samples > 1:
        table.add_row(f"majority@{samples}", *(_share(e["majority"]) for e in entries))
    if any("gain" in e for e in entries):
        gains = [{key: 100 * value for key, value in e.get("gain", {}).items()} for e in entries]
        table.add_row("points more than the first", *("{value:+.1f} ({low:+.1f} to {high:+.1f})".format(**g) if g else "" for g in gains))
    table.add_row("tokens of a reply", *(f"{e['mean_tokens']:,.0f}" for e in entries))
    table.add_row("replies cut off", *(f"{e['unfinished']:.1%}" for e in entries))
    for kind in ("difficulty", "category"):
        counts = {level: count for e in entries for level, count in e.get(f"{kind}_problems", {}).items()}
        if len(counts) < 2:
            continue
        table.add_section()
        for level, count in counts.items():
            shares = [e.get(f"by_{kind}", {}).get(level) for e in entries]
            table.add_row(escape(f"{kind} {level}, {count:,} problems"), *("" if s is None else f"{s:.1%}" for s in shares))
    return table


def _share(found: dict[str, float]) -> str:
    return f"{found['value']:.1%} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LETTERS else f"{text[: LETTERS // 2]} ... {text[-LETTERS // 2 :]}"
