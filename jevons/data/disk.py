"""Writing so that a kill or a full disk at any moment leaves either the old content or the new, never half of it.

Everything is written aside, synced and renamed. A rename inside one folder is atomic on POSIX; the folder itself is
synced afterwards so that the rename survives a power cut.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well and vanishes when it does not.

    An older folder at `path` is moved out of the way first and deleted last: between the two renames `path` is absent for
    an instant, so readers that must survive a kill there look for the newest complete folder (train/checkpoint.py).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    for left in (aside, old):  # of a killed process that had this number, as in containers all have
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        for folder, _, files in os.walk(aside):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if path.exists():
            path.rename(old)
        aside.rename(path)
        _sync(path.parent)
    except SafetensorError as error:  # it hides the system's error, a full disk above all, in its text
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it is there, so that a kill leaves all of it or nothing."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
        _sync(path.parent)
        shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Delete what killed processes left aside anywhere below `folder`, up to whole models. Not while another process writes there."""
    for left in [*folder.rglob(".*.*.tmp"), *folder.rglob(".*.*.old")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)  # it may have stood in a folder that is gone by now
