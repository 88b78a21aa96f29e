"""What `jevons plan --calibrate` measures of a recipe: one stage part by part, in a process of its own.

    entry = measure(recipe.to_toml(), "sft", source, prepared, root)       `source`: the model it begins with, None: new weights

Each part is called as the stage calls it. What a whole run would show anyway is not waited for: of a checkpoint a part is written and the
rest counted, of chats and problems some are taken and the rest counted. Where the model is not there yet its shape is taken with new
weights, which are as fast; what they answer is nobody's answer, so the evaluation's have half of max_tokens then. Nothing is imported that
the stages do not import, since that would be memory. Not done: several devices.
"""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from jevons.cost.profile import Entry, signature
from jevons.data.batch import Batch
from jevons.data.disk import new_folder
from jevons.data.text import BadLines, read_documents
from jevons.data.tokenizer import Tokenizer
from jevons.model.folder import load_config, load_model
from jevons.model.transformer import Transformer
from jevons.recipe import Recipe, parse
from jevons.run import Interrupt, Run
from jevons.section import Rl
from jevons.stages import evaluate as evaluation
from jevons.stages import pretrain as pretraining
from jevons.stages import sft as tuning
from jevons.stages.classroom import Classroom, Harvest
from jevons.stages.exam import Exam
from jevons.stages.forecast import ANSWER, KIND, reads, shape, trains_all
from jevons.stages.origin import make_trainer
from jevons.stages.reference import Reference
from jevons.stages.rehearsal import rehearse
from jevons.stages.rl import learn, lessons, make_engine, pack
from jevons.stages.rollout import Group, Sampler
from jevons.stages.sample import log_samples
from jevons.tasks.grade import Grader
from jevons.train import device
from jevons.train.conversation import validation_loss as chat_loss
from jevons.train.corpus import validation_loss
from jevons.train.lora import merge
from jevons.train.loss import Loss
from jevons.train.policy import policy_loss
from jevons.train.trainer import Trainer

SECONDS = 25.0  # of steps, at least
STEPS = 24  # at least, unless they take longer than MOST: by then a process has most of the memory that it will have (docs/LOG.md)
MOST = 45.0  # seconds, after which two steps have to do, or the groups sampled by then
GROUPS = 64  # of reinforcement learning that are sampled at most, or a step's
CHATS, HELD_OUT = 1000, 8  # of fine-tuning, that are tokenised and whose loss is measured
WINDOWS = 16  # of held-out text
WRITTEN = 2**29  # bytes of a checkpoint that are written


@dataclass
class Clock:
    """Seconds since it was last asked."""

    since: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        before, self.since = self.since, time.perf_counter()
        return self.since - before


def measure(text: str, stage: str, source: Path | None, prepared: Path | None, root: Path) -> Entry:
    """One stage of a recipe (as TOML) on this process's device. `prepared`: what [prepare] left, or would leave of some of its text."""
    recipe = parse(tomllib.loads(text), "the recipe")
    where = device.choose(recipe.device)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".calibration-", dir=root) as aside:  # where the run would write, for the disk's sake
        device.forget_peak(where)
        name, rates = _STAGES[stage](recipe, source, prepared, Path(aside), where)
        rates["memory"] = float(device.peak_memory(where))
    return Entry(KIND[stage], name, shape(recipe, stage), rates, time.strftime("%Y-%m-%d %H:%M:%S"))


def open_model(recipe: Recipe, source: Path | None, prepared: Path | None, where: torch.device, *, mtp: bool = True) -> Transformer:
    """A trained model, or where there is none new weights of its shape."""
    if source is not None:
        return load_model(source, dtype=getattr(torch, recipe.dtype), device=where, mtp=mtp)
    assert prepared is not None
    return pretraining.make_model(recipe, Tokenizer.load(prepared / "tokenizer"), where)


def home_of(source: Path | None, prepared: Path | None) -> Path:
    """The folder of the tokenizer."""
    if source is not None:
        return source
    assert prepared is not None
    return prepared / "tokenizer"


