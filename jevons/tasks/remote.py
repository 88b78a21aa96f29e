"""Calls between two processes that do not trust each other: a test's and that of the code which it tests.

Tests and tested code in one interpreter cannot be kept apart: the code can replace `assert`'s surroundings, answer comparisons with objects
that are equal to everything, read the expected value off its caller's frame, or end the process with a status of its choice. So they get a
process each. The test's holds a `Remote` in place of each of the code's names; calling it sends the arguments over a pipe and gets a value
or an exception back. What crosses is plain data, written out and built anew: None, booleans, numbers, strings, bytes, lists, tuples, dicts,
sets, each of Python's own type, and these types. Every comparison therefore happens between the test's own objects.

What is not plain data stays where it is and is answered by a number, held as another `Remote`: a class, a tree's node, an iterator. Its
attributes, items and calls are fetched, one by one; it equals nothing but itself. Exceptions come back as Python's own of the same name,
except those that would end a loop or a process instead of failing a test.

Not done: passing a test's function into the tested code; showing a test what the code changed in its arguments. Both processes import this
file in a fraction of a millisecond, which is why the format is its own and not JSON.
"""

from __future__ import annotations

import builtins
import os
import struct

TYPE_CHECKING = False  # typing takes longer to import than all that happens here
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

MAX_MESSAGE = 2**26  # bytes
# StopIteration would end `all(f(x) == y for ...)` early, with the tests that stand behind it never made
SILENT = (StopIteration, StopAsyncIteration, GeneratorExit)
KINDS = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, object)  # cross by their names
COLLECTIONS: dict[bytes, Callable[[Iterable[Any]], Any]] = {b"l": list, b"t": tuple, b"s": set, b"z": frozenset}


def encode(value: Any, keep: Callable[[Any], int]) -> bytes:
    """A value as bytes. `keep` takes what is not plain data and gives the number that stands for it, or raises TypeError.

    Subclasses of plain types go as these: what a test compares with a Counter or a named tuple is its content. Raises RecursionError for
    values that contain themselves.
    """
    match value:
        case None:
            return b"n"
        case True | False:
            return b"b1" if value else b"b0"
        case int():
            return b"i%x;" % value if value >= 0 else b"i-%x;" % -value
        case float():
            return b"f" + struct.pack("<d", value)
        case complex():
            return b"c" + struct.pack("<dd", value.real, value.imag)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"u%d;" % len(text) + text
        case bytes() | bytearray():
            return b"y%d;" % len(value) + bytes(value)
        case dict():
            return b"d%d;" % len(value) + b"".join(encode(x, keep) for pair in value.items() for x in pair)
        case list() | tuple() | set() | frozenset():
            tag = next(tag for tag, kind in COLLECTIONS.items() if isinstance(value, kind))  # type: ignore[arg-type]
            return tag + b"%d;" % len(value) + b"".join(encode(x, keep) for x in value)
        case type() if value in KINDS:
            return b"k%d;" % KINDS.index(value)
        case _:
            return b"r%d;" % keep(value)


