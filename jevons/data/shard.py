"""Documents as token shards on disk: written once by several processes, memory-mapped by every trainer.

A folder holds, for each shard, `tokens-00000.bin` (uint16, or uint32 where the tokenizer has more than 65,536 ids), `documents-00000.bin`
(uint64: where in this shard each document ends) and, for chats trained on the assistant's tokens alone, `mask-00000.bin` (uint8).
Documents are not split over shards. `manifest.json` is written last and atomically, so a folder without one is unfinished and never read.

How documents end. A sampler stops at eos, so eos is what a document ends in: plain text gets it appended. A rendered chat usually ends
its last turn with it already ("<|im_end|>" and a line break); appending it once more would teach the model to answer a line break with
eos, so it is appended only where the rendering, trailing whitespace aside, does not end in it. An appended eos is not the assistant's, so
its mask is 0.

Not done: beginning-of-text tokens before plain text, compression.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jevons.data.chat import ChatTemplate
from jevons.data.disk import write_json
from jevons.data.text import BadLines, Document
from jevons.data.tokenizer import Tokenizer

VERSION = 1
MANIFEST = "manifest.json"
Mask = Literal["all", "assistant"]


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. `bytes` is the UTF-8 length of the text that was encoded; `files` counts each shard's tokens and
    documents.
    """

    version: int
    dtype: str
    mask: Mask
    tokenizer: str  # Tokenizer.digest()
    vocab_size: int
    documents: int
    tokens: int
    bytes: int
    files: list[dict[str, int]]
    source: dict[str, Any]
    bad_lines: dict[str, Any]


@dataclass
class Chunk:
    """Encoded documents, in order. `bad` are the (source, line, reason) of documents that the chat template refused."""

    tokens_T: np.ndarray
    mask_T: np.ndarray  # uint8
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0
    bad: list[tuple[str, int, str]] = field(default_factory=list)


def write_shards(
    documents: Iterable[Document],
    tokenizer_folder: Path,
    out: Path,
    *,
    processes: int = 1,
    shard_tokens: int = 2**26,
    mask: Mask = "all",
    progress: Callable[[int, int], None] | None = None,
    source: dict[str, Any],
    bad: BadLines | None = None,
) -> Manifest:
    """Encode documents into shards of about `shard_tokens` in `out`, replacing shards already there; the manifest is returned.

    Their content does not depend on `processes`. mask="assistant" stores which tokens the assistant wrote and takes chats only. progress is
    called with the documents and tokens so far. bad: the counter that the documents were read with; its report goes into the manifest, and
    conversations that the template refuses are added to it (without one the first raises ValueError).
    """
    bad = bad or BadLines(limit=0)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer_folder}/tokenizer_config.json: eos_token is not set, and documents end in it")
    dtype = np.dtype(np.uint16 if tokenizer.size <= 2**16 else np.uint32)
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # first: from here to the end the folder is unfinished
    for pattern in ("tokens-*.bin", "documents-*.bin", "mask-*.bin"):
        for path in out.glob(pattern):
            path.unlink()

    files: list[dict[str, int]] = []
    num_documents = num_tokens = num_bytes = 0
    pending: list[tuple[np.ndarray, np.ndarray]] = []  # whole documents of the shard being filled
    filled = 0

    def close() -> None:
        nonlocal filled
        ends = np.cumsum([len(tokens_T) for tokens_T, _ in pending], dtype=np.uint64)
        _write(out / f"tokens-{len(files):05}.bin", [tokens_T.astype(dtype, copy=False) for tokens_T, _ in pending])
        _write(out / f"documents-{len(files):05}.bin", [ends])
        if mask == "assistant":
            _write(out / f"mask-{len(files):05}.bin", [mask_T for _, mask_T in pending])
        files.append({"tokens": filled, "documents": len(pending)})
        pending.clear()
        filled = 0

    for chunk in _encode_all(_chunks(documents), tokenizer_folder, mask, processes):
        for where in chunk.bad:
            bad.add(*where)
        ends = np.cumsum(chunk.lengths, dtype=np.int64)
        for end, length in zip(ends, chunk.lengths, strict=True):
            pending.append((chunk.tokens_T[end - length : end], chunk.mask_T[end - length : end]))
            filled += length
            if filled >= shard_tokens:
                close()
        num_documents, num_tokens, num_bytes = num_documents + len(ends), num_tokens + len(chunk.tokens_T), num_bytes + chunk.bytes
        if progress:
            progress(num_documents, num_tokens)
    if pending:
        close()
    if not files:
        raise ValueError(f"{out}: no documents to write; bad lines: {bad.report()}")
    manifest = Manifest(
        version=VERSION,
        dtype=dtype.name,
        mask=mask,
        tokenizer=tokenizer.digest(),
        vocab_size=tokenizer.size,
        documents=num_documents,
        tokens=num_tokens,
        bytes=num_bytes,
        files=files,
        source=source,
        bad_lines=bad.report(),
    )
    write_json(out / MANIFEST, asdict(manifest))
    return manifest


