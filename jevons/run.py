"""A run's folder: what it is, where it stands, what it cost.

    runs/NAME/recipe.toml        the resolved recipe          runs/NAME/STAGE/         what a stage leaves, with DONE.json last
    runs/NAME/environment.json   versions, commit, device     runs/NAME/report.html    everything at a glance
    runs/NAME/metrics.jsonl      one row a logged step        runs/NAME/receipt.json   tokens, time, money, planned and actual

A run continues where it stopped: a stage with a DONE.json is skipped, a stage without one picks up its own checkpoint.
Time spent is kept in the ledger beside the runs, row by row as it passes, so a kill loses a few seconds of it at most.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, Any

from jevons.cost.ledger import Ledger
from jevons.cost.receipt import Plan, Receipt, total
from jevons.data.disk import remove_folder, sweep, write_json, write_text
from jevons.recipe import STAGES, Recipe, parse

LEDGER_SECONDS = 5.0  # how often a running stage writes what it cost so far


class Interrupted(Exception):
    """The user or the system asked the run to stop, and it stopped with everything saved."""


class Interrupt:
    """Turns SIGINT and SIGTERM into a request that a stage honours between two steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Interrupt:
        self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        # not by print: the signal may have come while something else was being printed, and a stream is not entered twice
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step (Ctrl-C again stops at once)\n".encode())

    @property
    def requested(self) -> bool:
        return self.signal is not None


class Run:
    """One run of one recipe in one folder."""

    def __init__(
        self, recipe: Recipe, root: Path, device: str, *, again: str | None = None, memory: Callable[[], int | None] = lambda: None
    ) -> None:
        """Open `root`/`recipe.name`, made if need be. `again` is the first stage whose results are to be thrown away, `memory` says
        what the device or process held at most, in bytes.

        Raises ValueError where the folder belongs to another recipe, listing the keys that differ.
        """
        self.recipe, self.device, self.memory = recipe, device, memory
        self.carried = 0  # bytes that stages before left in this process
        self.folder = root / recipe.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._take()
        sweep(self.folder)
        for stage in recipe.stages:
            if self.is_done(stage):  # killed before it could do that itself
                remove_folder(self.stage_folder(stage) / "checkpoints")
        self.metrics_path = self.folder / "metrics.jsonl"
        saved = self.folder / "recipe.toml"
        forgotten = self._from(again) if again else ()
        if saved.exists():
            self._same_recipe(saved, forgotten)
        for stage in reversed(forgotten):  # last first: killed in between, no stage is left that stands on one that is gone
            remove_folder(self.stage_folder(stage))
            self.truncate_metrics(stage, -1)
        write_text(saved, recipe.to_toml())
        self.id = self._environment()
        self.ledger = Ledger(root / "ledger.db")
        for row in self.ledger.rows(self.id):
            if row.stage in forgotten:  # what it took is spent, what came of it is gone
                self.ledger.record(replace(row, tokens=0, flops=0.0, finished=None, planned=None))

    def _take(self) -> IO[str]:
        """The run for this process alone, for as long as it lives: two would sweep away each other's unfinished files."""
        lock = (self.folder.parent / f".{self.folder.name}.lock").open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"{self.folder}: another process is working on this run; wait for it, or choose another name=...") from None
        return lock

    def _same_recipe(self, saved: Path, forgotten: Sequence[str]) -> None:
        """What a stage has left to go on from must have been made by this recipe; keys of other stages may change."""
        kept = [s for s in self.recipe.stages if s not in forgotten]
        begun = [s for s in kept if self.is_done(s) or any(self.stage_folder(s).glob("checkpoints/step-*"))]
        if not begun:
            return
        old = _flat(parse(tomllib.loads(saved.read_text(encoding="utf-8")), str(saved)).model_dump(mode="json"))
        new = _flat(self.recipe.model_dump(mode="json"))
        free = {"price_per_hour"} | {k for k in old | new if (stage := k.split(".")[0]) in (*STAGES, "plan") and stage not in begun}
        if changed := [k for k in sorted(old | new) if k not in free and old.get(k) != new.get(k)]:
            lines = "".join(f"\n  {k}: was {old.get(k)!r}, now {new.get(k)!r}" for k in changed)
            raise ValueError(
                f"{self.folder} belongs to another recipe:{lines}\n"
                "choose another name=..., start over with --from STAGE, or delete the folder"
            )

    def _from(self, stage: str) -> tuple[str, ...]:
        stages = self.recipe.stages
        if stage not in stages:
            raise ValueError(f"--from {stage}: the recipe's stages are {', '.join(stages)}")
        return stages[stages.index(stage) :]

    def _environment(self) -> str:
        path = self.folder / "environment.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        names = ("torch", "numpy", "safetensors", "tokenizers")
        fields: dict[str, Any] = {
            "run_id": before.get("run_id") or uuid.uuid4().hex,
            "date": before.get("date") or time.strftime("%Y-%m-%d %H:%M:%S"),
            "jevons": version("jevons"),
            "commit": _commit(),
            "python": platform.python_version(),
            **{name: version(name) for name in names},
            "device": self.device,
            "cores": os.cpu_count(),
            "parameters": before.get("parameters"),
        }
        write_json(path, fields)
        return fields["run_id"]

    def note(self, **fields: Any) -> None:
        """Add to environment.json."""
        path = self.folder / "environment.json"
        write_json(path, json.loads(path.read_text()) | fields)

    def stage_folder(self, stage: str) -> Path:
        return self.folder / stage

    def is_done(self, stage: str) -> bool:
        return (self.stage_folder(stage) / "DONE.json").exists()

    def mark_done(self, stage: str, **facts: Any) -> None:
        self.stage_folder(stage).mkdir(exist_ok=True)
        write_json(self.stage_folder(stage) / "DONE.json", facts)

    def log(self, stage: str, step: int, **fields: Any) -> None:
        """Append one row to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **fields}) + "\n")

    def truncate_metrics(self, stage: str, step: int) -> None:
        """Drop rows of `stage` past `step`, and a torn last line: a resumed run writes them again."""
        if not self.metrics_path.exists():
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                if row["stage"] != stage or row["step"] <= step:
                    kept.append(line)
        write_text(self.metrics_path, "".join(kept))

    @contextmanager
    def spend(self, stage: str, *, peak_flops: float | None = None, planned: Plan | None = None) -> Iterator[Spending]:
        """Account for a stage while the block runs; time spent by earlier attempts, thrown away or not, is already in it, and in a plan
        that is made only now."""
        earlier = next((r for r in self.ledger.rows(self.id) if r.stage == stage), None)
        if earlier and planned:
            planned = replace(planned, seconds=planned.seconds + earlier.seconds, money=planned.money + earlier.money)
        receipt = Receipt(
            run_id=self.id,
            run=self.recipe.name,
            stage=stage,
            device=self.device,
            tokens=earlier.tokens if earlier else 0,  # until the stage says more: it may only have to finish
            flops=earlier.flops if earlier else 0.0,
            seconds=earlier.seconds if earlier else 0.0,
            memory=earlier.memory if earlier else None,
            peak_flops=peak_flops,
            price_per_hour=self.recipe.price_per_hour,
            started=earlier.started if earlier else time.time(),
            planned=(earlier.planned if earlier else None) or planned,
        )
        spending = Spending(receipt, self.ledger, self.memory)
        try:
            yield spending
            spending.receipt.finished = time.time()
        finally:
            spending.update(force=True)
            self.write_receipt()

    def write_receipt(self) -> list[Receipt]:
        """receipt.json from the ledger's rows of this run, in the order of the stages."""
        rows = {r.stage: r for r in self.ledger.rows(self.id)}
        receipts = [rows[s] for s in self.recipe.stages if s in rows]
        sums = total(receipts)
        write_json(
            self.folder / "receipt.json",
            {
                "run": self.recipe.name,
                "stages": [r.describe() for r in receipts],
                "total": {"seconds": sums.seconds, "device_hours": sums.device_hours, "money": sums.money},
            },
        )
        return receipts