def _steps(step: Callable[[int], None], where: torch.device) -> tuple[float, float]:
    """Seconds of a step, and what the first ones took beyond that. The first half warms up: until blocks of every size were needed once a
    process asks the system for memory, oneDNN makes a primitive for each new shape, and a new router's loads are not yet what they become.
    """
    clock, seconds = Clock(), list[float]()
    while len(seconds) < 2 or (sum(seconds) < MOST and (sum(seconds) < SECONDS or len(seconds) < STEPS)):
        step(len(seconds))
        device.synchronize(where)
        seconds.append(clock.lap())
    return steady(seconds)


def steady(seconds: list[float]) -> tuple[float, float]:
    """What a step takes in the later half of these, and how much the others took beyond that: together these steps' whole time."""
    first = len(seconds) // 2
    mean = fmean(seconds[first:])
    return mean, sum(seconds[:first]) - first * mean


def _pretrain(
    recipe: Recipe, source: Path | None, prepared: Path | None, aside: Path, where: torch.device
) -> tuple[str, dict[str, float]]:
    options = recipe.pretrain
    assert options is not None and prepared is not None
    run = Run(recipe, aside, device.describe(where))
    clock = Clock()
    tokenizer = Tokenizer.load(prepared / "tokenizer")
    model = pretraining.make_model(recipe, tokenizer, where)
    corpus = pretraining.open_corpus(prepared, tokenizer, recipe)
    trainer = make_trainer(model, options, recipe.seed)
    device.measure_peak(where, model.model.embed_tokens.weight.dtype)
    rates = {"start": clock.lap()}
    validation_loss(model, corpus, options.evaluate_windows)
    rates["validation"] = clock.lap()

    schedule, memory = pretraining.make_schedule(options), pretraining.memory_schedule(options, model.config)

    def step(i: int) -> None:
        pretraining.train_step(trainer, corpus, options, i, schedule.at(min(i, options.steps - 1)), memory.at(i))

    rates["step"], warm = _steps(step, where)
    rates["start"] += warm
    clock.lap()
    validation_loss(model, corpus, options.evaluate_windows)
    rates["validation"] = min(clock.lap(), rates["validation"])  # the first one met new shapes
    log_samples(run, recipe, model, tokenizer, corpus.validation.shards, "pretrain", 0)
    rates["sample"] = clock.lap()
    return signature(model.config), rates | _writing(trainer, aside)


def _sft(recipe: Recipe, source: Path | None, prepared: Path | None, aside: Path, where: torch.device) -> tuple[str, dict[str, float]]:
    options = recipe.sft
    assert options is not None
    home, work, run = home_of(source, prepared), aside / "chats", Run(recipe, aside, device.describe(where))
    tokenizer = Tokenizer.load(home)
    documents = options.documents or sum(1 for _ in read_documents(options.sources, field=options.field, bad=BadLines(options.bad_lines)))
    few = options.model_copy(update={"documents": min(documents, CHATS)})
    clock = Clock()
    with run.spend("sft") as spending:
        tuning.tokenise(few, recipe.seed, home, work, spending, Interrupt())
    written = few.documents + (tuning.held_out_count(few, few.documents) if options.tasks else 0)
    rates = {"documents": float(documents), "tokenise": clock.lap() / written}
    chats, held_out = tuning.read_chats(few, recipe.seed, tokenizer, work)
    kept = len(chats) + (0 if options.tasks else len(held_out))
    rates |= {"kept": kept / few.documents, "length": chats.num_tokens / len(chats), "validation": 0.0}
    model = open_model(recipe, source, prepared, where)
    trainer = make_trainer(model, options, recipe.seed)
    device.measure_peak(where, model.model.embed_tokens.weight.dtype)
    rates["start"] = clock.lap()
    tuning.show_replies(run, model, tokenizer, held_out or chats, options, recipe.seed, 0)
    rates["sample"] = clock.lap()
    rates["step"], warm = _steps(lambda i: _tune(trainer, chats, recipe, i), where)
    rates["start"] += warm
    if len(held_out):
        some = replace(held_out, spans=held_out.spans[:HELD_OUT])
        clock.lap()
        chat_loss(model, some, options.micro_batch_tokens)
        rates["validation"] = clock.lap() / len(some)
    return signature(model.config), rates | _writing(trainer, aside)


def _tune(trainer: Trainer, chats: tuning.Conversations, recipe: Recipe, step: int) -> None:
    """A step of the run; when those that are whole have all been taken, the first again: measuring may take longer than a short run."""
    assert recipe.sft is not None
    whole = reads(len(chats), recipe.sft) // recipe.sft.batch_size
    tuning.train_step(trainer, chats, recipe.sft, recipe.seed, step % max(1, whole), recipe.sft.lr)