def decode(data: bytes, find: Callable[[int], Any]) -> Any:
    """The value that `encode` wrote, `find` giving what a number stands for. Raises ValueError for anything else."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if not 0 <= count <= len(data) - at:
            raise ValueError("cut short")
        at += count
        return data[at - count : at]

    def number(base: int = 10) -> int:
        nonlocal at
        end = data.index(b";", at)
        text, at = data[at:end], end + 1
        return int(text, base)

    def value() -> Any:
        tag = take(1)
        if tag == b"n":
            return None
        if tag == b"b":
            return take(1) == b"1"
        if tag == b"i":
            return number(16)
        if tag == b"f":
            return struct.unpack("<d", take(8))[0]
        if tag == b"c":
            return complex(*struct.unpack("<dd", take(16)))
        if tag == b"u":
            return take(number()).decode("utf-8", "surrogatepass")
        if tag == b"y":
            return take(number())
        if tag == b"d":
            return {value(): value() for _ in range(number())}
        if tag in COLLECTIONS:
            return COLLECTIONS[tag](value() for _ in range(number()))
        if tag == b"k":
            return KINDS[number()]
        if tag == b"r":
            return find(number())
        raise ValueError(f"unknown tag {tag!r}")

    try:
        result = value()
    except (TypeError, LookupError, RecursionError) as error:  # keys that cannot be keys; no such kind; too deep
        raise ValueError(str(error)) from None
    if at != len(data):
        raise ValueError("too long")
    return result


def plain(value: Any) -> int:
    raise TypeError(f"{type(value).__name__} is not plain data")


def send(fd: int, message: bytes) -> None:
    if len(message) > MAX_MESSAGE:
        raise ValueError(f"more than {MAX_MESSAGE} bytes in one value")
    view = memoryview(struct.pack("<Q", len(message)) + message)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> bytes | None:
    """The next message; None where the other side has closed."""
    head = _read(fd, 8)
    if head is None:
        return None
    (length,) = struct.unpack("<Q", head)
    if length > MAX_MESSAGE:
        raise ValueError(f"more than {MAX_MESSAGE} bytes in one value")
    return _read(fd, length)


def _read(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 2**20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# -- the tested code's process


def answer(names: dict[str, Any], requests: int, answers: int) -> NoReturn:
    """Carry out the test's requests until it closes. Runs among hostile code: what is done and answered here decides nothing."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def carry_out(kind: str, target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        match kind:
            case "name":
                if target not in names:
                    raise NameError(f"name {target!r} is not defined")
                return names[target]
            case "call":
                return target(*arguments, **named)
            case "get":
                return getattr(target, *arguments)
            case "set":
                return setattr(target, *arguments)
            case "item":
                return target[arguments[0]]
            case "list":
                return list(target)
            case _:
                return len(target)

    while (request := receive(requests)) is not None:
        try:
            reply = encode((True, carry_out(*decode(request, kept.__getitem__))), keep)
        except BaseException as error:  # also SystemExit: the call did not return
            reply = encode((False, (type(error).__name__, _words(error))), keep)
        send(answers, reply)
    os._exit(0)


def _words(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except BaseException:  # `__str__` is the tested code's
        return ""


# -- the test's process


class Gone(Exception):
    """The tested code's process has ended."""


class Connection:
    """The test's end: `ask` sends a request and gives its value, or raises what it raised."""

    def __init__(self, requests: int, answers: int):
        self.requests, self.answers = requests, answers

    def ask(self, kind: str, target: Any, *arguments: Any, **named: Any) -> Any:
        request = encode((kind, target, arguments, named), _number)
        try:
            send(self.requests, request)
            reply = receive(self.answers)
        except BrokenPipeError:
            reply = None
        if reply is None:
            raise Gone("the code has ended its process")
        match decode(reply, lambda number: Remote(self, number)):
            case (True, value):
                return value
            case (False, (str(name), str(words))):
                raise _exception(name)(words)
        raise ValueError("not an answer")


def _exception(name: str) -> type[Exception]:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, (*SILENT, UnicodeError, BaseExceptionGroup)):
        return kind
    return RuntimeError  # for the last two of these too, which do not take one string


class Remote:
    """An object of the tested code's process."""

    __slots__ = ("_ask", "_number")

    def __init__(self, connection: Connection, number: int):
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_ask", lambda kind, *rest, **named: connection.ask(kind, self, *rest, **named))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._ask("call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __iter__(self) -> Any:
        return iter(self._ask("list"))

    def __len__(self) -> int:
        return self._ask("size")

    def __bool__(self) -> bool:  # Python would ask for the length, which most objects do not have
        return True


def _number(value: Any) -> int:
    if type(value) is Remote:
        return object.__getattribute__(value, "_number")
    raise TypeError(f"a test cannot pass a {type(value).__name__} to the tested code")
