"""A jinja2 sandbox that also bounds time and memory: a chat template comes with a model that a stranger published.

jinja2's own sandbox refuses attributes and methods that reach the interpreter. It lets a template run for ever and make a string of any
length. Here the compiled template counts: every block (a loop's turn, a branch, a macro) looks at the clock, every string, list or number
made is charged to one budget, and whatever could become large in one step is estimated before the step. Jinja compiles templates to Python,
so most of this is a code generator that writes a few calls more.

    charge   the length of what was made, against MAX_TOTAL for a rendering
    weigh    a value with all it holds, against MAX_VALUE: what is nested in itself doubles with every level, and so does its text
    check    the thread's own processor time, so that a busy machine refuses nobody

Everything raises LimitError, a jinja2 TemplateError. Filters and methods that no chat template needs and whose cost is hard to bound are
absent (REFUSED).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import wraps
from itertools import chain
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SOURCE = 1 << 17  # characters of a template; jinja compiles as many in two seconds
MAX_SECONDS = 1.0  # of processor time for one rendering
MAX_VALUE = 1 << 24  # characters, where a value that holds others counts as NODE
MAX_TOTAL = 1 << 27
MAX_NUMBER = 100_000  # as a width, a count, ...
MAX_BITS = 4096
NODE = 32
ATOMS = (str, int, float, type(None))  # hold nothing; a long string is compared and copied at the speed of memory
LARGE_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\d{5}|\*)|\{[^{}]*(?:\d{5}|\{)")  # up to 9,999, written as a number

REFUSED = {"lipsum", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr", "expandtabs", "translate", "to_bytes"}
# What these return is longer than what they are given: at most the product of the lengths
GROWING = {"batch", "center", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "slice", "tojson", "zfill"}
# Filters that look at a container without reading what it holds
SHALLOW = {"attr", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr", "reverse", "select"}
SHALLOW |= {"selectattr"}


class LimitError(TemplateError):
    pass


class _Spent(threading.local):
    total = 0
    ticks = 0
    until = 0.0


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates that may be rendered in any thread, each rendering begun with `begin`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # Unoptimised and with a finalizer that needs its context: nothing is computed while compiling
        super().__init__(**options, optimized=False, finalize=pass_context(lambda _, value: self.shown(value)))
        self.code_generator_class = _CountingGenerator
        self._spent = _Spent()
        for name in REFUSED & self.filters.keys():
            del self.filters[name]
        for name in REFUSED & self.globals.keys():
            del self.globals[name]
        self.globals["namespace"] = _Namespace
        self.filters = {name: self._bounded(name, filter) for name, filter in dict[str, Any](self.filters).items()}
        self.tests = {name: self._bounded(name, test) for name, test in dict[str, Any](self.tests).items()}

    def add_filter(self, name: str, filter: Callable[..., Any]) -> None:
        self.filters[name] = self._bounded(name, filter)

    def begin(self) -> None:
        self._spent.total, self._spent.ticks = 0, 0
        self._spent.until = time.thread_time() + MAX_SECONDS

    def check(self, text: int = 0) -> None:
        """Called at the head of each block, with the length of the text that stands in it."""
        spent = self._spent
        spent.ticks += 1
        if spent.ticks % 16 == 0 and time.thread_time() > spent.until:
            raise LimitError(f"took more than {MAX_SECONDS} s")
        spent.total += max(text, 0)
        if text > MAX_VALUE or spent.total > MAX_TOTAL:
            raise LimitError(f"made too much text (at most {MAX_VALUE} characters at once and {MAX_TOTAL} in all)")

    def charge(self, value: Any) -> Any:
        """A value that was just made."""
        self.check(_length(value))
        return value

    def weigh(self, value: Any) -> Any:
        """A value that will be read to its depths."""
        if not isinstance(value, ATOMS):
            _weight(value)
        return value

    def shown(self, value: Any) -> Any:
        """A value about to become text."""
        self.check(_weight(value))
        return value

    def concat_all(self, values: tuple[Any, ...]) -> str:
        self.check(_weight(values))
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":  # of strings, in most templates: no more work than must be
            self.check(_length(left) + _length(right))
            return left + right
        if isinstance(left, int) and isinstance(right, int):
            if operator in ("*", "**") and left.bit_length() * (right if operator == "**" else 1) + right.bit_length() > MAX_BITS:
                raise LimitError("made a number that is too large")
        elif operator == "*" and isinstance(left, int):
            self.check(left * _length(right))
            return left * right
        elif operator == "*" and isinstance(right, int):
            self.check(right * _length(left))
            return left * right
        elif operator == "%" and isinstance(left, (str, bytes)):
            _refuse_growth("%", left, (right,))
        return self.charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        of, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(of, (str, bytes, int, float)):
            if name in REFUSED:
                raise LimitError(f"called {name}, which is not available")
            args, kwargs = _settled(args), dict(zip(kwargs, _settled(kwargs.values())))
            if name == "join" and args:
                _refuse_growth(name, args[0], (of,))
            elif name in GROWING:
                _refuse_growth(name, of, (*args, *kwargs.values()))
            return __self.shown(super().call(__context, __obj, *args, **kwargs))  # such as the parts of a split
        return __self.charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """str.format is replaced by the sandbox; the replacement is told whose method it is, for `call`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.__self__ = value.__self__  # type: ignore[attr-defined]
        return wrapped

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps what says that it wants the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            at = 1 if hasattr(function, "jinja_pass_arg") else 0
            if name not in SHALLOW and len(args) > at:
                args, kwargs = (*args[:at], *_settled(args[at:])), dict(zip(kwargs, _settled(kwargs.values())))
                rest = (*args[at + 1 :], *kwargs.values())
                if name in GROWING:
                    _refuse_growth(name, args[at], rest)
                elif name == "sum" and any(isinstance(value, Collection) and not isinstance(value, str) for value in rest):
                    raise LimitError("summed lists")
                else:
                    self.weigh((args[at], *rest))
            return self.charge(function(*args, **kwargs))

        return bounded


