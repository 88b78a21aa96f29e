"""Documents out of files: JSON lines, JSON arrays, plain text, Parquet, and datasets by name, one at a time.

Corpora are larger than memory and never clean. So everything streams (but a plain text file, which is one document), and lines that are
empty or malformed are counted, shown and bounded: a few are the world's, many mean a wrong field or a broken download, and silence would
train on the rest.

A record has `messages` (with `tools` beside them where it has any), `conversations` (ShareGPT's, of from and value), `text`, or the field
that was asked for. Not done: guessing at other names.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jevons.data.chat import Message

SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".parquet")
COMPRESSIONS = (".gz", ".zst")
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool"}  # others as they are


@dataclass(frozen=True)
class Document:
    """Either text or messages, and where it stood. `line` counts from 1: a line, an item of an array or a row.

    tools: what the assistant could call, in OpenAI's form.
    """

    text: str | None
    messages: tuple[Message, ...] | None
    source: str
    line: int
    tools: tuple[dict[str, Any], ...] = ()


@dataclass
class BadLines:
    """Counts what could not be read, keeps the first few, and raises ValueError once there are more than `limit`."""

    limit: int = 100
    keep: int = 5
    empty: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, source: str, line: int, reason: str) -> None:
        if reason == "empty":
            self.empty += 1
        else:
            self.malformed += 1
        if len(self.examples) < self.keep:
            self.examples.append(f"{source}:{line}: {reason}")
        if self.empty + self.malformed > self.limit:
            shown = "\n  ".join(self.examples)
            raise ValueError(
                f"more than {self.limit} lines are bad ({self.empty} empty, {self.malformed} malformed), the first:\n  {shown}"
            )

    def report(self) -> dict[str, Any]:
        return {"empty": self.empty, "malformed": self.malformed, "examples": list(self.examples)}


def find_files(sources: Sequence[str]) -> list[Path]:
    """Files named by files, folders (searched recursively) and globs; sorted, each once. Raises ValueError where a source yields none."""
    found: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_file():
            if not _kind(path):
                raise ValueError(f"{source}: unknown kind of file; known: {', '.join(SUFFIXES)}, each but .parquet also with .gz or .zst")
            files = [path]
        elif path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and _kind(p)]
        else:
            files = [p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file() and _kind(p)]
        if not files:
            raise ValueError(f"{source}: no text found there; looked for {', '.join(SUFFIXES)}, each but .parquet also with .gz or .zst")
        found.update(files)
    return sorted(found)


def read_documents(sources: Sequence[str], *, field: str | None = None, bad: BadLines) -> Iterator[Document]:
    """Documents of all sources: paths as in `find_files`, or `datasets:NAME[:split]` (split `train` if not named) after those.

    field: the key or column to read (a string is text, a list is messages); without it `messages`, `conversations` or `text`. Raises
    ValueError past `bad.limit`, for a file cut short, and where an optional package is missing.
    """
    names = [source for source in sources if source.startswith("datasets:")]
    paths = [source for source in sources if not source.startswith("datasets:")]
    for path in find_files(paths):
        try:
            yield from _read_file(path, field, bad)
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: damaged or cut short: {error}") from error
    for name in names:
        for line, record in enumerate(_dataset(name), 1):
            yield from _document(record, field, name, line, bad)


def _kind(path: Path) -> str:
    """The suffix under a compression, "" if it is none of ours."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        inner = path.with_suffix("").suffix.lower()
        return inner if inner in SUFFIXES and inner != ".parquet" else ""
    return suffix if suffix in SUFFIXES else ""


def _read_file(path: Path, field: str | None, bad: BadLines) -> Iterator[Document]:
    kind, source = _kind(path), str(path)
    if kind == ".parquet":
        for line, record in enumerate(_rows(path, field), 1):
            yield from _document(record, field, source, line, bad)
        return
    with _open(path) as stream:
        if kind in (".txt", ".md"):
            try:
                yield from _document({"text": stream.read().decode("utf-8-sig")}, None, source, 1, bad)
            except UnicodeDecodeError as error:
                bad.add(source, 1, f"not UTF-8: {error}")
        elif kind == ".json" and (head := _first_byte(stream)) == b"[":
            for line, record in enumerate(_array(stream, path), 1):
                yield from _document(record, field, source, line, bad)
        else:  # JSON lines, which .json files often are as well
            start = head if kind == ".json" else b""
            for line, data in enumerate(stream, 1):
                data, start = start + data, b""
                if not data.strip():
                    bad.add(source, line, "empty")
                    continue
                try:
                    record = json.loads(data)
                except ValueError as error:  # malformed JSON or not UTF-8
                    bad.add(source, line, f"not JSON: {error}")
                    continue
                yield from _document(record, field, source, line, bad)


