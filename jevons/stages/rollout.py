"""Rollouts: problems in, groups of sampled and graded answers out.

The engine samples with the trainer's own module, so there are no weights to send and no second implementation to disagree with. Every
answer has a seed of its own, made of the run's seed and of where in the run it stands; so what a step samples depends on the weights and
nothing else, and a resumed run samples what the killed one did.

Tools that take their time run in threads while others go on being sampled. When an answer goes on must not depend on how fast a tool was,
since a product of other rows is rounded otherwise: it is so many steps of the engine after the call, or at once where nothing else is
sampled. A tool that takes longer is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from jevons.data.chat import THINK, Message
from jevons.data.tokenizer import Tokenizer
from jevons.data.trajectory import Trajectory
from jevons.engine.engine import Engine
from jevons.engine.sequence import Sample, SamplingParams
from jevons.server.parser import opens_thinking
from jevons.stages.dialogue import arguments, bridge, check_tools, prompt_ids, read_reply, template_of
from jevons.tasks.grade import Grader
from jevons.tasks.pool import PROCESSES
from jevons.tasks.reward import Answer, Rewards
from jevons.tasks.task import Problem, Task

WAIT = 32  # steps of the engine between a call that may take long and what follows it


@dataclass(frozen=True)
class Asked:
    """A problem, whose task it is, and what names it: the task's place in the recipe and the problem's index in it."""

    task: Task
    problem: Problem
    key: tuple[int, int]


@dataclass(eq=False)
class Group:
    """The answers to one problem. `parts` are the reward's, already weighted; `scores` what the verifier said."""

    asked: Asked
    trajectories: list[Trajectory]
    texts: list[str]  # the last turn of each
    scores: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)  # all turns of each, tools' answers between them

    @property
    def rewards(self) -> list[float]:
        return [sum(parts.values()) for parts in self.parts]


@dataclass
class Talk:
    """One answer while it is sampled."""

    asked: Asked
    messages: list[Message]
    trajectory: Trajectory
    opening: str  # "<think>" and what follows it, where the prompt ended inside it
    params: SamplingParams
    turns: int = 0
    last: list[int] = field(default_factory=list)  # the last turn's tokens
    before: str = ""  # earlier turns and tools' answers, to be read


@dataclass
class Waiting:
    """An answer whose tools are at work: which one, what it said, what they will say, and the step at which it goes on."""

    row: int
    i: int
    reply: Message
    results: list[Message | Future[Message]]
    due: int


def seed_of(*place: Any) -> int:
    """64 bits from where something stands."""
    return int.from_bytes(blake2b(repr(place).encode(), digest_size=8).digest()) >> 1


