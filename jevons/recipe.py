"""The life of a model in one TOML file: strict, overridable by dotted key, saved resolved.

Problem: a mistyped key that is silently ignored costs a night of training. Approach: pydantic models that forbid unknown
keys; every error names the file, the dotted key and, for a typo, the nearest valid one. Values come from the file, then
from `key=value` on the command line, and nothing else. [model] speaks config.json's language (jevons/model/config.py).
Components get the values that they need, never the recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import tomli_w
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from jevons.model.config import ModelConfig
from jevons.model.family import to_hf
from jevons.section import Evaluate, Planning, Prepare, Pretrain, Rl, Section, Sft, TaskMix

STAGES = ("prepare", "pretrain", "sft", "rl", "evaluate")
TRAINING = ("pretrain", "sft", "rl")  # each leaves a model


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the device multiplies it, else float32
    price_per_hour: float = Field(0.0, ge=0)  # of one device, in dollars
    model: dict[str, Any]
    prepare: Prepare | None = None
    pretrain: Pretrain | None = None
    sft: Sft | None = None
    rl: Rl | None = None
    evaluate: Evaluate | None = None
    plan: Planning | None = None

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if self.pretrain and not self.prepare:
            raise ValueError("[pretrain] needs [prepare]: there is nothing to train on")
        if "path" not in self.model:
            for stage in ("sft", "rl", "evaluate"):
                if getattr(self, stage) and not self.pretrain:
                    raise ValueError(f"[{stage}] needs [pretrain], or model.path: there is no model to begin with")
        if not self.stages:
            raise ValueError(f"the recipe has no stage; add one of {', '.join(f'[{stage}]' for stage in STAGES)}")
        if self.evaluate and not self.task_mixes and not self.prepare:
            raise ValueError("[evaluate] needs tasks: there is nothing to measure; add [[evaluate.tasks]]")
        if self.pretrain and "path" not in self.model:
            limit = self.config().max_position_embeddings
            if self.pretrain.sequence_length > limit:
                given = self.pretrain.sequence_length
                raise ValueError(f"pretrain.sequence_length: {given} is more than model.max_position_embeddings {limit}")
            self.pretrain.check_memory(self.config())
        return self

    @property
    def task_mixes(self) -> tuple[TaskMix, ...]:
        """The tasks that the run's models are measured on."""
        sections = (self.evaluate, self.rl, self.sft, self.prepare)
        return next((section.tasks for section in sections if section is not None and section.tasks), ())

    def settle(self, dtype: str) -> Recipe:
        """With `dtype` in place of "auto"."""
        return self.model_copy(update={"dtype": dtype}) if self.dtype == "auto" else self

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(s for s in STAGES if getattr(self, s) is not None)

    def config(self) -> ModelConfig:
        """[model] as ModelConfig. ValueError naming the key."""
        known = ModelConfig.field_names()
        for key in self.model:
            if key not in known:
                raise ValueError(f"model.{key}: unknown key{_nearest(key, [*known, 'path'])}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.model.items()}
        hints = get_type_hints(ModelConfig)
        for field in dataclasses.fields(ModelConfig):
            if field.name in values:
                _check_type(f"model.{field.name}", hints[field.name], values[field.name])
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"model.{field.name}: missing")
        try:
            return ModelConfig(**values)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error

    @model_validator(mode="after")
    def _model_fits(self) -> Recipe:
        if "path" in self.model:
            if others := sorted(set(self.model) - {"path"}):
                raise ValueError(f"model.{others[0]}: comes from model.path's config.json; remove it or the path")
            _check_type("model.path", str, self.model["path"])
            return self
        try:
            to_hf(self.config())  # a model that no config.json can express would fail at its first checkpoint
        except ValueError as error:
            raise ValueError(f"[model] {error}" if not str(error).startswith("model.") else str(error)) from error
        return self

    def to_toml(self) -> str:
        """The resolved recipe: every default written out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _check_type(key: str, annotation: Any, value: Any) -> None:
    """A dataclass checks no types, so they are checked here."""
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(f"{key}: {error.errors()[0]['msg']} (is {value!r})") from None


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _section_at(path: Sequence[str | int]) -> type[BaseModel]:
    """The pydantic model that a location inside a recipe belongs to."""
    section: type[BaseModel] = Recipe
    for part in path:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            for candidate in (annotation, *get_args(annotation)):
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    section = candidate
    return section


def _explain(error: Any, where: str) -> str:
    """One pydantic error as `file: key: what is wrong`."""
    path = error["loc"]
    key = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key{_nearest(str(path[-1]), list(_section_at(path[:-1]).model_fields))}"
    message = error["msg"].removeprefix("Value error, ")
    given = f" (is {error['input']!r})" if error["type"] not in ("missing", "value_error") else ""
    # a section's own validator already names the key inside the section
    return f"{where}: {key}{'.' if key and error['type'] == 'value_error' else ': ' if key else ''}{message}{given}"


def parse(values: dict[str, Any], where: str) -> Recipe:
    """Values as a Recipe. ValueError with a line for everything that is wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e, where) for e in error.errors())) from None


def override(values: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply `dotted.key=value` in place; a value is TOML, or a bare string where it is not."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"{assignment!r}: overrides look like pretrain.steps=500")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, leaf = key.strip().split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{assignment!r}: {parent!r} is a value, not a section")
        target[leaf] = value


def built_in() -> dict[str, Path]:
    """The recipes that come with Jevons, by name."""
    package = Path(__file__).parent
    return {file.stem: file for folder in (package.parent / "recipes", package / "recipes") for file in sorted(folder.glob("*.toml"))}


def find(name: str) -> Path:
    """A recipe file by path, or one that comes with Jevons by its bare name."""
    path = Path(name)
    if path.is_file():
        return path
    if ours := built_in().get(name.removesuffix(".toml")):
        return ours
    raise ValueError(f"{name}: no such recipe file, and none of that name comes with Jevons; there are {', '.join(sorted(built_in()))}")


def load(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """Read, override, check. ValueError naming the file and the key."""
    path = find(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    override(values, assignments)
    return parse(values, str(path))
