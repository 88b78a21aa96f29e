"""Talking to a model in the terminal: its thinking dimmed, its answer plain, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from jevons.data.chat import END_THINK, THINK, Message, parse_reply
from jevons.data.tokenizer import TextStream, Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.folder import load_model, resolve
from jevons.run import newest_model
from jevons.train import device

HELP = "/new starts over, /quit or Ctrl-D leaves, Ctrl-C stops a reply"


@dataclass
class Chat:
    """One conversation with one model. Without a chat template the model continues plain text instead."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, *, dtype: str, params: SamplingParams, system: str = "") -> Chat:
        """A run's folder, a model's folder or a hub name."""
        folder = newest_model(Path(name).expanduser())
        folder = resolve(name) if not folder.is_dir() else folder
        tokenizer = Tokenizer.load(folder)
        where = device.choose("auto")
        dtype = device.sampling_dtype(where) if dtype == "auto" else dtype
        model = load_model(folder, dtype=getattr(torch, dtype), device=where, mtp=False)
        if tokenizer.size > model.config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the model's embedding only {model.config.vocab_size}")
        engine = Engine(model, max_sequences=1, stop_ids=tokenizer.ends(model.config.eos_token_ids))
        return cls(engine, tokenizer, params, system)

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the reply to `text`, special tokens left out; the turn joins the conversation when it ends or is stopped."""
        if self.tokenizer.template is None:
            ids = self.tokenizer.encode(text)
        else:
            if self.system and not self.messages:
                self.messages.append(Message("system", self.system))
            self.messages.append(Message("user", text))
            ids = self.tokenizer.encode(self.tokenizer.template.render(self.messages, add_generation_prompt=True))
        room = self.engine.max_length - len(ids)
        if room < 1:
            raise ValueError(f"the conversation's {len(ids)} tokens fill the model's {self.engine.max_length} positions; /new starts over")
        params = replace(self.params, max_tokens=min(self.params.max_tokens, room))
        stream, pieces = TextStream(self.tokenizer), []
        try:
            for token in self.engine.stream(ids, params):
                pieces.append(stream.push(token))
                yield pieces[-1]
            pieces.append(stream.flush())
            yield pieces[-1]
        finally:
            if self.tokenizer.template is not None:
                self.messages.append(parse_reply("".join(pieces)))


def show(chat: Chat, text: str, console: Console) -> None:
    """Print a reply as it comes, thinking dimmed, and how fast it came."""
    start, count, thinking, seen = time.perf_counter(), 0, False, ""
    for piece in chat.reply(text):
        count += 1
        seen += piece
        thinking = seen.rfind(THINK) > seen.rfind(END_THINK)
        style = "dim" if thinking or piece.endswith(END_THINK) else ""
        console.print(Text(piece, style=style), end="")
        if piece.endswith(END_THINK):
            console.print()
    seconds = time.perf_counter() - start
    console.print()
    if console.is_terminal:
        console.print(f"[dim]{count} tokens, {count / seconds:,.1f} tokens/s[/]", highlight=False)


def chat(chat: Chat, prompts: list[str]) -> None:
    """Answer `prompts`, or talk until the user leaves. Without a terminal, each line of standard input is a turn."""
    console = Console(highlight=False, soft_wrap=True)
    for prompt in prompts:
        show(chat, prompt, console)
    if prompts:
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()

        console.print(f"[dim]{HELP}[/]")
    while True:
        try:
            line = input("\x1b[1m> \x1b[0m" if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line == "/new":
            chat.messages.clear()
            continue
        if not line:
            continue
        try:
            show(chat, line, console)
        except KeyboardInterrupt:
            console.print("\n[dim]stopped[/]")
