"""Functions that a model may call while it solves a problem: Python in the sandbox, and a calculator.

A call is a model's text. Whatever is wrong with one is answered in words, which is also how the model learns to call. The calculator reads
the expression's syntax tree, with exact fractions and bounds on every operation; Python runs in `tasks/sandbox.py` alone. Not done: state
between calls.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jevons.tasks.task import Problem, Task, nearest

MAX_OUTPUT = 4000  # characters that a tool answers
MAX_EXPRESSION = 256
MAX_BITS = 4096  # of a number on the calculator's way
DIGITS = 12  # after the point, of a fraction's decimals
OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
TOOLS = {
    "python": ("code", "Run a Python program, alone and without network; returns what it prints."),
    "calculator": ("expression", "The value of an arithmetic expression with numbers, + - * / // % ** and parentheses."),
}


@dataclass(frozen=True)
class Equipped(Task):
    """A task whose option `tools` names functions that a reply may call."""

    tools_: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.tools_:
            if name not in TOOLS:
                raise ValueError(f"tools: unknown {name!r}; known: {', '.join(TOOLS)}{nearest(name, TOOLS)}")

    def tools(self) -> list[dict[str, Any]]:
        return [_schema(name, *TOOLS[name]) for name in self.tools_]

    def notices(self) -> tuple[str, ...]:
        if "python" not in self.tools_:
            return super().notices()
        from jevons.tasks.sandbox import gaps  # here: it looks at what the system allows

        return (*super().notices(), *gaps())

    def call(self, problem: Problem, name: str, arguments: dict[str, Any]) -> str:
        if name not in self.tools_:
            return f"error: there is no tool {name!r}; there is {', '.join(self.tools_) or 'none'}"
        (parameter, _) = TOOLS[name]
        value = arguments.get(parameter) if isinstance(arguments, dict) else None
        if not isinstance(value, str):
            return f"error: {name} needs the argument {parameter!r}, a string"
        answer = _python(value) if name == "python" else calculate(value)
        return answer if len(answer) <= MAX_OUTPUT else f"{answer[:MAX_OUTPUT]}\n[cut after {MAX_OUTPUT} characters]"

    def quick(self, name: str) -> bool:
        return name != "python"


def _schema(name: str, parameter: str, description: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _python(code: str) -> str:
    from jevons.tasks.sandbox import run_code  # here: it looks at what the system allows

    result = run_code(code)
    if result.ok:
        return result.stdout or "(it printed nothing)"
    return "\n".join(filter(None, (result.stdout, result.stderr[-MAX_OUTPUT // 2 :], f"error: {result.reason}")))


def calculate(expression: str) -> str:
    """The value of an expression as text, exact where it is whole, else with 12 decimals; "error: ..." where it has none."""
    if len(expression) > MAX_EXPRESSION:
        return f"error: longer than {MAX_EXPRESSION} characters"
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what ast.parse raises for text that is no expression
        return "error: not an arithmetic expression"
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: a number became too large"
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(abs(value) * 10**DIGITS)
    whole, rest = divmod(scaled, 10**DIGITS)
    return f"{'-' if value < 0 else ''}{whole}.{rest:0{DIGITS}}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(Fraction(repr(number)))  # 0.1 as it was written
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return _value(operand) if isinstance(sign, ast.UAdd) else -_value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return _bounded(Fraction(OPERATIONS[type(op)](_value(left), _value(right))))
    raise ValueError("not arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("roots are not rational")
    if (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise OverflowError
    return Fraction(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
        raise OverflowError
    return value
