"""Generated Python runs here: in its own process, behind what walls the system has, with limits on everything that it could use up.

`run_code` runs a program and says how it went. `run_tests` grades: the tests and the code that they test run in two processes, each in
a sandbox of its own, and only plain data crosses (tasks/remote.py). The verdict is the test process's, which the code cannot reach. It may
end its process, print, patch `assert`, `builtins` and `check`, write to every file descriptor that it has, trace, start threads, return
objects that are equal to everything: that changes its own process, or is an answer like any other.

What remains possible: code that knows the tests' inputs by heart and answers them alone (hide some tests); tests too weak for a wrong
answer, such as NaN in `not abs(x - y) > 1e-6`; an unknown hole in the kernel or in our reading of answers. And where the system lacks a
wall, what that wall was for: `protections` says which stand, `gaps` what a stage must say at its start.

A run starts a bare interpreter (tasks/jail.py says what happens in it) instead of forking this process, whose size and threads make forks
slow and unsafe. The order of sets is the same in every run, so that grades are too. Not done: packages besides Python's own library;
starting programs; limits of memory over several processes together; Windows.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from signal import SIGKILL, SIGXCPU
from typing import Any, Literal

from jevons.tasks.jail import GONE, OUT_OF_MEMORY
from jevons.tasks.remote import decode, encode, plain

Reason = Literal["", "error", "tests", "signal", "time", "memory", "output"]
GRACE, PATIENCE = 10.0, 1.0  # seconds: that a supervisor may be late; that code which its tests miss may take to end
START = "import sys; sys.path.append(sys.argv[1]); from jevons.tasks.jail import main; sys.path.pop(); main(sys.argv[2:])"


@dataclass(frozen=True)
class Limits:
    """What a run may use. Raises ValueError for what cannot be."""

    seconds: float = 10.0  # by the clock; no process may compute longer either
    memory_mb: int = 1024  # address space of each process, Python's own 30 included
    processes: int = 1  # more than one: threads count too, and only where namespaces let us count them, else one
    file_mb: int = 16  # a file; all of them together where there are namespaces
    output_kb: int = 64  # what is printed, and as much again of errors

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seconds", 0.1, 86_400),
            ("memory_mb", 64, 2**24),
            ("processes", 1, 1024),
            ("file_mb", 1, 2**20),
            ("output_kb", 1, 2**20),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"limits.{name}: must be between {least} and {most}, is {getattr(self, name)!r}")


DEFAULT = Limits()


@dataclass(frozen=True)
class Result:
    """How a run went.

    `reason` says why it is not ok: "error" (an exception, an exit status), "tests" (one failed), "signal" (it crashed), or the limit that
    it came to. "memory" is said where Python noticed.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: Reason
    seconds: float


def run_code(source: str, *, stdin: str = "", limits: Limits = DEFAULT) -> Result:
    """Run a program with this input. Ok if it ends with status 0 within the limits; its own word, so not a grade (see `run_tests`).

    Safe to call from several threads. Raises OSError where no process can be started.
    """
    with ExitStack() as stack:
        run = _Run(stack, limits, {"mode": "program", "source": source}, stdin.encode("utf-8", "surrogatepass"))
        _watch([run])
        return run.result(run.reason())


def run_tests(code: str, tests: str, names: Sequence[str], *, setup: str = "", limits: Limits = DEFAULT) -> Result:
    """Run tests on code. Ok if the tests come to their end; what the code does to its own process cannot bring that about.

    `names` are the code's functions and classes that the tests use. `setup` runs before the tests and may use them too; what it defines
    under the same names is replaced. Setup and tests are the dataset's: they get the same limits, and are believed.
    """
    with ExitStack() as stack:
        requests, answers = _pipe(stack), _pipe(stack)
        spec = {"mode": "test", "source": tests, "setup": setup, "names": tuple(names)}
        tested = _Run(stack, limits, {"mode": "serve", "source": code}, requests=requests[0], answers=answers[1])
        tester = _Run(stack, limits, spec, requests=requests[1], answers=answers[0])
        _watch([tested, tester])
        if tester.reason() == "":
            return tested.result("")
        reason = tested.reason()  # "" where it was waiting for a call
        if reason:
            return tested.result(reason)
        if tester.missed():
            return tested.result("error")
        return tester.result("tests" if tester.reason() == "error" else tester.reason())


