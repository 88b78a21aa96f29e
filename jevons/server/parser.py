"""An answer's tokens into reasoning, content and tool calls, as they come.

A tag counts if it is the tag's own token: "<think>" written in letters is text, and so is a tag out of place (ten <think> in an answer).
Only a tokenizer that lacks a tag as one token has it looked for in the text, and then the end of the text is held back while it may be the
beginning of a tag.

    start      white space only; <think> opens the reasoning, a call's tag a call, anything else is content
    reasoning  until </think>. Never closed: all of it stays reasoning and there is no content. A call's tag in it opens nothing: to think
               of a call is not to make it
    content    until a call's tag
    call       until the closing tag, the next opening tag, or the end. A body that is no call becomes content, tags and all

A <think> that is opened again before any thought, line breaks after <think>, after </think> and white space around calls belong to the
format and are dropped. Special tokens (end of text, ends of turns) never show. All pieces joined say the same however early or late
text could be released.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Literal

from jevons.data.chat import END_THINK, THINK
from jevons.data.tokenizer import TextStream, Tokenizer
from jevons.server.job import Piece, Reply
from jevons.server.stop import held_back
from jevons.server.tool import SYNTAX, CallReader

Kind = Literal["reasoning", "content", "call"]


def opens_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside an opened <think>, so that the answer begins as reasoning."""
    think = added_token(tokenizer, THINK)
    if think is None:
        return tokenizer.decode(prompt[-16:]).rstrip().endswith(THINK)
    last = next((i for i in range(len(prompt) - 1, -1, -1) if tokenizer.decode(prompt[i : i + 1]).strip()), None)
    return last is not None and prompt[last] == think


