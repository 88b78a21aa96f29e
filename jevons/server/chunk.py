"""One choice of a chat completion as OpenAI's clients read it: whole, or in chunks.

A chunk carries thinking or content or a tool call, never two of them. Log-probabilities wait for the next chunk that has text of
their kind, since a token that ends inside a character, or might begin a stop string, shows its text later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from jevons.server.error import APIError
from jevons.server.field import best
from jevons.server.job import Piece, Token, Update
from jevons.server.vocabulary import Vocabulary

# finish reasons under the names of the wire; the engine aborts by itself only where it runs out of something
FINISH = {"abort": "insufficient_system_resource"}


class Choice:
    """What one choice has said. `top` is the number of alternatives for each token, None for no log-probabilities."""

    def __init__(
        self, index: int, vocabulary: Vocabulary, *, stop_ids: Collection[int], opened: bool, top: int | None, sampled: bool
    ) -> None:
        self.index, self.opened = index, opened
        self.finish: str | None = None
        self._vocabulary, self._stop_ids, self._top, self._sampled = vocabulary, stop_ids, top, sampled
        self._text: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[dict[str, Any]] = []
        self._logs: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
        self._begun = False

    def take(self, update: Update) -> None:
        """For a reply in one piece: keep what came."""
        self._note(update.tokens)
        for piece in update.pieces:
            if piece.kind != "call":
                self._text[piece.kind].append(piece.text)
            elif piece.id:
                function = {"name": piece.name, "arguments": piece.text}
                self._calls.append({"id": piece.id, "type": "function", "function": function})
            else:
                self._calls[piece.call]["function"]["arguments"] += piece.text
        if update.finish is not None:
            self.finish = FINISH.get(update.finish, update.finish)

    def whole(self) -> dict[str, Any]:
        content, reasoning = "".join(self._text["content"]), "".join(self._text["reasoning"])
        message: dict[str, Any] = {"role": "assistant", "content": None if self._calls and not content else content}
        if reasoning or self.opened:
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = self._calls
        logs = self._take_logs("content", "reasoning_content")
        return {"index": self.index, "message": message, "logprobs": logs, "finish_reason": self.finish}

    def chunks(self, update: Update) -> Iterator[dict[str, Any]]:
        """For a streamed reply: the entries of `choices` that this update makes."""
        self._note(update.tokens)
        if not self._begun:
            self._begun = True
            thinks = self.opened or bool(update.pieces and update.pieces[0].kind == "reasoning")
            yield self._chunk({"role": "assistant"} | ({"content": None, "reasoning_content": ""} if thinks else {"content": ""}))
        for piece in update.pieces:
            kind = "reasoning_content" if piece.kind == "reasoning" else "content"
            yield self._chunk(_delta(piece), logs=self._take_logs(kind))
        if update.finish is not None:
            yield self._chunk({}, logs=self._take_logs("content", "reasoning_content"), finish=FINISH.get(update.finish, update.finish))

    def _chunk(self, delta: dict[str, Any], *, logs: dict[str, Any] | None = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logs, "finish_reason": finish}

    def _note(self, tokens: list[Token]) -> None:
        if self._top is None:
            return
        for token in tokens:
            if token.id in self._stop_ids:  # the end is not part of the message
                continue
            own, pairs = best(token.raw_logp, token.id, token.alternatives)
            entry = self._entry(token.id, best(token.logp, token.id, [])[0] if self._sampled else own)
            entry["top_logprobs"] = [self._entry(id, value) for id, value in pairs[: self._top]]
            self._logs["reasoning_content" if token.kind == "reasoning" else "content"].append(entry)

    def _entry(self, id: int, logp: float) -> dict[str, Any]:
        return {"token": self._vocabulary.text(id), "logprob": logp, "bytes": list(self._vocabulary.data(id))}

    def _take_logs(self, *kinds: str) -> dict[str, Any] | None:
        """What is known of these kinds and was not given out; None where there is nothing, or nothing was asked for."""
        if self._top is None or not any(self._logs[kind] for kind in kinds):
            return None
        taken: dict[str, Any] = {"content": None} | {kind: self._logs[kind] for kind in kinds if self._logs[kind]}
        self._logs |= {kind: [] for kind in kinds}
        return taken


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.id:
        call = {"index": piece.call, "id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.text}}
    else:
        call = {"index": piece.call, "function": {"arguments": piece.text}}
    return {"tool_calls": [call]}


def failure(error: APIError) -> dict[str, Any]:
    """An error in the middle of a stream; `status` lets a client tell a fault of the server from its own."""
    return {"error": error.body()["error"] | {"status": error.status}}