def _rl(recipe: Recipe, source: Path | None, prepared: Path | None, aside: Path, where: torch.device) -> tuple[str, dict[str, float]]:
    options = recipe.rl
    assert options is not None and source is not None
    dtype = getattr(torch, recipe.dtype)
    clock = Clock()
    model = load_model(source, dtype=dtype, device=where)
    trainer = make_trainer(model, options, recipe.seed)
    tokenizer = Tokenizer.load(source)
    engine = make_engine(model, tokenizer, options)
    classroom = Classroom(options, tokenizer, engine, recipe.seed)
    reference = Reference(aside / "reference", source, options.reference_every, dtype, where) if options.kl_weight else None
    device.measure_peak(where, dtype)
    loss = policy_loss(options.objective)
    if options.dry_run:
        rehearse(trainer, classroom, options, loss, reference, 0.0, 0.0)
    rates = {"start": clock.lap()}
    if options.evaluate_every:
        classroom.measure()
        rates["held_out"] = clock.lap()

    harvests, seconds = _practise(trainer, classroom, options, loss, reference, where)
    rates["start"] += seconds.warm
    engine.new_weights(len(harvests))
    clock.lap()
    if options.sample_every:
        classroom.show(0)
        rates["sample"] = clock.lap()
    classroom.close()
    groups = [group for harvest in harvests for group in harvest.groups]
    answers = [t for group in groups for t in group.trajectories]
    # where the recipe leaves groups without a signal out, those that have one, whose answers may be longer
    taught = groups if trains_all(options) else [group for harvest in harvests for group in harvest.kept] or groups
    trained = fmean(_tokens([group], options) for group in taught)
    rates |= {
        "groups": float(len(groups)),
        "silent": float(sum(harvest.dropped for harvest in harvests)),
        "rollout": sum(h.seconds for h in harvests) / len(groups),
        "grading": sum(h.grading for h in harvests) / len(groups),
        "drawn": sum(t.drawn for t in answers) / len(groups),
        "read": sum(h.read for h in harvests) / len(groups),
        "prompt": fmean(len(t.prompt) for t in answers),
        "answer": fmean(len(t.tokens) for t in answers),
        "trained": trained,
        "training": trained * seconds.token,
        "update": seconds.fixed,
    }
    return signature(model.config), {"held_out": 0.0, "sample": 0.0} | rates | _writing(trainer, aside)


@dataclass(frozen=True)
class Updates:
    """Seconds of a step that trains: of a token, of what does not depend on tokens (the optimizer), and what the first took beyond that."""

    token: float
    fixed: float
    warm: float


def _practise(
    trainer: Trainer,
    classroom: Classroom,
    options: Rl,
    loss: Callable[[Tensor, Tensor, Batch], Loss],
    reference: Reference | None,
    where: torch.device,
) -> tuple[list[Harvest], Updates]:
    """Steps of the run, sampled in its own order and by its own seeds, until GROUPS or MOST seconds of them show how many teach. Then
    updates at a learning rate of 0, so that nothing was learned: of one group, of it again, of as many as a step has. All of them train,
    with a signal or without, which is the same work.
    """
    harvests, sampled = list[Harvest](), 0.0
    while not harvests or (len(harvests) < options.steps and sum(len(h.groups) for h in harvests) < GROUPS and sampled < MOST):
        classroom.engine.new_weights(len(harvests))
        harvests.append(classroom.collect(len(harvests), 0.0, lambda drawn: None))
        sampled += harvests[-1].seconds + harvests[-1].grading
    if where.type == "cuda":
        classroom.engine.release()
    step, points = harvests[0].groups[: options.problems], list[tuple[int, float]]()
    for groups in (step[:1], step[:1], step):
        clock = Clock()
        learn(trainer, Harvest(groups, groups, 0.0, 0.0), options, loss, 0.0, reference)
        device.synchronize(where)
        points.append((_tokens(groups, options), clock.lap()))
    return harvests, updates(points)