def added_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a token outside the ordinary vocabulary."""
    id = tokenizer.raw.token_to_id(text)
    return id if id is not None and id in tokenizer.raw.get_added_tokens_decoder() else None


class ReplyParser:
    """Reads one answer. `kind` is what the last token counted as, `calls` how many calls were given out."""

    def __init__(self, tokenizer: Tokenizer, reply: Reply) -> None:
        self.kind: Kind = "content"
        self.reasoning_tokens = 0
        self.calls = 0
        self._reply = reply
        self._syntax = SYNTAX[reply.tools] if reply.tools and not reply.plain else None
        tags = [] if reply.plain else [THINK, END_THINK]
        if self._syntax:
            tags += [self._syntax.open, self._syntax.close, *self._syntax.around, *self._syntax.inside]
        self._ids = {id: tag for tag in tags if (id := added_token(tokenizer, tag)) is not None}
        self._written = set(tags) - set(self._ids.values())  # to be found in the text
        added = tokenizer.raw.get_added_tokens_decoder()
        self._unseen: set[int | None] = {id for id, token in added.items() if token.special}
        self._unseen |= {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        self._stream = TextStream(tokenizer, skip_special=False)  # those that must not show do not come here
        self._state: Literal["start", "reasoning", "content", "call"] = "start"
        if reply.plain:
            self._state = "content"
        elif reply.thinking:
            self._state = "reasoning"
        self._fresh = True  # no text in this state yet
        self._after_tag = False  # the state is "start", but behind reasoning or a call: white space is the format's
        self._blank = ""  # white space that belongs to content if content follows
        self._held = ""  # may be the beginning of a tag
        self._reader: CallReader | None = None
        self._call = 0
        self._pieces: list[Piece] = []

    @property
    def thinking(self) -> bool:
        return self._state == "reasoning"

    def push(self, token: int) -> list[Piece]:
        """The pieces that this token decides; two kinds never share one."""
        before = self.thinking
        if token in self._ids:
            self._text(self._stream.flush(), end=True)
            self._stream.push(token)
            self._tag(self._ids[token])
        elif token not in self._unseen:
            self._text(self._stream.push(token))
        if before or self.thinking:
            self.kind = "reasoning"
            self.reasoning_tokens += 1
        else:
            self.kind = "call" if self._state == "call" or (token in self._ids and self._after_tag) else "content"
        return self._take()

    def finish(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        self._text(self._stream.flush(), end=True)
        if self._state == "call":
            self._end_call("")
        if self._state == "start" and not self._after_tag:
            self._give("content", self._blank)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _give(self, kind: Kind, text: str) -> None:
        if not text:
            return
        last = self._pieces[-1] if self._pieces else None
        if last and last.kind == kind and not last.name and (kind != "call" or last.call == self._call):
            self._pieces[-1] = Piece(kind, last.text + text, last.call)
        else:
            self._pieces.append(Piece(kind, text, self._call if kind == "call" else 0))

    def _text(self, text: str, *, end: bool = False) -> None:
        """Text that may hold tags in letters; with `end` nothing is held back any more."""
        text, self._held = self._held + text, ""
        while True:
            tags = [tag for tag in self._active() if tag in self._written]
            found = min(((at, tag) for tag in tags if (at := text.find(tag)) >= 0), default=None)
            if found is None:
                break
            at, tag = found
            self._plain(text[:at])
            if tag in self._active():  # the text before it may have moved the state on
                self._tag(tag)
            else:
                self._plain(tag)
            text = text[at + len(tag) :]
        cut = len(text) if end else len(text) - held_back(text, tags)
        self._held = text[cut:]
        self._plain(text[:cut])

    def _active(self) -> set[str]:
        """The tags that mean something in this state."""
        calls = {self._syntax.open, *self._syntax.around} if self._syntax else set()
        match self._state:
            case "start":
                return calls if self._after_tag else calls | {THINK}
            case "reasoning":
                return {THINK, END_THINK} if self._fresh else {END_THINK}
            case "content":
                return calls
            case "call":
                assert self._syntax
                return {self._syntax.open, self._syntax.close}

    def _tag(self, tag: str) -> None:
        if tag not in self._active() or self._reply.plain:
            self._plain(tag)
        elif tag == THINK:
            self._enter("reasoning")
        elif tag == END_THINK:
            self._enter("start", after_tag=True)
        elif self._syntax and tag == self._syntax.open:
            if self._state == "call":
                self._end_call("")
            self._blank = ""
            self._reader = CallReader(self._reply.tools or "hermes", self._reply.schemas)
            self._enter("call")
        elif self._state == "call":
            self._end_call(tag)
        else:  # around calls
            self._enter("start", after_tag=True)

    def _enter(self, state: Literal["start", "reasoning", "content", "call"], *, after_tag: bool = False) -> None:
        self._state, self._after_tag, self._fresh = state, after_tag, True
        self._blank = ""

    def _plain(self, text: str) -> None:
        """Text without tags, to where the state sends it."""
        match self._state:
            case "start":
                self._blank += text
                if text.strip():
                    text = self._blank.lstrip("\n") if self._after_tag else self._blank
                    self._enter("content")
                    self._give("content", text)
            case "reasoning":
                text = text.lstrip("\n") if self._fresh else text
                self._fresh = self._fresh and not text
                self._give("reasoning", text)
            case "content":
                self._give("content", text)
            case "call":
                assert self._reader
                known = self._reader.name
                self._arguments(known, self._reader.push(text))

    def _arguments(self, known: str | None, text: str) -> None:
        assert self._reader
        if known is None and self._reader.name is not None:
            self._call, self.calls = self.calls, self.calls + 1
            self._pieces.append(Piece("call", call=self._call, id=f"call_{secrets.token_hex(12)}", name=self._reader.name))
        self._give("call", text)

    def _end_call(self, tag: str) -> None:
        assert self._reader and self._syntax
        reader, known = self._reader, self._reader.name
        self._arguments(known, reader.close())
        self._enter("start", after_tag=True)
        if reader.name is None:
            self._plain(self._syntax.open + reader.raw + tag)
