"""All that a run's folder says, in memory, for whoever draws it.

Read at any moment of the run, so whatever is not there yet is None or empty, and a last line that a kill cut short is skipped.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stage:
    """One stage's metrics, by step. A step written twice (a resumed run repeats some) keeps its last value."""

    series: dict[str, dict[int, float]] = field(default_factory=dict)
    loads: dict[int, list[list[float]]] = field(default_factory=dict)  # step -> [layer][expert]
    samples: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)  # prompt -> step -> sample

    def points(self, name: str) -> list[tuple[float, float]]:
        """The finite values of a field, by step."""
        return [(step, value) for step, value in sorted(self.series.get(name, {}).items()) if math.isfinite(value)]

    def last(self, name: str) -> float | None:
        values = self.series.get(name)
        return values[max(values)] if values else None


@dataclass
class Record:
    """One run."""

    name: str
    recipe_text: str | None
    recipe: dict[str, Any]
    environment: dict[str, Any]
    stages: dict[str, Stage]
    torn: int  # lines at the end of metrics.jsonl that a kill cut short
    evaluation: dict[str, Any]
    receipt: dict[str, Any]

    def total(self, name: str, *, training: bool = False) -> float | None:
        """Tokens, seconds or money of the whole run, or of its training stages alone: the receipt's, or the metrics' latest."""
        if self.receipt:
            if name in self.receipt["total"] and not training:
                return self.receipt["total"][name]
            values = [stage[name] for stage in self.receipt["stages"] if not training or stage["stage"] in self.stages]
        else:
            values = [stage.last(name) for stage in self.stages.values()]
        known = [value for value in values if value is not None]
        return sum(known) if known else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises ValueError naming the file where it is not one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); delete it or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object; delete it or write it again")
    return value


def read_metrics(path: Path) -> tuple[dict[str, Stage], int]:
    """The stages of a metrics.jsonl in order of appearance, and the number of torn lines: 1 if a kill cut the last one short.

    Raises ValueError naming file and line for any other line that is no metrics row.
    """
    stages: dict[str, Stage] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    last = max((i for i, line in enumerate(lines, 1) if line.strip()), default=0)
    for i, line in enumerate(lines[:last], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if i == last:
                return stages, 1
            raise ValueError(f"{path} line {i}: not JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path} line {i}: needs a string `stage` and a whole `step`; remove the line")
        stage, step = stages.setdefault(row["stage"], Stage()), row["step"]
        if row.get("loads"):  # a dense model has none
            shape = [len(layer) for layer in row["loads"]]
            if stage.loads and shape != [len(layer) for layer in next(iter(stage.loads.values()))]:
                raise ValueError(f"{path} line {i}: `loads` has {shape} experts by layer, other rows of this stage differ; remove the line")
            stage.loads[step] = row["loads"]
        elif "sample" in row:
            stage.samples.setdefault(str(row["sample"]["prompt"]), {})[step] = row["sample"]
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                stage.series.setdefault(name, {})[step] = value
    return stages, 0


def read_run(folder: Path) -> Record:
    """Reads a run's folder, whatever part of it is there. Raises ValueError naming the file that cannot be read."""
    path = folder / "recipe.toml"
    text = path.read_text(encoding="utf-8") if path.exists() else None
    try:
        recipe = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error}); restore it from the recipe that was run") from error
    stages, torn = read_metrics(folder / "metrics.jsonl")
    return Record(
        name=str(recipe.get("name") or folder.resolve().name),
        recipe_text=text,
        recipe=recipe,
        environment=read_json(folder / "environment.json"),
        stages=stages,
        torn=torn,
        evaluation=read_json(folder / "evaluate" / "results.json"),
        receipt=read_json(folder / "receipt.json"),
    )