class Sampler:
    """Samples groups with one engine. `params` are those of a whole answer; its tokens are shared by up to `turns` turns.

    ValueError for more than one turn with a chat template that has no tools.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, params: SamplingParams, turns: int) -> None:
        self.engine, self.tokenizer, self.params, self.turns = engine, tokenizer, params, turns
        if turns > 1:
            check_tools(tokenizer)

    def sample(self, asked: Sequence[Asked], size: int, place: tuple[Any, ...], progress: Callable[[int], None]) -> list[Group]:
        """`size` answers to each problem. `place` names this call within the run; `progress` is told the tokens drawn so far."""
        groups: dict[tuple[int, int], Group] = {}
        for finished, drawn in self.stream(asked, size, place):
            groups |= {group.asked.key: group for group in finished}
            progress(drawn)
        return [groups[a.key] for a in asked]

    def stream(self, asked: Sequence[Asked], size: int, place: tuple[Any, ...]) -> Iterator[tuple[list[Group], int]]:
        """The same as it comes: after each step of the engine the groups that it finished, and the tokens drawn so far.

        What is not finished when the caller stops listening is dropped.
        """
        rows = [(Group(a, [], []), self._talks(a, size, place)) for a in asked]
        under_way: dict[int, tuple[int, int]] = {}
        waiting: deque[Waiting] = deque()
        left = [size] * len(rows)
        drawn = steps = 0
        threads = ThreadPoolExecutor(PROCESSES)

        def submit(row: int, i: int) -> None:
            talk = rows[row][1][i]
            under_way[self.engine.submit([*talk.trajectory.prompt, *talk.trajectory.tokens], talk.params)] = row, i

        try:
            for row in range(len(rows)):
                for i in range(size):
                    submit(row, i)
            while under_way or waiting:
                finished, ended = [], list[tuple[int, int]]()
                for event in self.engine.step() if under_way else ():
                    drawn += 1
                    if event.sample is None:
                        continue
                    row, i = under_way.pop(event.id)
                    talk = rows[row][1][i]
                    if reply := self._take(talk, event.sample):
                        results = [self._call(talk, call, threads) for call in reply.tool_calls]
                        slow = any(isinstance(result, Future) for result in results)
                        waiting.append(Waiting(row, i, reply, results, steps + WAIT * slow))
                    else:
                        ended.append((row, i))
                if not under_way and waiting:
                    steps = max(steps, min(w.due for w in waiting))
                for w in [w for w in waiting if w.due <= steps]:
                    waiting.remove(w)
                    group, talks = rows[w.row]
                    answers = [result.result() if isinstance(result, Future) else result for result in w.results]
                    if self._go_on(talks[w.i], w.reply, answers, (*place, group.asked.key, w.i)):
                        submit(w.row, w.i)
                    else:
                        ended.append((w.row, w.i))
                for row, _ in ended:
                    group, talks = rows[row]
                    left[row] -= 1
                    if not left[row]:
                        group.trajectories = [talk.trajectory for talk in talks]
                        group.texts = [self._text(talk) for talk in talks]
                        group.transcripts = [talk.before + text for talk, text in zip(talks, group.texts)]
                        finished.append(group)
                steps += 1
                yield finished, drawn
        finally:
            threads.shutdown(cancel_futures=True)
            self.engine.abort_all()

    def _talks(self, asked: Asked, size: int, place: tuple[Any, ...]) -> list[Talk]:
        prompt = prompt_ids(self.tokenizer, asked.task.messages(asked.problem), self._tools(asked.task))
        opening = self._opening(prompt)
        talks = []
        for i in range(size):
            params = self._params(self.params.max_tokens, (*place, asked.key, i, 0))
            trajectory = Trajectory(prompt, [], [], [], [], finished=False, version=self.engine.version)
            talks.append(Talk(asked, list(asked.task.messages(asked.problem)), trajectory, opening, params))
        return talks

    def _text(self, talk: Talk) -> str:
        return talk.opening + self.tokenizer.decode(talk.last, skip_special=True)

    def _tools(self, task: Task) -> list[dict[str, Any]]:
        return task.tools() if self.turns > 1 else []

    def _params(self, max_tokens: int, place: tuple[Any, ...]) -> SamplingParams:
        p = self.params
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=p.top_k,
            seed=seed_of(*place),
            record_routes=p.record_routes,
            record_support=p.record_support,
        )

    def _opening(self, prompt: Sequence[int]) -> str:
        if not opens_thinking(self.tokenizer, prompt):
            return ""
        text = self.tokenizer.decode(prompt[-16:])
        return text[text.rindex(THINK) :]

    def _take(self, talk: Talk, sample: Sample) -> Message | None:
        """Add a turn to its trajectory; what it said, where it called tools and another turn may follow."""
        t = talk.trajectory
        t.tokens += sample.tokens
        t.own += [True] * len(sample.tokens)
        t.logps += sample.logps
        t.raw_logps += sample.raw_logps
        t.finished = sample.stop_reason == "stop"
        t.routes, t.picks = sample.routes, sample.picks  # of everything before the last token, earlier turns included
        if self.params.record_support:
            t.supports = [*(t.supports or []), *(sample.supports or [])]
        talk.last, talk.turns = sample.tokens, talk.turns + 1
        tools = self._tools(talk.asked.task)
        if not tools or not t.finished or talk.turns == self.turns:
            return None
        reply = read_reply(self.tokenizer, sample.tokens, opened=bool(talk.opening), tools=tools)
        return reply if reply.tool_calls else None

    def _go_on(self, talk: Talk, reply: Message, results: Sequence[Message], place: tuple[Any, ...]) -> bool:
        """Add what the template writes of tools' answers, up to where the next turn begins; whether there is room for one."""
        t = talk.trajectory
        text = bridge(template_of(self.tokenizer), talk.messages, reply, results, self._tools(talk.asked.task))
        between = self.tokenizer.encode(text)
        left = self.params.max_tokens - len(t.tokens) - len(between)
        if left < 1 or len(t.prompt) + len(t.tokens) + len(between) >= self.engine.max_length:
            t.finished = False  # no room to answer
            return False
        talk.before += self._text(talk).rstrip() + "".join(f"\n\n[{result.name}] {result.content.rstrip()}" for result in results) + "\n\n"
        t.tokens += between
        t.own += [False] * len(between)
        t.logps += [0.0] * len(between)
        t.raw_logps += [0.0] * len(between)
        if t.supports is not None:
            t.supports += [None] * len(between)
        talk.messages += [reply, *results]
        talk.opening = self._opening(between)
        talk.params = self._params(left, (*place, talk.turns))
        return True

    def _call(self, talk: Talk, call: dict[str, Any], threads: ThreadPoolExecutor) -> Message | Future[Message]:
        name, given, task = call["function"]["name"], arguments(call), talk.asked.task

        def answer() -> Message:
            wrong = "error: the arguments are not a JSON object"
            result = wrong if given is None else task.call(talk.asked.problem, name, given)
            return Message("tool", result, tool_call_id=call["id"], name=name)

        return answer() if given is None or task.quick(name) else threads.submit(answer)


def grade_groups(groups: Sequence[Group], graders: dict[int, Grader], rewards: Rewards, step: int) -> None:
    """Fill in scores, and rewards as they are at this step; graders by the task's place in the recipe."""
    for place, grader in graders.items():
        mine = [g for g in groups if g.asked.key[0] == place]
        grades = grader.grade([(g.asked.problem, text) for g in mine for text in g.texts])
        for g in mine:
            own, grades = grades[: len(g.texts)], grades[len(g.texts) :]
            g.scores = [grade.score for grade in own]
    for g in groups:
        answers = [
            Answer(g.asked.problem, text, t.drawn, t.finished, score) for text, t, score in zip(g.texts, g.trajectories, g.scores)
        ]
        g.parts = rewards.rewards(answers, step)