class Spending:
    """A stage's receipt while it grows."""

    def __init__(self, receipt: Receipt, ledger: Ledger, memory: Callable[[], int | None] = lambda: None) -> None:
        self.receipt, self._ledger, self._memory = receipt, ledger, memory
        self._since = self._written = time.perf_counter()

    def update(self, *, tokens: int | None = None, flops: float | None = None, force: bool = False) -> Receipt:
        """Count the time up to now; set the totals of tokens and FLOPs. Reaches the ledger every few seconds, with the peak of memory."""
        now = time.perf_counter()
        self.receipt.seconds += now - self._since
        self._since = now
        if tokens is not None:
            self.receipt.tokens = tokens
        if flops is not None:
            self.receipt.flops = flops
        if force or now - self._written > LEDGER_SECONDS:
            if (held := self._memory()) is not None:
                self.receipt.memory = max(held, self.receipt.memory or 0)  # earlier attempts count, too
            self._ledger.record(self.receipt)
            self._written = now
        return self.receipt


def _commit() -> str | None:
    """The commit of the source tree that Jevons runs from, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    if shutil.which("git") is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def newest_model(path: Path) -> Path:
    """A run's newest Hugging Face folder: its last stage's model, or a checkpoint while it trains. Other folders are returned as is.

    Raises ValueError for a run without a model, and for one that is not there: its path could be a hub's name, owner/model.
    """
    if not path.exists() and (path.parent / "ledger.db").exists():
        names = sorted(found.parent.name for found in path.parent.glob("*/recipe.toml"))
        raise ValueError(f"{path}: no such run; {path.parent} has {', '.join(names[:20]) or 'none'}")
    if (path / "config.json").exists() or not (path / "recipe.toml").exists():
        return path
    found = sorted(path.glob("*/model/config.json")) or sorted(path.glob("*/checkpoints/step-*/config.json"))
    if not found:
        raise ValueError(f"{path}: this run has no model yet")
    return max((f.parent for f in found), key=lambda f: f.stat().st_mtime)
