"""An answer as the output items of OpenAI's Responses: reasoning, message, function_call, and the events by which they grow.

One machine makes both forms: a streamed reply is its events, an unstreamed one what its items hold in the end, so the two cannot differ.
Every item that is added is done, in order, before the next begins.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

from jevons.server.job import Piece

ItemStatus = Literal["completed", "incomplete"]
Event = dict[str, Any]


class Output:
    """The items so far. `take` and `close` return the events that tell of the change, without sequence numbers."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: tuple[str, int] | None = None  # what the last item is: its pieces' kind, and for calls which one

    def take(self, piece: Piece) -> list[Event]:
        events: list[Event] = []
        if self._open != (piece.kind, piece.call):
            events += self.close("completed") + self._add(piece)
        if piece.text:
            events.append(self._grow(piece.text))
        return events

    def close(self, status: ItemStatus) -> list[Event]:
        """End the item that is still open, if one is."""
        if self._open is None:
            return []
        kind, item, at = self._open[0], self.items[-1], self._at()
        self._open = None
        item["status"] = status
        if kind == "call":
            events = [{"type": "response.function_call_arguments.done", **at, "name": item["name"], "arguments": item["arguments"]}]
        else:
            part = item["content"][0]
            done = {"type": f"response.{part['type']}.done", **at, "content_index": 0, "text": part["text"]}
            events = [done | ({"logprobs": []} if kind == "content" else {})]
            events.append({"type": "response.content_part.done", **at, "content_index": 0, "part": dict(part)})
        return [*events, {"type": "response.output_item.done", "output_index": at["output_index"], "item": dict(item)}]

    def ensure_answer(self) -> list[Event]:
        """An empty message for an answer that said nothing and called nothing: clients read the last item."""
        if any(item["type"] != "reasoning" for item in self.items):
            return []
        return self.close("completed") + self._add(Piece("content"))

    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _add(self, piece: Piece) -> list[Event]:
        self._open = piece.kind, piece.call
        item: dict[str, Any]
        part: dict[str, Any] | None = None
        if piece.kind == "call":
            item = {"type": "function_call", "id": _id("fc"), "call_id": piece.id, "name": piece.name, "arguments": ""}
        elif piece.kind == "reasoning":
            item, part = {"type": "reasoning", "id": _id("rs"), "summary": []}, {"type": "reasoning_text", "text": ""}
        else:
            item, part = {"type": "message", "id": _id("msg"), "role": "assistant"}, {"type": "output_text", "text": ""}
            part |= {"annotations": [], "logprobs": []}
        self.items.append(item | {"status": "in_progress"} | ({} if part is None else {"content": []}))
        at = self._at()
        events: list[Event] = [{"type": "response.output_item.added", "output_index": at["output_index"], "item": _copy(self.items[-1])}]
        if part is not None:
            self.items[-1]["content"].append(part)
            events.append({"type": "response.content_part.added", **at, "content_index": 0, "part": dict(part)})
        return events

    def _grow(self, text: str) -> Event:
        assert self._open is not None
        kind, item, at = self._open[0], self.items[-1], self._at()
        if kind == "call":
            item["arguments"] += text
            return {"type": "response.function_call_arguments.delta", **at, "delta": text}
        part = item["content"][0]
        part["text"] += text
        delta = {"type": f"response.{part['type']}.delta", **at, "content_index": 0, "delta": text}
        return delta | ({"logprobs": []} if kind == "content" else {})


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return item | ({"content": list(item["content"])} if "content" in item else {})


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
