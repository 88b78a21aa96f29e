"""An answer as Anthropic's content blocks: thinking, text, tool_use, and the events by which they grow.

As in item.py one machine makes the streamed and the whole form. A call's arguments go out in one piece when it is complete: Anthropic's
SDK parses them as they come and raises on what is no JSON, which a small model may write. Such arguments become
{"INVALID_JSON": "..."}, Anthropic's own convention.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from jevons.server.job import Piece

Event = dict[str, Any]


class Blocks:
    """The blocks so far. `take` and `close` return the events that tell of the change. hide_thinking: its block stays empty."""

    def __init__(self, *, hide_thinking: bool = False) -> None:
        self.content: list[dict[str, Any]] = []
        self._hide_thinking = hide_thinking
        self._open: tuple[str, int] | None = None
        self._text = ""  # of the open block

    def take(self, piece: Piece) -> list[Event]:
        events: list[Event] = []
        if self._open != (piece.kind, piece.call):
            events = [*self.close(), self._add(piece)]
        self._text += piece.text
        block = self.content[-1]
        if piece.text and piece.kind == "content":
            block["text"] += piece.text
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        elif piece.text and piece.kind == "reasoning" and not self._hide_thinking:
            block["thinking"] += piece.text
            events.append(self._delta({"type": "thinking_delta", "thinking": piece.text}))
        return events

    def close(self) -> list[Event]:
        """End the block that is still open, if one is."""
        if self._open is None:
            return []
        kind, block, events = self._open[0], self.content[-1], list[Event]()
        if kind == "call":
            text, block["input"] = _arguments(self._text)
            events.append(self._delta({"type": "input_json_delta", "partial_json": text}))
        elif kind == "reasoning":
            # clients send it back unread; here nothing depends on it, since any reasoning is taken
            block["signature"] = hashlib.sha256(self._text.encode()).hexdigest()
            events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": len(self.content) - 1}]

    def _add(self, piece: Piece) -> Event:
        self._open, self._text = (piece.kind, piece.call), ""
        if piece.kind == "call":
            block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
        elif piece.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self.content.append(block)
        return {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _arguments(text: str) -> tuple[str, dict[str, Any]]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # NaN and halves of surrogate pairs are Python's, not JSON's
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return text, value
    value = {"INVALID_JSON": text}
    return json.dumps(value, ensure_ascii=False), value
