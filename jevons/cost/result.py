"""Where the results of our own benchmarks are kept: docs/results in the repository, jevons/results in what pip installed."""

from __future__ import annotations

from pathlib import Path


def recorded(name: str) -> Path | None:
    """The JSON file that a benchmark of this name left, None where it has not run or what is installed came without it."""
    package = Path(__file__).parents[1]
    files = (folder / f"{name}.json" for folder in (package / "results", package.parent / "docs" / "results"))
    return next((file for file in files if file.is_file()), None)
