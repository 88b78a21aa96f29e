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
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from jevons.model.config import ModelConfig
from jevons.model.family import to_hf
from jevons.tasks.task import get_task

STAGES = ("prepare", "pretrain", "evaluate")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskMix(Section):
    """One family of generated problems: its share of the documents, and its options (difficulty, operations, ...)."""

    task: str
    share: float = Field(1.0, gt=0)
    turns: int = Field(1, ge=1)  # a conversation asks one to this many problems, one after the other
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _exists(self) -> TaskMix:
        get_task(self.task, **self.options)
        return self


class Prepare(Section):
    """Text into token shards. From `sources` (files, folders, datasets:NAME) or from generated `tasks`; not both."""

    sources: tuple[str, ...] = ()
    field: str | None = None  # of JSON lines and Parquet; None: text or messages, whichever is there
    tasks: tuple[TaskMix, ...] = ()
    documents: int = Field(0, ge=0)  # how many conversations to generate from tasks; sources are read whole
    tokenizer: str | None = None  # a folder with tokenizer.json; None: train one of model.vocab_size
    loss_on: Literal["all", "assistant"] = "all"  # which tokens are learned from; assistant needs messages
    validation_share: float = Field(0.01, gt=0, lt=0.5)
    processes: int = Field(2, ge=1)
    bad_lines: int = Field(100, ge=0)  # empty or malformed lines before preparing stops

    @model_validator(mode="after")
    def _one_origin(self) -> Prepare:
        if bool(self.sources) == bool(self.tasks):
            raise ValueError("sources: give either these or tasks")
        if self.tasks and not self.documents:
            raise ValueError("documents: say how many to generate from tasks")
        if self.sources and self.documents:
            raise ValueError("documents: counts generated problems; sources are read whole")
        return self


class Pretrain(Section):
    """Next-token prediction over the shards."""

    steps: int = Field(ge=1)
    sequence_length: int = Field(ge=8)
    batch_size: int = Field(ge=1)  # sequences a step, over all micro-batches
    micro_batch_size: int | None = Field(None, ge=1)  # sequences at once; None: the whole batch
    lr: float = Field(gt=0)
    minimum_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)  # length of wsd's last phase
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, ge=0)  # of the gradient's global norm; 0: none
    mtp_weight: float = Field(0.3, ge=0)
    balance_weight: float = Field(1e-4, ge=0)
    bias_speed: float = Field(1e-3, ge=0)
    split_documents: bool = True  # attention stays inside documents
    recompute: bool = False
    compile: bool = False
    log_every: int = Field(10, ge=1)  # steps between rows of metrics
    evaluate_every: int = Field(0, ge=0)  # steps between validations; 0: at the start and the end only
    evaluate_windows: int = Field(32, ge=1)
    sample_every: int = Field(0, ge=0)  # steps between sample replies; 0: at the end only
    save_every: int = Field(0, ge=0)  # steps between checkpoints; 0: at the end only
    keep_last: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Pretrain:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size: {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: must be less than steps {self.steps}, is {self.warmup_steps}")
        if self.schedule == "wsd" and not 0 < self.decay_steps <= self.steps - self.warmup_steps:
            raise ValueError(f"decay_steps: wsd needs 1 to steps - warmup_steps = {self.steps - self.warmup_steps}, is {self.decay_steps}")
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps: only wsd has them, schedule is {self.schedule!r}")
        if self.minimum_lr > self.lr:
            raise ValueError(f"minimum_lr: {self.minimum_lr} is more than lr {self.lr}")
        return self


class Evaluate(Section):
    """Held-out problems of the tasks, answered greedily, and bits per byte on held-out text."""

    problems: int = Field(200, ge=1)  # of each task
    max_tokens: int = Field(256, ge=1)
    examples: int = Field(8, ge=0)
    windows: int = Field(64, ge=1)  # of validation text


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    price_per_hour: float = Field(0.0, ge=0)  # of one device, in dollars
    model: dict[str, Any]
    prepare: Prepare | None = None
    pretrain: Pretrain | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if self.pretrain and not self.prepare:
            raise ValueError("[pretrain] needs [prepare]: there is nothing to train on")
        if self.evaluate and not self.pretrain:
            raise ValueError("[evaluate] needs [pretrain]: there is no model to evaluate")
        if not self.stages:
            raise ValueError("the recipe has no stage; add [prepare], [pretrain] or [evaluate]")
        if self.pretrain and "path" not in self.model:
            limit = self.config().max_position_embeddings
            if self.pretrain.sequence_length > limit:
                given = self.pretrain.sequence_length
                raise ValueError(f"pretrain.sequence_length: {given} is more than model.max_position_embeddings {limit}")
        return self

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

    def save(self, path: Path) -> None:
        path.write_text(self.to_toml(), encoding="utf-8")

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


def find(name: str) -> Path:
    """A recipe file by path, or one that comes with Jevons by its bare name."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        # a name with folders in it is a mistyped path, not ours
        if path.name == name and (built_in := folder / f"{name.removesuffix('.toml')}.toml").is_file():
            return built_in
    raise ValueError(f"{name}: no such recipe file, and none of that name comes with Jevons")


def load(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """Read, override, check. ValueError naming the file and the key."""
    path = find(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    override(values, assignments)
    return parse(values, str(path))
