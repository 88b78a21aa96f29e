"""The answer in a reply: what stands where the task asked for it, after the reasoning.

Models write answers in the form that they were asked for, or nearly. Each rule looks in one place, the last one of its kind, so that a
reply cannot be graded on the best of several answers. Reasoning is never searched: a right number that is thought of and then dropped is
no answer.
"""

from __future__ import annotations

import re

from jevons.tasks.task import answer_text

RULES = ("auto", "answer", "boxed", "line", "whole")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
LEAD = re.compile(r"^(?:so,?\s+|thus,?\s+|therefore,?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*:?|:|=)\s*", re.IGNORECASE)


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"extract: must be one of {', '.join(RULES)}, is {rule!r}")


def extract(reply: str, rule: str = "auto", *, lines: bool = False) -> str:
    r"""The answer of a reply, "" where there is none in the place to look at.

    answer: inside the last <answer> tags. boxed: inside the last \boxed{}. line: the last line, without "The answer is", markdown's stars
    or a full stop. whole: everything after the reasoning. auto: the first of answer and boxed that is there, else the last line, or with
    `lines`, for answers of several lines, everything.
    """
    text = answer_text(reply)
    if rule in ("auto", "answer") and (found := tagged(text)) is not None:
        return found
    if rule in ("auto", "boxed") and (found := boxed(text)) is not None:
        return found
    if rule == "whole" or (rule == "auto" and lines):
        return text
    return last_line(text) if rule in ("auto", "line") else ""


def write(answer: str, rule: str) -> str:
    """An answer as this rule finds it."""
    if rule in ("auto", "answer"):
        return f"<answer>{answer}</answer>"
    return f"\\boxed{{{answer}}}" if rule == "boxed" else answer


def tagged(text: str) -> str | None:
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside.strip() if opened and closed else None


def boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...}, braces balanced; None where there is none or it never ends."""
    starts = list(BOX.finditer(text))
    if not starts:
        return None
    start = depth_from = starts[-1].end()
    depth = 1
    for at in range(depth_from, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if not depth:
                return text[start:at].strip()
    return None


def last_line(text: str) -> str:
    line = text[text.rfind("\n") + 1 :].strip().strip("*`").strip()
    line = LEAD.sub("", line, count=1).strip().strip("*`$").strip()
    return line[:-1].rstrip("*`$ ") if line.endswith(".") and not line.endswith("..") else line
