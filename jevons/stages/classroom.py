"""Everything between the recipe and graded groups: tasks, verifiers, rewards, the choice of problems, the sampler."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jevons.data.chat import END_THINK, THINK
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.section import Rl
from jevons.stages.curriculum import Curriculum
from jevons.stages.dialogue import prompt_ids, template_of
from jevons.stages.rollout import Asked, Group, Sampler, grade_groups
from jevons.tasks.grade import Grader, check_gold
from jevons.tasks.reward import Rewards
from jevons.tasks.task import Task, get_task
from jevons.train.advantage import has_signal

READ = 20_000  # problems of each task that are made before training, if it has so many,
LOOKED_AT = 64  # and the longest of them, whose prompts are measured
GOLD = 16  # problems of each task whose own answers are graded before training
SHOWN = 2  # held-out problems of each task whose answers are logged
TRIES = 4  # answers to each of them, to find a right one and a wrong one


@dataclass
class Harvest:
    """A step's groups. `dropped` had no signal: all rewards equal."""

    groups: list[Group]
    kept: list[Group]
    seconds: float  # of sampling
    grading: float
    read: int = 0  # prompt tokens that the engine computed
    failures: int = 0  # of verifiers that hung or crashed, since the stage began

    @property
    def dropped(self) -> int:
        return len(self.groups) - len(self.kept)


def make_tasks(options: Rl) -> list[Task]:
    """The recipe's tasks, tried on their own answers. ValueError for those that cannot be used."""
    tasks = [get_task(mix.task, **mix.options) for mix in options.tasks]
    for task in tasks:
        if options.max_turns > 1 and not task.tools():
            raise ValueError(f"rl.max_turns: {options.max_turns} turns need a task with tools, {task.name} has none")
        if options.evaluate_every and not _tests(task):
            raise ValueError(f"rl.evaluate_every: task {task.name} has no test problems; give a test_path, or set it to 0")
        if task.size("train") == 0:
            raise ValueError(f"rl.tasks: {task.name} has no training problems; give more lines, or test_path besides path")
        check_gold(task, GOLD, options.verifier_seconds)
    return tasks