class _CountingGenerator(CodeGenerator):
    """Jinja's compiler, with calls of the environment around what costs."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        body = list(nodes_)
        outputs = (child for node in body if isinstance(node, nodes.Output) for child in node.nodes)
        text = sum(len(child.data) for child in outputs if isinstance(child, nodes.TemplateData))
        self.writeline(f"environment.check({text})")
        super().blockvisit(body, frame)

    def _around(self, method: str, visit: Callable[..., None], node: nodes.Node, frame: Frame) -> None:
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._around("shown", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._around("shown", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":  # else it is what a loop or an assignment unpacks into
            self._around("shown", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._around("charge", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_all((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("environment.charge(")
        self._around("weigh", self.visit, node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        operators = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
        self.write(f" {operators[node.op]} ")
        self._around("weigh", self.visit, node.expr, frame)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # jinja's shows all that it holds, and namespaces can hold each other
        return "<Namespace>"


def _length(value: Any) -> int:
    if isinstance(value, (str, bytes, list, tuple, dict)):
        return len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 1


def _weight(value: Any) -> int:
    """The length of a value with all that it holds, as often as it holds it. Raises LimitError beyond MAX_VALUE."""
    if isinstance(value, ATOMS):
        return len(value) if isinstance(value, str) else 0
    weight, stack = 0, [value]
    while stack:
        node = stack.pop()
        if isinstance(node, (str, bytes)):
            weight += len(node)
        elif not isinstance(node, ATOMS) and isinstance(node, Collection) and not isinstance(node, range):
            weight += NODE * (len(node) + 1)
            if weight <= MAX_VALUE:
                stack.extend(chain(node.keys(), node.values()) if isinstance(node, Mapping) else node)
        if weight > MAX_VALUE:
            raise LimitError(f"made a value of more than {MAX_VALUE} characters")
    return weight


def _settled(values: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments with iterators as lists, so that they can be weighed."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _refuse_growth(name: str, value: Any, args: tuple[Any, ...]) -> None:
    """Refuse what may become longer than MAX_VALUE: `name` of value with these arguments."""
    if name == "replace" and len(args) >= 2 and isinstance(value, str) and isinstance(args[0], str):
        bound = len(value) + value.count(args[0]) * _weight(args[1])
    elif name == "join":
        bound = _weight(value) + _length(value) * _weight(args)
    elif name in ("%", "format", "format_map"):
        text = str(value).replace("{{", "")
        if LARGE_WIDTH.search(text):
            raise LimitError("formatted with a large or a computed width")
        bound = len(text) + (text.count("%") + text.count("{")) * (10_000 + _weight(args))
    else:
        numbers = [abs(arg) for arg in args if isinstance(arg, int)]
        if any(number > MAX_NUMBER for number in numbers):
            raise LimitError(f"used a number above {MAX_NUMBER} as a width or a count")
        bound = (_weight(value) + 1) * (_weight(args) + sum(numbers) + 1 - NODE * (len(args) + 1))
    if bound > MAX_VALUE:
        raise LimitError(f"{name} could make more than {MAX_VALUE} characters")
