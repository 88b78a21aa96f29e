"""Stop strings: end a text that arrives in pieces at the first of several strings, and never release a part of one.

Tokens do not respect the strings' borders, so text that may be the beginning of a stop string is held back until it is decided. The first
string to be complete wins, as if the text came character by character: the result does not depend on how it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def held_back(text: str, needles: Iterable[str]) -> int:
    """Length of the longest end of text that is a proper beginning of one of the needles."""
    return max((n for needle in needles for n in range(1, min(len(needle) - 1, len(text)) + 1) if text.endswith(needle[:n])), default=0)


class StopFinder:
    """Releases text up to the stop string that is complete first; of two that end together, the longer."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text to release and the stop string that was found. After one is found nothing more may be pushed."""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at, stop = min(found)
            return text[:at], stop
        cut = len(text) - held_back(text, self._stops)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text