class Shards:
    """A finished folder of shards, memory-mapped and read as one stream of tokens. Positions are of the whole stream."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_tokens, self.num_documents = manifest.tokens, manifest.documents
        self._starts = np.cumsum([0] + [f["tokens"] for f in manifest.files])  # of each file, in tokens
        self._first_documents = np.cumsum([0] + [f["documents"] for f in manifest.files])
        self._tokens = self._map("tokens", np.dtype(manifest.dtype), "tokens")
        self._ends = self._map("documents", np.dtype(np.uint64), "documents")
        self._masks = self._map("mask", np.dtype(np.uint8), "tokens") if manifest.mask == "assistant" else None

    @classmethod
    def open(cls, folder: str | Path, *, digest: str | None = None) -> Shards:
        """digest: `Tokenizer.digest()` of the model's tokenizer. Raises ValueError for an unfinished, damaged or foreign folder."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{path}: no such file, so these shards do not exist or were never finished; prepare them again")
        try:
            manifest = Manifest(**json.loads(path.read_text("utf-8")))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: not a manifest of version {VERSION}: {error}") from error
        if manifest.version != VERSION:
            raise ValueError(f"{path}: version {manifest.version}, this program reads version {VERSION}; prepare the shards again")
        if digest is not None and manifest.tokenizer != digest:
            raise ValueError(
                f"{path}: written with another tokenizer ({manifest.tokenizer[:12]}, the model's: {digest[:12]}); prepare them again"
            )
        return cls(folder, manifest)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the stream, int64."""
        return self._read(self._tokens, start, stop).astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """1.0 where a token is trained on, float32; all ones where the shards have no mask."""
        return np.ones(stop - start, np.float32) if self._masks is None else self._read(self._masks, start, stop).astype(np.float32)

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Every end e of a document with start < e <= stop, int64, found by bisection in the mapped files."""
        ends = []
        for file, low, high in self._files(start, stop):
            # The needles have the array's type: numpy would else convert the whole file to a type that fits both
            first, last = np.searchsorted(self._ends[file], np.array([low, high], np.uint64), side="right")
            ends.append(self._ends[file][first:last].astype(np.int64) + self._starts[file])
        return np.concatenate(ends) if ends else np.zeros(0, np.int64)

    def document(self, index: int) -> tuple[int, int]:
        """Start and stop of a document in the stream."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        file = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        local, base = index - int(self._first_documents[file]), int(self._starts[file])
        return base + (int(self._ends[file][local - 1]) if local else 0), base + int(self._ends[file][local])

    def _files(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(file, low, high) of the files under start..stop, low and high local to each."""
        assert 0 <= start <= stop <= self.num_tokens
        file = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._starts[file]), min(stop, int(self._starts[file + 1]))
            yield file, start - base, end - base
            start, file = end, file + 1

    def _read(self, maps: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        parts = [maps[file][low:high] for file, low, high in self._files(start, stop)]
        return np.concatenate(parts) if parts else maps[0][:0]

    def _map(self, stem: str, dtype: np.dtype, count: str) -> list[np.ndarray]:
        maps: list[np.ndarray] = []
        for i, counts in enumerate(self.manifest.files):
            path = self.folder / f"{stem}-{i:05}.bin"
            expected, size = counts[count] * dtype.itemsize, path.stat().st_size if path.is_file() else 0
            if size != expected:
                raise ValueError(f"{path}: {size} bytes where the manifest says {expected}: damaged or cut short; prepare the shards again")
            maps.append(np.memmap(path, dtype, mode="r"))
        return maps


def _chunks(documents: Iterable[Document], size: int = 256, characters: int = 1 << 20) -> Iterator[list[Document]]:
    """Documents by the hundred: enough work for one message between processes, little enough to hold several."""
    chunk: list[Document] = []
    held = 0
    for document in documents:
        chunk.append(document)
        held += len(document.text or "") + sum(len(m.content) + len(m.reasoning) for m in document.messages or ())
        if len(chunk) == size or held >= characters:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _encode_all(chunks: Iterator[list[Document]], folder: Path, mask: Mask, processes: int) -> Iterator[Chunk]:
    """Chunks encoded, in their order."""
    if processes < 1:
        raise ValueError(f"processes: must be at least 1, is {processes}")
    if processes == 1:
        tokenizer = Tokenizer.load(folder)
        yield from (_encode(tokenizer, mask, chunk) for chunk in chunks)
        return
    # An executor rather than a Pool, which waits forever for a worker that the kernel killed; a bounded queue rather than map(), which
    # would read the whole corpus ahead of the workers
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_die_with_parent) as pool:
        try:
            for chunk in chunks:
                # Ctrl-C reaches all processes of a terminal, but when to stop is the caller's affair: workers inherit a mask without it
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                waiting.append(pool.submit(_work, folder, mask, chunk))
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _die_with_parent() -> None:
    """Without it the workers of a killed process wait forever for work: each holds the other end of its own queue."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@functools.cache
def _load(folder: Path) -> Tokenizer:
    """In a worker process only: a worker lives for one write_shards and loads its tokenizer once."""
    return Tokenizer.load(folder)


def _work(folder: Path, mask: Mask, chunk: list[Document]) -> Chunk:
    return _encode(_load(folder), mask, chunk)


def _encode(tokenizer: Tokenizer, mask: Mask, chunk: list[Document]) -> Chunk:
    done = Chunk(np.zeros(0, np.uint32), np.zeros(0, np.uint8))
    tokens: list[int] = []
    masks: list[int] = []
    for document in chunk:
        where = f"{document.source}:{document.line}"
        if document.messages is None:
            if mask == "assistant":
                raise ValueError(f"{where}: plain text has no assistant; mask = 'assistant' takes documents with messages")
            assert document.text is not None
            text = document.text
            ids, weights = tokenizer.encode(text), list[int]()
            ids.append(tokenizer.eos_id)  # type: ignore[arg-type]
        else:
            if tokenizer.template is None:
                raise ValueError(f"{where}: messages, but the tokenizer's folder has no chat template (chat_template.jinja)")
            try:
                text = tokenizer.template.render(document.messages, tools=document.tools)
                _check_written(tokenizer.template, text, document)
                if mask == "assistant":
                    ids, weights = tokenizer.template.encode(tokenizer, document.messages, document.tools)
                else:
                    ids, weights = tokenizer.encode(text), []
            except ValueError as error:
                done.bad.append((document.source, document.line, str(error)))
                continue
            if not text.rstrip().endswith(tokenizer.eos_token or ""):
                ids.append(tokenizer.eos_id)  # type: ignore[arg-type]
        tokens += ids
        masks += weights + [0] * (len(ids) - len(weights)) if mask == "assistant" else [1] * len(ids)
        done.lengths.append(len(ids))
        done.bytes += len(text.encode())
    done.tokens_T, done.mask_T = np.array(tokens, np.uint32), np.array(masks, np.uint8)
    return done


def _check_written(template: ChatTemplate, text: str, document: Document) -> None:
    """Templates leave out what they do not know without a word: tools, and reasoning (of earlier turns many do so on purpose)."""
    assert document.messages is not None
    if document.tools and text == template.render(document.messages):
        raise ValueError("the chat template does not write tools")
    last = document.messages[-1]
    if last.reasoning.strip() and last.reasoning.strip() not in text:
        raise ValueError("the chat template leaves out reasoning; use one that writes it, or have it in content as <think>...</think>")


def _write(path: Path, arrays: list[np.ndarray]) -> None:
    with path.open("wb") as file:
        for array in arrays:
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