def run_many(sources: Sequence[str], *, limits: Limits = DEFAULT, workers: int | None = None) -> list[Result]:
    """Run programs, so many at once (by default as many as there are processors); the results are in their order."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda source: run_code(source, limits=limits), sources))


def protections() -> dict[str, tuple[str, ...]]:
    """What generated code is kept from here, and by what; an empty tuple: by nothing.

    Found out by a run. Raises OSError where no process can be started.
    """
    return _walls(_probe())


def gaps() -> list[str]:
    """What generated code is not kept from here, for a stage to say at its start. Raises OSError where no process can be started."""
    report = _probe()
    lines = [f"nothing keeps generated code from {what} here" for what, walls in _walls(report).items() if not walls]
    return lines + [f"no namespaces: {report['missing']}"] if lines and report["missing"] else lines


def _probe() -> dict[str, Any]:
    with ExitStack() as stack:
        run = _Run(stack, DEFAULT, {"mode": "program", "source": ""})
        _watch([run])
    return run.report


def _walls(report: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    facts = {fact.rstrip("0123456789") for fact in report["facts"].split()}
    alone = "no process is started"
    walls = {
        "reaching the network": {"namespaces": "network namespace", "seccomp": "seccomp"},
        "reading files": {"namespaces": "mount namespace", "landlock": "Landlock"},
        "writing files": {"namespaces": "mount namespace", "landlock": "Landlock", "user": "a user of its own"},
        "reaching other processes": {"namespaces": "process namespace", "seccomp": "seccomp", "user": "a user of its own"},
        "leaving processes behind": {"namespaces": "process namespace", "seccomp": alone, "single": alone},
        "using up processes": {"namespaces": "limit of processes", "seccomp": alone, "single": alone},
        "using up memory": {"memory": "limit of address space"},
        "using up the disk": {"namespaces": "file system of limited size"},
    }
    return {what: tuple(how for fact, how in by.items() if fact in facts) for what, by in walls.items()}


class _Run:
    """One job of the jail, seen from outside: what it was given, what it has printed, what its supervisor reports."""

    def __init__(
        self,
        stack: ExitStack,
        limits: Limits,
        spec: dict[str, Any],
        stdin: bytes = b"",
        requests: FileIO | None = None,
        answers: FileIO | None = None,
    ):
        self.limits = limits
        folder = tempfile.mkdtemp(prefix="jevons-")
        stack.callback(_remove, folder)
        spec |= {"folder": folder} | {name: getattr(limits, name) for name in ("seconds", "memory_mb", "processes", "file_mb")}
        (out, out_end), (err, err_end) = _pipe(stack), _pipe(stack)
        self.line, line_end = socket.socketpair()
        stack.enter_context(self.line)
        stack.enter_context(line_end)
        self.printed = {out: bytearray(), err: bytearray()}
        self.err_end = err_end
        files = _file(stack, folder, encode(spec, plain)), _file(stack, folder, stdin)
        # in the order of the jail's Job
        self.given: list[FileIO | socket.socket | None] = [*files, out_end, err_end, line_end, requests, answers]
        self.told = bytearray()
        self.flooded = False

    def close_given(self) -> None:
        for end in self.given:
            if end:
                end.close()

    def stop(self) -> None:
        """Have it killed; its report still comes."""
        self.line.shutdown(socket.SHUT_WR)

    def hear(self, source: FileIO | socket.socket) -> bool:
        """Take what has come; False at the end of it."""
        if isinstance(source, socket.socket):
            data = source.recv(2**16)
            self.told += data
            return bool(data)
        data = source.read(2**16) or b""
        printed = self.printed[source]
        room = self.limits.output_kb * 1024 - len(printed)
        printed += data[:room]
        if len(data) > room and not self.flooded:
            self.flooded = True
            self.stop()
        return bool(data)

    @cached_property
    def report(self) -> dict[str, Any]:
        _, err = self.printed.values()
        report = decode(bytes(self.told), plain) if self.told else {"reason": "broken", "detail": err.decode("utf-8", "replace")}
        if report["reason"] == "broken":
            raise OSError(f"the sandbox cannot run here: {report['detail'].strip() or 'its supervisor was killed'}")
        return report

    def reason(self) -> Reason:
        """Why it did not end well; "" where it did, or was stopped."""
        reason, detail = self.report["reason"], self.report["detail"]
        if self.flooded:
            return "output"
        if reason == "time" or (reason == "signal" and int(detail) == SIGXCPU):
            return "time"
        if reason == "stopped" or (reason == "exit" and int(detail) == 0):
            return ""
        if reason == "exit":
            return "memory" if int(detail) == OUT_OF_MEMORY else "error"
        return "signal"

    def missed(self) -> bool:
        """Whether these are tests, and the code that they test has ended its process."""
        return self.report["reason"] == "exit" and int(self.report["detail"]) == GONE

    def result(self, reason: Reason) -> Result:
        out, err = (bytes(printed).decode("utf-8", "replace") for printed in self.printed.values())
        return Result(not reason, out, err, reason, self.report["seconds"])


def _watch(runs: list[_Run]) -> None:
    """Start the jail for these runs and listen until the last of them has ended; the others are stopped then."""
    jobs = [",".join(str(end.fileno()) if end else "-1" for end in run.given) for run in runs]
    fds = [end.fileno() for run in runs for end in run.given if end]
    root = str(Path(__file__).parents[2])  # where the package lies
    # -I but for its -E: sets keep one order, and the code does not see the variable
    command = [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", "-c", START, root, *jobs]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": runs[0].err_end}
    jail = subprocess.Popen(command, env={"PYTHONHASHSEED": "0"}, pass_fds=fds, start_new_session=True, **quiet)  # type: ignore[call-overload]
    try:
        for run in runs:
            run.close_given()
        with selectors.DefaultSelector() as selector:
            _listen(selector, runs)
    finally:
        for run in runs:
            run.line.close()  # a supervisor that is still there kills its job now
        try:
            jail.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(jail.pid, SIGKILL)
            jail.wait()


def _listen(selector: selectors.BaseSelector, runs: list[_Run]) -> None:
    for run in runs:
        run.line.setblocking(False)
        selector.register(run.line, selectors.EVENT_READ, run)
        for stream in run.printed:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, run)
    going, last, stopped = len(runs), runs[-1], False
    deadline = time.monotonic() + max(run.limits.seconds for run in runs) + GRACE
    while going:
        events = selector.select(max(0.0, deadline - time.monotonic()))
        if not events:
            if stopped:
                return
            for run in runs:
                run.stop()
            stopped, deadline = True, time.monotonic() + GRACE
        for key, _ in events:
            if key.data.hear(key.fileobj):
                continue
            selector.unregister(key.fileobj)
            if key.fileobj is key.data.line:
                going -= 1
            if key.fileobj is last.line:
                # where tests miss the code, its own end is about to be reported, which says more; or it closed its pipes and lives on
                deadline = time.monotonic() + (PATIENCE if last.missed() else 0.0)
    for run in runs:  # all have ended: the rest lies in the pipes
        for stream in run.printed:
            while run.hear(stream):
                pass


def _pipe(stack: ExitStack) -> tuple[FileIO, FileIO]:
    read, write = os.pipe()
    return stack.enter_context(FileIO(read, "r")), stack.enter_context(FileIO(write, "w"))


def _file(stack: ExitStack, folder: str, content: bytes) -> FileIO:
    """A file with this content, to read only, that has no name any more."""
    path = Path(folder, "given")
    path.write_bytes(content)
    file = stack.enter_context(FileIO(path, "r"))
    path.unlink()
    return file


def _remove(folder: str) -> None:
    """Delete a folder that hostile code has filled: nested deeper than paths and recursion go, without permissions.

    Nothing of the code runs any more. Every folder's contents are moved up until none is inside another.
    """
    prefix, count = f"{folder}/{secrets.token_hex(8)}-", 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # to move a folder, one must be allowed to write into it
                os.rename(inner.path, f"{prefix}{count}")
                count += 1
            os.rmdir(entry.path)
    os.rmdir(folder)