class Classroom:
    """Built before training starts, so that whatever is wrong with tasks, rewards, template or window is said before it costs anything."""

    def __init__(self, options: Rl, tokenizer: Tokenizer, engine: Engine, seed: int) -> None:
        self.options, self.tokenizer, self.engine, self.seed = options, tokenizer, engine, seed
        template_of(tokenizer)
        self.tasks = make_tasks(options)
        self.rewards = Rewards([(part.part, part.weight, part.from_step, part.options) for part in options.rewards])
        self.graders = {
            place: Grader(task, timeout=options.verifier_seconds, limit=options.verifier_failures) for place, task in enumerate(self.tasks)
        }
        self.curriculum = Curriculum(self.tasks, [mix.share for mix in options.tasks], options.sampling, options.pool, seed)
        if all(sizes := self.curriculum.sizes) and sum(sizes) < options.problems:
            raise ValueError(f"rl.problems: {options.problems} are more than the pool of {sum(sizes)}; lower it or raise rl.pool")
        config = engine.model.config
        params = SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            record_routes=options.replay_routes and bool(config.n_routed_experts or config.memory_layers),
            record_support=options.top_p < 1 or options.top_k > 0,
        )
        self.sampler = Sampler(engine, tokenizer, params, options.max_turns)
        self.longest = self._longest_prompt()
        window = config.max_position_embeddings
        most = len(self.longest) + options.max_tokens
        if most > window:
            raise ValueError(
                f"rl.max_tokens: a prompt of {len(self.longest)} tokens and {options.max_tokens} of answer do not fit the model's "
                f"{window} positions; lower it, or choose shorter problems"
            )
        if most > engine.max_length:  # answers would be cut off earlier than was asked for
            raise ValueError(
                f"rl.cache_gb: {options.cache_gb:g} GiB hold {engine.max_length} tokens, less than the {most} of one problem; raise it"
            )

    def _longest_prompt(self) -> list[int]:
        prompts = []
        for place, task in enumerate(self.tasks):
            size = self.curriculum.sizes[place]  # of endless tasks the first are as good as others; of a file one may be ten times as long
            problems = [task.problem("train", i, self.seed) for i in range(min(size or LOOKED_AT, READ))]
            problems = sorted(problems, key=lambda problem: -len(problem.prompt))[:LOOKED_AT]
            tools = task.tools() if self.options.max_turns > 1 else []
            prompts += [prompt_ids(self.tokenizer, task.messages(problem), tools) for problem in problems]
        return max(prompts, key=len)

    def collect(self, step: int, progress: float, show: Callable[[int], None]) -> Harvest:
        """A step's groups, sampled and graded; with `refill`, until there are enough that teach or the rounds are used up."""
        options = self.options
        harvest = Harvest([], [], 0.0, 0.0)
        rounds = options.refill_rounds if options.no_signal == "refill" else 1
        for turn in range(rounds):
            start, before = time.perf_counter(), self.engine.prompt_tokens
            asked = self.curriculum.draw(options.problems - len(harvest.kept), progress)
            fresh = self.sampler.sample(asked, options.group, (self.seed, step, turn), show)
            middle = time.perf_counter()
            grade_groups(fresh, self.graders, self.rewards, step)
            for group in fresh:
                self.curriculum.learn(group.asked.key, sum(score == 1.0 for score in group.scores) / len(group.scores))
            harvest.groups += fresh
            harvest.kept += [group for group in fresh if has_signal(group.rewards)]
            harvest.read += self.engine.prompt_tokens - before
            harvest.seconds += middle - start
            harvest.grading += time.perf_counter() - middle
            if len(harvest.kept) == options.problems:
                break
        harvest.failures = sum(grader.failures for grader in self.graders.values())
        return harvest

    def check_thinking(self, groups: list[Group]) -> None:
        """ValueError where replies must think, by template or by reward, and not one of the first groups ends its thinking."""
        texts = [text for group in groups for text in group.texts]
        if any(END_THINK in text for text in texts):
            return
        opened = all(text.lstrip().startswith(THINK) for text in texts)
        parts = [r.part for r in self.options.rewards if r.part in ("format", "tags") and "think" in r.options.get("tags", ("think",))]
        if opened or parts:
            so = "none can be right" if opened else f"none can be rewarded by {parts[0]}"
            raise ValueError(
                f"not one of {len(texts)} replies ends its thinking with {END_THINK} within rl.max_tokens = {self.options.max_tokens}, so "
                f"{so}: raise rl.max_tokens, or teach the format first ([sft])"
            )

    @property
    def measured(self) -> int:
        """How many answers `measure` draws."""
        return sum(min(self.options.evaluate_problems, _tests(task)) for task in self.tasks)

    @property
    def shown(self) -> int:
        """How many answers `show` draws."""
        return sum(TRIES * min(SHOWN, _tests(task)) for task in self.tasks)

    def measure(self) -> dict[str, float]:
        """Accuracy on held-out problems, greedily, by task; the first of the split, the same ones every time."""
        out: dict[str, float] = {}
        params = SamplingParams(max_tokens=self.options.max_tokens, temperature=0)
        for place, (task, grader) in enumerate(zip(self.tasks, self.graders.values())):
            size = min(self.options.evaluate_problems, _tests(task))
            problems = [task.problem("test", i, self.seed) for i in range(size)]
            asked = [Asked(task, problem, (place, i)) for i, problem in enumerate(problems)]
            sampler = Sampler(self.engine, self.tokenizer, params, self.options.max_turns)
            texts = [group.texts[0] for group in sampler.sample(asked, 1, (self.seed, "held out"), lambda drawn: None)]
            grades = grader.grade(list(zip(problems, texts)))
            name = task.name if task.name not in out else f"{task.name}-{place}"
            out[name] = sum(grade.score == 1.0 for grade in grades) / size
        return out

    def show(self, step: int) -> list[dict[str, Any]]:
        """Answers to the same few held-out problems, a right one and a wrong one of each where there are."""
        rows = []
        asked = [
            Asked(task, task.problem("test", i, self.seed), (place, i))
            for place, task in enumerate(self.tasks)
            for i in range(min(SHOWN, _tests(task)))
        ]
        groups = self.sampler.sample(asked, TRIES, (self.seed, step, "shown"), lambda drawn: None)
        grade_groups(groups, self.graders, self.rewards, step)
        for group in groups:
            right = [text for text, score in zip(group.transcripts, group.scores) if score == 1.0]
            wrong = [text for text, score in zip(group.transcripts, group.scores) if score != 1.0]
            row: dict[str, Any] = {"prompt": group.asked.problem.prompt, "reply": (right or wrong)[0], "correct": bool(right)}
            if right and wrong:
                row["other"] = {"reply": wrong[0], "correct": False}
            rows.append(row)
        return rows

    def state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state(), "failures": [grader.failures for grader in self.graders.values()]}

    def load(self, state: dict[str, Any]) -> None:
        self.curriculum.load(state["curriculum"])
        for grader, failures in zip(self.graders.values(), state["failures"]):
            grader.failures = failures

    def close(self) -> None:
        for grader in self.graders.values():
            grader.close()


def _tests(task: Task) -> int:
    """How many test problems a task has."""
    size = task.size("test")
    return sys.maxsize if size is None else size
