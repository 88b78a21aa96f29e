"""What each token id is in bytes and in text: for log-probabilities, which name tokens one by one.

A token may be a part of a character. Its `data` is exact; its text is "bytes:\\xe2\\x80" where they are not UTF-8, as OpenAI's
completions write it, so that two such tokens are not both called U+FFFD.
"""

from __future__ import annotations

import json
import re

from tokenizers import pre_tokenizers

from jevons.data.tokenizer import Tokenizer


class Vocabulary:
    """Bytes and names of a tokenizer's ids, looked up once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._raw = tokenizer.raw
        self._added = {i: token.content for i, token in tokenizer.raw.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}
        self._alphabet: dict[str, int] | None = None
        if '"ByteLevel"' in json.dumps(json.loads(tokenizer.raw.to_str())["decoder"]):
            self._alphabet = _alphabet()

    def data(self, id: int) -> bytes:
        """What the token stands for; of ids that the tokenizer does not know (padding of the vocabulary), nothing."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._read(id)
        return found

    def text(self, id: int) -> str:
        data = self.data(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _read(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._raw.id_to_token(id)
        if token is None:
            return b""
        if self._alphabet is not None and all(c in self._alphabet for c in token):
            return bytes(self._alphabet[c] for c in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and up in order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    table = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    assert table.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return table