def _document(record: Any, field: str | None, source: str, line: int, bad: BadLines) -> Iterator[Document]:
    """The record's document, or none and a bad line."""
    if not isinstance(record, dict):
        return bad.add(source, line, f"an object is needed, this is {type(record).__name__}")
    key = field or next((key for key in ("messages", "conversations") if record.get(key) is not None), "text")
    value = record.get(key)
    if value is None:
        wanted = f"field {field!r}" if field else "field 'text' or 'messages'"
        return bad.add(source, line, f"no {wanted}; it has {', '.join(map(str, record))}"[:200])
    if not isinstance(value, (str, list)):
        return bad.add(source, line, f"{key}: must be a string or a list of messages, is {type(value).__name__}")
    if not value or (isinstance(value, str) and not value.strip()):
        return bad.add(source, line, "empty")
    if isinstance(value, str):
        yield Document(value, None, source, line)
        return
    messages = []
    for i, data in enumerate(value):
        try:
            messages.append(_message(data))
        except ValueError as error:
            return bad.add(source, line, f"{key}[{i}]: {error}")
    try:
        yield Document(None, tuple(messages), source, line, _tools(record.get("tools")))
    except ValueError as error:
        bad.add(source, line, f"tools: {error}")


def _message(data: Any) -> Message:
    """A message as chat APIs write it, or as ShareGPT does."""
    if isinstance(data, dict) and "role" not in data and isinstance(speaker := data.get("from"), str):
        data = {"role": SHAREGPT.get(speaker, speaker), "content": data.get("value")}
    return Message.from_dict(data)


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """A list of tools, or that list as JSON, which keeps Parquet's columns of one type. ValueError for anything else."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else None
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError("must be a list of objects, or such a list as JSON")
    return tuple(value or ())


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstd(path))
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """What a zstd file holds, frame after frame (archives joined with cat have several). The package's own reader ends where the file
    does, without a word, in the middle of a frame, too."""

    def __init__(self, path: Path) -> None:
        self._package = _optional("zstandard", str(path))
        self._file, self._pieces, self._held = path.open("rb"), self._inflate(), memoryview(b"")

    def _inflate(self) -> Iterator[bytes]:
        decoder, rest = None, b""
        while data := rest or self._file.read(1 << 16):
            decoder = decoder or self._package.ZstdDecompressor().decompressobj()
            try:
                yield decoder.decompress(data)
            except self._package.ZstdError as error:
                raise EOFError(str(error)) from error
            rest = decoder.unused_data
            decoder = None if decoder.eof else decoder
        if decoder is not None:
            raise EOFError("the last frame has no end")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            if (piece := next(self._pieces, None)) is None:
                return 0
            self._held = memoryview(piece)
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)).isspace():
        pass
    return byte


def _array(stream: IO[bytes], path: Path) -> Iterator[Any]:
    """Items of a JSON array whose "[" was read, a buffer at a time. An array that breaks cannot be resumed: ValueError."""
    decoder, buffer, size = json.JSONDecoder(), "", 1 << 16
    decode = codecs.getincrementaldecoder("utf-8")()
    ended = False
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            item, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            if ended:
                raise ValueError(f"{path}: the array breaks off or is malformed: {error.msg} near {buffer[:60]!r}") from error
            data = stream.read(size)
            size, ended = size * 2, not data  # doubling: an item larger than the buffer is scanned a few times, not hundreds
            buffer += decode.decode(data, final=ended)
            continue
        yield item
        buffer, size = buffer[end:], 1 << 16


def _rows(path: Path, field: str | None) -> Iterator[dict[str, Any]]:
    parquet = _optional("pyarrow.parquet", str(path))
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path}: damaged or cut short: {error}") from error
    with file as table:
        names = table.schema_arrow.names
        columns = [name for name in ([field] if field else ["messages", "conversations", "text"]) if name in names]
        if not columns:
            raise ValueError(f"{path}: no column {field or 'text or messages'}; it has {', '.join(names)}")
        columns += ["tools"] if "tools" in names else []
        for rows in table.iter_batches(batch_size=256, columns=columns):
            yield from rows.to_pylist()


def _dataset(name: str) -> Iterator[dict[str, Any]]:
    _, _, rest = name.partition(":")
    path, _, split = rest.partition(":")
    return iter(_optional("datasets", name).load_dataset(path, split=split or "train", streaming=True))


def _optional(module: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{needed_by}: reading it needs the package {module.split('.')[0]}: pip install 'jevons[text]'") from error