def updates(points: list[tuple[int, float]]) -> Updates:
    """By a first step, the same again, and one of more tokens: (tokens, seconds) each. Seconds are linear in tokens."""
    (_, first), (few, short), (many, long) = points
    token = (long - short) / (many - few) if many > few else 0.0
    fixed = short - few * token
    if token <= 0 or fixed < 0:  # nothing to tell them apart by, or less than noise
        token, fixed = (short + long) / (few + many), 0.0
    return Updates(token, fixed, max(first - short, 0.0))


def _tokens(groups: list[Group], options: Rl) -> int:
    """What a step on these trains on."""
    return sum(batch.num_tokens for part, _ in lessons(Harvest(groups, groups, 0.0, 0.0), options) for batch in pack(part, options))


def _evaluate(
    recipe: Recipe, source: Path | None, prepared: Path | None, aside: Path, where: torch.device
) -> tuple[str, dict[str, float]]:
    options = recipe.evaluate
    assert options is not None
    clock = Clock()
    tokenizer = Tokenizer.load(home_of(source, prepared))
    model = open_model(recipe, source, prepared, where, mtp=False)
    config = model.config if source is None else load_config(source)
    rates = dict.fromkeys(("answers", "grading", "text", "drawn", "read"), 0.0) | {"untrained": float(source is None)}
    engine = evaluation.make_engine(model, tokenizer, recipe)
    rates["start"] = clock.lap()
    answers = 0
    for exam in evaluation.exams(recipe):
        asked = exam.asked()
        some = asked[: max(1, math.ceil(options.concurrency / exam.samples))]
        params = exam.params
        if source is None:
            length = math.ceil(ANSWER * exam.max_tokens)
            params = replace(params, max_tokens=length, min_tokens=length)
        began, groups, pace = time.perf_counter(), list[Group](), 0.0  # seconds a token while all answer
        for finished, drawn in Sampler(engine, tokenizer, params, exam.max_turns).stream(some, exam.samples, (exam.seed, "evaluate")):
            groups += finished
            if groups and not pace:
                pace = (time.perf_counter() - began) / drawn
        seconds, times = time.perf_counter() - began, len(asked) / len(some)
        every = [t for group in groups for t in group.trajectories]
        tokens = sum(t.drawn for t in every)
        rates["answers"] += seconds + (times - 1) * tokens * pace  # as one ends the next begins
        rates["drawn"] += times * tokens
        rates["read"] += times * sum(len(group.trajectories[0].prompt) for group in groups)
        clock.lap()
        _grade(exam, groups)
        rates["grading"] += times * clock.lap()
        answers += len(asked) * exam.samples
    rates["answer"], rates["prompt"] = (rates[name] / max(answers, 1) for name in ("drawn", "read"))
    rates["prompt"] *= options.samples
    if recipe.prepare and recipe.pretrain:
        assert prepared is not None
        corpus = pretraining.open_corpus(prepared, tokenizer, recipe)
        validation_loss(model, corpus, 1)
        clock.lap()
        windows = min(options.windows, WINDOWS)
        validation_loss(model, corpus, windows)
        rates["text"] = clock.lap() * options.windows / windows
    return signature(config), rates


def _grade(exam: Exam, groups: list[Group]) -> None:
    with Grader(exam.task, exam.seconds, limit=len(groups) * exam.samples) as grader:
        grader.grade([(group.asked.problem, text) for group in groups for text in group.texts])


_STAGES = {"pretrain": _pretrain, "sft": _sft, "rl": _rl, "evaluate": _evaluate}


def _writing(trainer: Trainer, aside: Path) -> dict[str, float]:
    """Seconds of a checkpoint and of the model alone, by the rate at which a part of it reaches the disk; adapters are merged, which
    takes a second copy of the weights that have any.
    """
    state, part, size = trainer.optimizer.state(), {}, 0
    for name, tensor in state.items():
        part[name] = tensor
        size += tensor.nbytes
        if size > WRITTEN:
            break
    clock = Clock()
    with new_folder(aside / "written") as folder:
        save_file({name: t.detach().contiguous() for name, t in part.items()}, folder / "state.safetensors")
    rate = clock.lap() / size
    weights = sum(t.nbytes for _, t in trainer.weights())
    moments = trainer.optimizer.bytes_to_come()
    clock.lap()
    merge(trainer.model)
    finish = rate * weights + clock.lap()
    return {"checkpoint": rate * (weights + sum(t.nbytes for t in state.values()) + moments), "finish": finish}
