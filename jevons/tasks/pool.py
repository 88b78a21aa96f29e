"""Calls that may hang, crash or eat memory, made in processes that are killed and replaced.

A verifier reads what a model wrote, and some read it with whole computer algebra systems or with code that users wrote: sooner or later one
does not come back. Threads cannot be ended and signals do not reach an operation inside C, so the calls are made elsewhere, each with a
deadline. A call costs about a tenth of a millisecond beyond its own work; a process starts in the time that its imports take.

multiprocessing's own pools were not used: they fork torch's threads or run the main module again, and wait for ever for a child that
died. Not done: keeping a hostile function in; generated code is for `tasks/sandbox.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

START_SECONDS = 120.0  # for a process to import what it needs, on a busy machine
PROCESSES = min(4, os.cpu_count() or 1)
MEMORY = 4 << 30  # bytes of address space
# strings hash alike in all of them, so that what depends on the order of a set is the same in every process
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a call returned, or what was wrong with it."""

    value: Any = None
    failure: str | None = None


@dataclass(eq=False)
class Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    job: int | None = None  # None: it is starting


def _nothing() -> None:
    pass


@dataclass(eq=False)
class Pool:
    """Processes that call `function`, after `ready` was called once in each. Both are pickled: found by name, or bound to plain values.

    Values come back as JSON. Processes start when they are first needed and end with the pool, or with this process.
    """

    function: Callable[..., Any]
    ready: Callable[[], None] = _nothing
    seconds: float = 10.0
    processes: int = PROCESSES
    memory: int = MEMORY
    _idle: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        weakref.finalize(self, _close, self._idle)

    def start(self) -> None:
        """Start a process, so that what is wrong is found out now. ValueError with the reason where it cannot."""
        if not self._idle:
            self.run([], at_least=1)

    def run(self, calls: Sequence[tuple[Any, ...]], *, at_least: int = 0) -> list[Outcome]:
        """Make all calls, several at once; outcomes in their order. ValueError where no process can be started for them."""
        outcomes: list[Outcome] = [Outcome()] * len(calls)
        waiting = deque(range(len(calls)))
        wanted = min(self.processes, max(len(calls), at_least))
        busy: list[Worker] = []
        try:
            while waiting or busy or len(self._idle) < at_least:
                while waiting and self._idle:
                    worker = self._idle.pop()
                    try:
                        worker.connection.send_bytes(pickle.dumps(calls[waiting[0]]))
                    except (BrokenPipeError, ConnectionResetError):  # it died between calls: through no fault of this one
                        _end(worker)
                        continue
                    worker.job, worker.deadline = waiting.popleft(), time.monotonic() + self.seconds
                    busy.append(worker)
                starting = sum(worker.job is None for worker in busy)
                while len(self._idle) + len(busy) < wanted and starting < max(len(waiting), at_least):
                    busy.append(self._start())
                    starting += 1
                next_deadline = min(worker.deadline for worker in busy)
                heard = set(wait([worker.connection for worker in busy], max(0.0, next_deadline - time.monotonic())))
                now = time.monotonic()
                for worker in [w for w in busy if w.connection in heard or w.deadline <= now]:
                    busy.remove(worker)
                    outcome = self._listen(worker) if worker.connection in heard else self._give_up(worker)
                    if worker.job is not None:
                        outcomes[worker.job] = outcome
                    elif outcome.failure is not None:
                        _end(worker)
                        raise ValueError(outcome.failure)
                    else:
                        self._idle.append(worker)
                        continue
                    if worker.process.returncode is None:
                        self._idle.append(worker)
        finally:
            for worker in busy:
                _end(worker)
        return outcomes

    def close(self) -> None:
        _close(self._idle)

    def _start(self) -> Worker:
        ours, theirs = Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from jevons.tasks.worker import main; main({theirs.fileno()})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # a group of its own: killed with its children, and not by the terminal's Ctrl-C
        )
        theirs.close()
        worker = Worker(process, ours, time.monotonic() + START_SECONDS)
        try:
            ours.send_bytes(pickle.dumps((self.seconds, self.memory, pickle.dumps((self.ready, self.function)))))
        except BaseException:
            _end(worker)
            raise
        return worker

    def _listen(self, worker: Worker) -> Outcome:
        try:
            data = json.loads(worker.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = _end(worker)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Outcome(failure=f"its process {how}")
        return Outcome(data.get("value"), data.get("error"))

    def _give_up(self, worker: Worker) -> Outcome:
        _end(worker)
        if worker.job is None:
            return Outcome(failure=f"its process did not start within {START_SECONDS:g} s")
        return Outcome(failure=f"no answer within {self.seconds:g} s")


def _end(worker: Worker) -> int:
    """Kill a worker with all that it started; its exit code."""
    worker.connection.close()
    with contextlib.suppress(ProcessLookupError):  # ended by itself
        os.killpg(worker.process.pid, signal.SIGKILL)
    return worker.process.wait()


def _close(workers: list[Worker]) -> None:
    while workers:
        _end(workers.pop())
