"""A progress line for work that takes a while: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


class Meter:
    """`with Meter("pretrain", total) as meter: meter.update(step, "loss 2.31  5,120 tok/s")`."""

    def __init__(self, title: str, total: int | None, console: Console | None = None) -> None:
        self.title, self.total = title, total
        self.console = console or Console()
        self.live = self.console.is_terminal
        self._start = self._printed = time.monotonic()
        self._first: int | None = None
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console, transient=False)

    def __enter__(self) -> Meter:
        if self.live:
            self.progress.start()
            self.task = self.progress.add_task(self.title, total=self.total, text="")
        return self

    def update(self, done: int, text: str) -> None:
        if self._first is None:
            self._first = done
        if self.live:
            self.progress.update(self.task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS or done == self.total:
            self._printed = now
            left = ""
            if self.total and done > self._first:
                left = f"  {(now - self._start) / (done - self._first) * (self.total - done):,.0f} s left"
            of = f"/{self.total:,}" if self.total else ""
            self.console.print(f"{self.title} {done:,}{of}  {text}{left}", highlight=False, soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.progress.stop()
