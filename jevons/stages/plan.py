"""`jevons plan`: what a recipe, a model or a budget will take, before anything is run and without torch.

    plan = make_plan("deepseek-v3", [], Options(on="2048xH800"))     every figure (stages/outline.py shows it and writes it)

Problem: hours, money and memory of a run are known when it is over, or when it died of memory. Approach: each stage by what was
measured on this device (stages/forecast.py), and where nothing was by its arithmetic (stages/outlook.py); serving by
cost/serving.py, a budget by cost/scaling.py. A plan says what its figures stand on, and of what does not fit the smallest change
that would. Not done: a search over the options that only make it faster.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from datetime import date
from math import ceil, inf
from pathlib import Path
from typing import Any

from jevons import recipe as recipes
from jevons.cost.comparison import Comparison, Traffic, compare
from jevons.cost.deployment import FORMATS
from jevons.cost.hardware import Cluster, Hardware, parse_cluster, this_machine
from jevons.cost.memory import Change, smallest_change
from jevons.cost.price import Prices
from jevons.cost.profile import Profile, refused
from jevons.cost.published import names, published
from jevons.cost.result import recorded
from jevons.cost.scaling import Suggestion, best, read_measured
from jevons.cost.serving import Fit, Request, fit
from jevons.cost.training import StagePlan, default_share
from jevons.kernels import processor
from jevons.model.config import ModelConfig
from jevons.model.family import load_config
from jevons.recipe import Recipe
from jevons.section import Addition
from jevons.stages import forecast
from jevons.stages.outlook import Outlook

HERE = "here"
ROOM = 0.95  # of a device's memory; the rest is fragmentation and what the system takes
MULTIPLES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
VARIANTS = r"-(instruct|base|chat|coder|math|it)\b"  # in names of models that are built alike


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; None: what the recipe's [plan] says, or else what is usual."""

    on: str | None = None
    share: float | None = None
    budget: float | None = None  # dollars
    target_tokens: str | None = None  # of pretraining, as 10B
    serve: str | None = None  # devices to serve the model on, as 8xH200
    weights: str = "bf16"  # as they are served
    prompt: int = 2000  # tokens of a mean request to the server
    cached: int = 1000
    output: int = 500
    requests: float = 10_000  # a day
    slowest: float = 0.05  # seconds that a served token may take
    hardware: Path | None = None
    prices: Path | None = None
    root: Path = Path("runs")
    today: date | None = None

    def __post_init__(self) -> None:
        for name, unit in (("budget", "dollars"), ("requests", "a day"), ("slowest", "seconds")):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:  # also what is no number
                raise ValueError(f"--{name}: must be above 0 {unit}, is {value:g}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"--share: must be above 0 and at most 1 (of peak), is {self.share:g}")
        for name, count in (("prompt", self.prompt), ("output", self.output)):
            if count < 1:
                raise ValueError(f"--{name}: must be at least 1 token, is {count}")
        if not 0 <= self.cached < self.prompt:
            fix = f"a part of --prompt {self.prompt}: give 0 to {self.prompt - 1}"
            raise ValueError(f"--cached: must be {fix}, is {self.cached}")
        if self.weights not in FORMATS:
            raise ValueError(f"--weights: must be one of {', '.join(FORMATS)}, is {self.weights!r}")
        for name, path in (("hardware", self.hardware), ("prices", self.prices)):
            if path is not None and not path.is_file():
                raise ValueError(f"--{name} {path}: no such file")

    def given(self, *names: str) -> str | None:
        """The first of these that the command line says otherwise than by default, as it is written there."""
        return next((f"--{n.replace('_', '-')}" for n in names if getattr(self, n) != getattr(Options, n)), None)


@dataclass(frozen=True)
class Shortage:
    """A stage that does not fit, and the smallest change that would make it fit; None where none was found."""

    stage: str
    needed: float  # bytes a device
    room: float
    change: Change | None


@dataclass(frozen=True)
class Plan:
    """What is to be done where, and what each part of it takes."""

    name: str
    on: Cluster
    config: ModelConfig | None = None
    stages: tuple[StagePlan, ...] = ()
    additions: tuple[Addition, ...] = ()
    shortages: tuple[Shortage, ...] = ()
    assumed: tuple[str, ...] = ()
    serving: Fit | None = None
    serving_basis: str = ""  # what its speed stands on
    request: Request | None = None
    comparison: Comparison | None = None
    budget: float | None = None
    suggestion: Suggestion | None = None

    def total(self, *, spot: bool = False) -> float | None:
        """Dollars of all stages and additions; None where a device has no such price."""
        rate = self.on.device.spot if spot else self.on.device.on_demand
        parts = [s.money(spot=spot) for s in self.stages] + [None if rate is None else rate * a.device_hours for a in self.additions]
        return sum(known) if len(known := [m for m in parts if m is not None]) == len(parts) else None


def make_plan(name: str | None, overrides: list[str], options: Options) -> Plan:
    """The plan of a recipe, of serving a model, or of what a budget buys. ValueError, naming what is wrong and what would do."""
    if name is None and options.budget is None:
        raise ValueError("plan: name a recipe or a model, or give --budget for the best model of a budget")
    hardware = Hardware.load(options.hardware, options.today)
    recipe, config = find(name, overrides, options) if name else (None, None)
    _heeded(name, recipe, options)
    on, profile = _machine(options.on, recipe, hardware, options.root)
    plan = Plan(name or f"a budget of ${options.budget:,.0f}", on, config)
    if recipe is not None and config is not None:
        in_bf16 = not on.device.name.startswith("CPU") or processor.multiplies_bf16()
        recipe = recipe.settle("bfloat16" if in_bf16 else "float32")
        plan = _stages(replace(plan, name=recipe.name), recipe, config, options, hardware, profile)
    if options.budget is not None:
        plan = replace(plan, budget=options.budget, suggestion=_suggest(recipe, on, options))
    if config is not None and (options.serve or recipe is None):
        if options.serve:
            on, profile = _machine(options.serve, recipe, hardware, options.root, "--serve")
        plan = _serving(plan, config, on, options, hardware, profile)
    return plan


def _heeded(name: str | None, recipe: Recipe | None, options: Options) -> None:
    """ValueError for an option that this plan has no use for."""
    if name is None and (flag := options.given("serve", "target_tokens")):
        raise ValueError(f"{flag}: is about a model; name it, or a recipe")
    served = ("weights", "prompt", "cached", "output", "requests", "slowest", "prices")
    if not options.serve and (name is None or recipe is not None) and (flag := options.given(*served)):
        fix = "name a model" if name is None else "add --serve DEVICES"
        raise ValueError(f"{flag}: is about serving, which this plan leaves out; {fix}")
    if name is not None and recipe is None and options.budget is None and options.share is not None:
        raise ValueError(f"--share: is about training, and {name} is a model to serve; leave it away")


def _machine(
    text: str | None, recipe: Recipe | None, hardware: Hardware, root: Path, flag: str = "--on"
) -> tuple[Cluster, Profile | None]:
    """Devices by the command line, the recipe's [plan] or where this runs, and what was measured of them. This machine rents for what the
    recipe says, if it says anything.
    """
    if text is None and recipe is not None and recipe.plan is not None:
        text, flag = recipe.plan.on, "plan.on"
    here = this_machine(hardware)
    if text in (None, HERE):
        on = here
        if recipe is not None and recipe.price_per_hour:  # nobody rents it out at half of that
            on = replace(on, device=replace(on.device, on_demand=recipe.price_per_hour, spot=None))
    else:
        try:
            on = parse_cluster(str(text), hardware)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error
    profile = Profile.load(root) if here.device.name == on.device.name else None
    return _measured(on, profile), profile


def _measured(on: Cluster, profile: Profile | None) -> Cluster:
    """With the rates that products and memory reached here, instead of the table's."""
    if profile is None:
        return on
    best = max(profile.peak_flops.values(), default=on.device.peak["bf16"])  # of the types that a recipe may train in
    return replace(on, device=replace(on.device, peak=on.device.peak | {"bf16": best}, bandwidth=profile.bandwidth or on.device.bandwidth))


def check_here(name: str, recipe: Recipe | None, options: Options) -> None:
    """ValueError where `--calibrate` has nothing to measure, or nothing that the plan is for."""
    if recipe is None and not Path(name).expanduser().is_dir() and "/" not in name:
        raise ValueError(f"--calibrate: measures weights, and {name} is a name; give their folder, or a hub name (owner/model)")
    hardware = Hardware.load(options.hardware, options.today)
    here = this_machine(hardware).device
    devices = [_machine(options.on, recipe, hardware, options.root)[0].device] if recipe is not None or options.serve is None else []
    devices += [_machine(options.serve, recipe, hardware, options.root, "--serve")[0].device] if options.serve else []
    if all(device.name != here.name for device in devices):
        raise ValueError(f"--calibrate: measures this machine, {here}, and the plan is for {devices[0]}; add --on here")


def find(name: str, overrides: list[str], options: Options) -> tuple[Recipe | None, ModelConfig]:
    """A recipe and its model, or a model alone: a recipe's file or name, a run's folder, a model's folder, a published name."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "recipe.toml").is_file():
        recipe, config = None, load_config(folder)
    elif not folder.is_dir() and not _is_recipe(name) and (known := _published(name)) is not None:
        recipe, config = None, known
    else:
        if not folder.is_dir() and not _is_recipe(name):
            raise ValueError(_unknown(name))
        target = [f"pretrain.steps={_steps(name, overrides, options.target_tokens)}"] if options.target_tokens else []
        recipe = recipes.load(_file(name), [*overrides, *target])
        config = model_config(recipe)
    if recipe is None and (overrides or options.target_tokens):
        first = (*overrides, "--target-tokens")[0]
        raise ValueError(f"{name}: is a model, not a recipe, so there is nothing to change; leave {first} away")
    return recipe, config


def _file(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder / "recipe.toml") if folder.is_dir() else name


def _is_recipe(name: str) -> bool:
    try:
        return recipes.find(_file(name)).is_file()
    except ValueError:
        return False


def _unknown(name: str) -> str:
    ours, models = recipes.built_in(), names()
    near = difflib.get_close_matches(name.lower(), [*ours, *models], n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are the recipes {', '.join(ours)} and the models {', '.join(models)}"
    return f"{name}: no recipe, no folder with a config.json, no published model; {hint}"


def _published(name: str) -> ModelConfig | None:
    """A published model by its name, also by a hub's: Qwen/Qwen2.5-Coder-0.5B-Instruct is built as qwen2.5-0.5b is."""
    plain = re.sub(VARIANTS, "", name.rpartition("/")[2].lower())
    return published(plain) if plain in names() else None


def model_config(recipe: Recipe) -> ModelConfig:
    """The model of a recipe: its own, or that of model.path. ValueError where the path's is not known here."""
    if "path" not in recipe.model:
        return recipe.config()
    path = recipe.model["path"]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return load_config(folder)
    if (known := _published(path)) is None:
        raise ValueError(f"model.path: {path} is no folder here, and no published model that the planner knows; download it first")
    return known


def _steps(name: str, overrides: list[str], text: str) -> int:
    """Steps of pretraining that take so many tokens."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", text.upper())
    if not match or not (tokens := float(match[1]) * MULTIPLES.get(match[2], 1)):
        raise ValueError(f"--target-tokens {text}: tokens are written 10B, 1.5T or 300M")
    section = recipes.load(_file(name), overrides).pretrain
    if section is None:
        raise ValueError("--target-tokens: is about pretraining, and this recipe has no [pretrain]")
    return ceil(tokens / (section.batch_size * section.sequence_length))


def _share(recipe: Recipe | None, on: Cluster, options: Options) -> tuple[float, str]:
    """Of peak, and where it is from."""
    if options.share is not None:
        return options.share, "--share"
    if recipe and recipe.plan and recipe.plan.share:
        return recipe.plan.share, "the recipe's [plan]"
    return default_share(on), "a default (--share)"


def _stages(plan: Plan, recipe: Recipe, config: ModelConfig, options: Options, hardware: Hardware, profile: Profile | None) -> Plan:
    """Every stage, measured where it was, and what does not fit."""
    on = plan.on
    base = profile.base_memory if profile else 0
    outlook = Outlook(recipe, config, on, *_share(recipe, on, options), hardware.device("CPU"), base)
    stages, shortages, assumed = [], [], []
    for stage in outlook.stages():
        entry = forecast.measured(recipe, stage.stage, config, profile) if on.count == 1 else None
        if entry is not None and profile is not None:
            known = forecast.forecast(recipe, stage.stage, config, entry)
            stage = replace(
                stage,
                tokens=known.tokens,
                flops=known.flops,
                seconds=known.seconds,
                basis=f"measured on this device, {entry.measured}",
                parts={},
                measured_memory=known.memory,
            )
            assumed += [drift] if (drift := forecast.drift(recipe, stage.stage, entry)) else []
        elif profile is not None and profile.entries and stage.stage in forecast.KIND:
            stage = replace(stage, basis=f"{stage.basis}; {forecast.reason(recipe, stage.stage, config, profile)}")
        elif profile is None and stage.stage in forecast.KIND and on.device.name == this_machine(hardware).device.name:
            stage = replace(stage, basis=f"{stage.basis}; {why}" if (why := refused(options.root)) else stage.basis)
        room = ROOM * on.device.memory
        if (needed := stage.memory_needed) is not None and needed > room:
            shortages.append(Shortage(stage.stage, needed, room, smallest_change(outlook.trials(stage.stage), room)))
        stages.append(stage)
    guessed = tuple(f"{s.stage}:" for s in stages if s.measured_memory is None)  # what was measured stands on no assumption
    assumed += [text for text in outlook.assumed if text.startswith(guessed)]
    additions = recipe.plan.additions if recipe.plan else ()
    return replace(plan, stages=tuple(stages), additions=additions, shortages=tuple(shortages), assumed=tuple(assumed))


def _suggest(recipe: Recipe | None, on: Cluster, options: Options) -> Suggestion:
    """The best model for the budget, with the recipe's vocabulary and context where there is one."""
    assert options.budget is not None
    shape: dict[str, Any] = {}
    if recipe and recipe.pretrain and "path" not in recipe.model:
        shape = {"vocab_size": recipe.config().vocab_size, "sequence_length": recipe.pretrain.sequence_length}
    result = recorded("sparse")
    measured = read_measured(result) if result else None
    share = _share(recipe, on, options)[0]
    try:
        return best(options.budget, on, share, measured=measured, **shape)
    except ValueError as error:
        raise ValueError(f"--budget {options.budget:g}: {error}") from error


def _serving(plan: Plan, config: ModelConfig, on: Cluster, options: Options, hardware: Hardware, profile: Profile | None) -> Plan:
    """How the model is served, what else would do where it does not fit, and what others would charge for the same traffic."""
    request, room = Request(options.prompt, options.output, options.cached), config.max_position_embeddings
    if room < request.prompt + request.output:
        within = Request(4 * room // 5, room // 5, 2 * room // 5)  # of the same proportions
        if options.given("prompt", "output", "cached"):
            fix = f"--prompt {within.prompt} --cached {within.cached} --output {within.output}"
            raise ValueError(f"--prompt {request.prompt} --output {request.output}: the model has {room:,} positions; give {fix} or less")
        request = within
    found = fit(
        config,
        on,
        request,
        format=options.weights,
        devices=hardware.devices.values(),
        slowest=options.slowest,
        profile=profile,
    )
    quotes = [found.quote] if found.quote else []
    today = options.today or date.today()
    comparison = compare(Traffic.of(request, options.requests), Prices.load(options.prices), today, *quotes)
    basis = _serving_basis(config, found, options, profile) if found.quote else ""
    return replace(plan, serving=found, serving_basis=basis, request=request, comparison=comparison)


def _serving_basis(config: ModelConfig, found: Fit, options: Options, profile: Profile | None) -> str:
    """What a served plan stands on."""
    assert found.quote is not None
    shares = f"decoding at {found.quote.decode_share:.1%} of the roofline, reading at {found.quote.prefill_share:.1%}"
    if found.quote.measured:
        assert profile is not None
        newest = max(entry.measured for entry in profile.of("decode", config))
        return f"{shares}, measured on this device, {newest}"
    defaults = f"{shares}, defaults: DeepSeek's published day"
    if profile is None:
        return defaults
    return f"{defaults}; {profile.missing('decode', config, weights=options.weights)} (--calibrate)"

