"""The other side of `tasks/pool.py`: a process that makes one call after another, of a function that nobody trusts to end.

It is started as a bare interpreter that imports this file and what the function needs, so it has none of its parent's memory, threads or
heavy packages. It cannot outlive what it is for: the kernel's alarm ends a call that the parent did not live to end, and a closed socket
ends the wait for the next one. What the function prints goes to stderr, where it cannot be mistaken for an answer.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

GRACE = 5  # seconds that a parent has to end a call itself


def main(descriptor: int) -> None:
    """Serve the parent at the other end of this socket until it closes."""
    connection = Connection(descriptor)
    os.dup2(2, 1)
    seconds, memory, payload = pickle.loads(connection.recv_bytes())
    if memory and sys.platform == "linux":  # elsewhere it is refused or ignored
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        ready, function = pickle.loads(payload)
        ready()
    except BaseException as error:  # whatever it is, the parent raises it: a module's import may even exit
        connection.send_bytes(json.dumps({"error": text(error)}).encode())
        sys.exit(1)
    connection.send_bytes(b"{}")
    while True:
        try:
            arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(answer(function, arguments, seconds))


def answer(function: Any, arguments: tuple[Any, ...], seconds: float) -> bytes:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # deadly even inside an operation that never comes back to Python
    signal.alarm(math.ceil(seconds) + GRACE)
    try:
        return json.dumps({"value": function(*arguments)}).encode()
    except BaseException as error:  # sys.exit and KeyboardInterrupt too are no way out of being graded
        return json.dumps({"error": text(error)}).encode()
    finally:
        signal.alarm(0)


def text(error: BaseException) -> str:
    """An error as its own words where it was raised for people to read, else with its type."""
    return str(error)[:2000] if type(error) is ValueError else f"{type(error).__name__}: {error}"[:2000]
