"""Text into token ids and back, around Hugging Face's `tokenizers`.

The folder format is Hugging Face's (tokenizer.json, tokenizer_config.json, chat_template.jinja), so that what is trained here loads in
transformers and what others trained loads here. Nothing is ever added behind the caller's back: no beginning-of-text token, no truncation,
no cleaning up of spaces. A special token written in the text is that token.

Not done: slow tokenizers (sentencepiece files without tokenizer.json), and transformers' options on encoding that tokenizer.json does not
hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from jevons.data.chat import DEFAULT_TEMPLATE, END_THINK, THINK, ChatTemplate

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, THINK, END_THINK)

# Words with one leading space or sign, single digits, runs of punctuation, line breaks, spaces. Digits stand alone because BPE would
# otherwise cut numbers by frequency ("2024" one token, "2025" two), and a model would learn arithmetic once for every such cut.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """A tokenizer with its bos, eos and pad tokens and its chat template (each may be None).

    Raises ValueError for a bos, eos or pad token that the vocabulary lacks.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        raw.no_truncation()  # some published files cut at 512 tokens
        raw.no_padding()
        self.raw = raw
        self.bos_token, self.eos_token, self.pad_token, self.chat_template = bos_token, eos_token, pad_token, chat_template
        for name, token in (("bos_token", bos_token), ("eos_token", eos_token), ("pad_token", pad_token)):
            if token is not None and raw.token_to_id(token) is None:
                raise ValueError(f"{name}: {token!r} is not in the vocabulary of tokenizer.json")
        self.bos_id, self.eos_id, self.pad_id = (
            None if token is None else raw.token_to_id(token) for token in (bos_token, eos_token, pad_token)
        )
        self.size: int = max(raw.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a Hugging Face folder. Raises ValueError that names the file which is missing or malformed."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a tokenizer's folder holds tokenizer.json (save it with transformers' fast tokenizer)")
        try:
            raw = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"{path}: not a tokenizer: {error}") from error
        path = folder / "tokenizer_config.json"
        try:
            config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            jinja = folder / "chat_template.jinja"
            template = jinja.read_text("utf-8") if jinja.is_file() else _default_template(config.get("chat_template"))
            return cls(raw, **{name: _token(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}, chat_template=template)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` and transformers' AutoTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.raw.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8")

    def encode(self, text: str) -> list[int]:
        return self.raw.encode(text, add_special_tokens=False).ids

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the (start, end) of each in characters. The tokens of a character that was split all name that character."""
        encoding = self.raw.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def ends(self, eos_ids: Iterable[int]) -> set[int]:
        """The ids that a reply ends in: those that the model's configuration names, the tokenizer's own, and the one special token that
        the chat template ends a turn with, where it is one. Base models' configurations know the last one as little as their tokenizers."""
        found = {*eos_ids, *([] if self.eos_id is None else [self.eos_id])}
        if self.template is not None:
            ids = self.encode(self.template.turn_end)
            found |= {*ids} if len(ids) == 1 and self.decode(ids, skip_special=True) == "" else set()
        return found

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. `<think>` is not special, so it stays."""
        return self.raw.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def template(self) -> ChatTemplate | None:
        if self.chat_template is None:
            return None
        return ChatTemplate(
            self.chat_template, bos_token=self.bos_token or "", eos_token=self.eos_token or "", pad_token=self.pad_token or ""
        )

    def digest(self) -> str:
        """sha256 of tokenizer.json in canonical form: equal digests mean equal ids for every text."""
        canonical = json.dumps(json.loads(self.raw.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_bytes(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 (size,); 0 for special tokens and unused ids. For bits per byte."""
        bytes_W = np.zeros(self.size, np.int32)
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self.raw.to_str())["decoder"])
        for token, i in self.raw.get_vocab(with_added_tokens=True).items():
            if is_byte_level and alphabet.issuperset(token):
                bytes_W[i] = len(token)  # one character of the alphabet for each byte
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                bytes_W[i] = 1  # sentencepiece's byte fallback
            else:
                bytes_W[i] = len(token.replace("\u2581", " ").encode())
        for i, added in self.raw.get_added_tokens_decoder().items():
            bytes_W[i] = 0 if added.special else len(added.content.encode())
        return bytes_W


class TextStream:
    """Detokenises id by id: what `push` and `flush` return, joined, is `decode` of all ids.

    Text is held back while it ends in a part of a character. Each step decodes only the ids since the last but one cut, since some decoders
    treat the first token apart. After LONGEST tokens that end so it is let go: it is no text, and to decode ever more of it at every step
    would let one request of such tokens keep a server busy.
    """

    LONGEST = 32

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._read = 0  # how many of _ids are in the text already given out

    def push(self, id: int) -> str:
        self._ids.append(id)
        text = self._pending()
        if not text or (text.endswith("\ufffd") and len(self._ids) - self._read < self.LONGEST):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text

    def flush(self) -> str:
        """What is still held back, with U+FFFD for a character that never ended."""
        text = self._pending()
        self._read = len(self._ids)
        return text

    def _pending(self) -> str:
        given = self._tokenizer.decode(self._ids[: self._read], self._skip_special)
        return self._tokenizer.decode(self._ids, self._skip_special)[len(given) :]


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = SPECIAL_TOKENS, chat_template: str | None = DEFAULT_TEMPLATE
) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most vocab_size ids (fewer where the texts have no more pairs). It round-trips any text.

    `<|im_end|>` is eos, because it is what a reply ends in and a sampler must stop at one token; `<|endoftext|>` is bos and pad.
    `<think>` and `</think>` are single tokens but not special ones, so that decoding without special tokens keeps them (as with R1).
    Raises ValueError for a vocabulary that cannot hold all bytes and the special tokens.
    """
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size: must be at least 256 + {len(special_tokens)} (all bytes and the special tokens), is {vocab_size}")
    if missing := {END_OF_TEXT, TURN_END} - set(special_tokens):
        raise ValueError(f"special_tokens: must hold {' and '.join(sorted(missing))}")
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    for token in special_tokens:  # after training, hence the last ids
        special = token not in (THINK, END_THINK)
        added = AddedToken(token, special=special, normalized=False)
        (raw.add_special_tokens if special else raw.add_tokens)([added])
    return Tokenizer(raw, bos_token=END_OF_TEXT, eos_token=TURN_END, pad_token=END_OF_TEXT, chat_template=chat_template)


def _token(value: Any) -> str | None:
    return value["content"] if isinstance(value, dict) else value


def _default_template(value: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of {"name", "template"}."""
    if not isinstance(value, list):
        return value
    named = {entry["name"]: entry["template"] for entry in value}
    if "default" not in named:
        raise ValueError(f"chat_template: no template is named 'default', only {', '.join(sorted(named))}")
    return named["default"]
