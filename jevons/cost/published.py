"""Configurations of published models, by name: what plans, claims and tests count instead of models that fit this machine.

    published("deepseek-v3") -> ModelConfig

They stand in published.toml as their config.json has them, each with its source, and are read by the same code that reads a
checkpoint's. Not done: a download from a hub. A folder with a config.json serves as well wherever a name does.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from jevons.model.config import ModelConfig
from jevons.model.family import from_hf


def names() -> tuple[str, ...]:
    """All names that `published` knows, in the order of the file: by family, then by size."""
    return tuple(_read())


def published(name: str) -> ModelConfig:
    """A published model's configuration; case does not count. Raises ValueError with the nearest name for an unknown one."""
    return from_hf({key: value for key, value in _entry(name).items() if key != "source"}, f"published.toml: {name}")


def source(name: str) -> str:
    """Where a published configuration stands. Raises ValueError as `published` does."""
    return str(_entry(name)["source"])


def _entry(name: str) -> dict[str, Any]:
    table = _read()
    if name.lower() not in table:
        near = difflib.get_close_matches(name.lower(), table, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(table)}"
        raise ValueError(f"model: no published model {name!r}; {hint}")
    return table[name.lower()]


def _read() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
