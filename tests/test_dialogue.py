"""Conversations with tools grow by tokens: what was drawn stays, what the template adds is what it would have written."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from jevons.data.chat import DEFAULT_TEMPLATE, Message
from jevons.data.tokenizer import SPECIAL_TOKENS, train_bpe
from jevons.data.trajectory import Lesson, pack_lessons
from jevons.engine.engine import Engine, Event
from jevons.engine.sequence import Sample, SamplingParams
from jevons.stages import rollout
from jevons.stages.dialogue import arguments, bridge, read_reply, template_of
from jevons.stages.rollout import WAIT, Asked, Sampler
from jevons.tasks.task import Problem
from jevons.tasks.tool import Equipped
from jevons.train.objective import Objective
from jevons.train.policy import policy_loss
from jevons.train.trainer import Trainer

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
# drops the reasoning of older turns, as R1, QwQ and Qwen3 do
FORGETFUL = DEFAULT_TEMPLATE.replace(
    "message.role == 'assistant' and message.reasoning_content", "message.role == 'assistant' and message.reasoning_content and loop.last"
)
assert FORGETFUL != DEFAULT_TEMPLATE


def make(template):
    return train_bpe(["Speak, friend, and enter."] * 4, 320, chat_template=template, special_tokens=SPECIAL_TOKENS)


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, FORGETFUL], ids=["keeps reasoning", "drops reasoning"])
def test_what_is_added_is_what_the_template_writes(template):
    tokenizer = make(template)
    template = template_of(tokenizer)
    asked = [Message("user", "1+2?")]
    reply = Message("assistant", "", "One and two.", (CALL,))
    results = [Message("tool", "3", tool_call_id="call00000", name="add")]
    added = bridge(template, asked, reply, results, [ADD])
    whole = template.render([*asked, Message("assistant", "", tool_calls=(CALL,)), *results], tools=[ADD], add_generation_prompt=True)
    assert whole.endswith(template.turn_end + added)
    assert added.startswith("\n") and added.endswith(template.generation_prompt) and "tool\n3" in added


def test_a_drawn_call_is_read_and_its_bad_arguments_are_none():
    tokenizer = make(DEFAULT_TEMPLATE)
    text = '<think>hm</think>so<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'
    reply = read_reply(tokenizer, tokenizer.encode(text), opened=False, tools=[ADD])
    assert (reply.reasoning, reply.content) == ("hm", "so")
    assert [arguments(call) for call in reply.tool_calls] == [{"a": 1}]
    assert reply.tool_calls[0]["function"]["name"] == "add"
    assert arguments({"function": {"name": "add", "arguments": '{"a": '}}) is None
    assert arguments({"function": {"name": "add", "arguments": "[1]"}}) is None
    assert read_reply(tokenizer, tokenizer.encode("plain<|im_end|>"), opened=False, tools=[ADD]).tool_calls == ()


def test_templates_that_cannot_be_learned_from_are_refused():
    silent = DEFAULT_TEMPLATE.replace("{%- if add_generation_prompt %}", "{%- if false %}")
    with pytest.raises(ValueError, match="no generation prompt"):
        template_of(make(silent))
    counting = DEFAULT_TEMPLATE.replace("'<|im_start|>' + message.role", "'<|im_start|>' + (messages | length | string) + message.role")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        bridge(template_of(make(counting)), [Message("user", "1")], Message("assistant", "2"), [Message("tool", "3")], [ADD])


def test_tools_need_a_template_that_writes_them():
    deaf = DEFAULT_TEMPLATE.replace("{%- if tools %}", "{%- if false %}")
    strange = DEFAULT_TEMPLATE.replace("tool_call>", "invoke>")
    for template, complaint in ((deaf, "does not write tools"), (strange, "writes calls in a form that is not known")):
        with pytest.raises(ValueError, match=complaint):
            Sampler(Scripted(make(template), []), make(template), SamplingParams(), 2)
        Sampler(Scripted(make(template), []), make(template), SamplingParams(), 1)


class Scripted:
    """An engine that draws what it is told, turn by turn, and remembers what it was asked."""

    version, max_length = 7, 2048

    def __init__(self, tokenizer, turns):
        self.turns, self.tokenizer, self.asked, self.waiting = list(turns), tokenizer, [], []

    def submit(self, prompt, params):
        self.asked.append((list(prompt), params))
        self.waiting.append(len(self.asked) - 1)
        return self.waiting[-1]

    def step(self):
        id = self.waiting.pop(0)
        tokens = self.tokenizer.encode(self.turns[id])
        logps = [-0.5 - id] * len(tokens)
        routes = torch.zeros(len(self.asked[id][0]) + len(tokens) - 1, 2, 2, dtype=torch.int16)
        sample = Sample(tokens, logps, logps, "stop", self.version, routes=routes)
        return [Event(id, tokens[-1], logps[-1], logps[-1], [], 0, 0.0, sample)]

    def abort_all(self):
        pass


@dataclass(frozen=True)
class Sums(Equipped):
    name: ClassVar[str] = "sums"

    def problem(self, split, index, seed):
        return Problem("1+2?", "3", {}, 1)

    def verify(self, problem, reply):
        return float(reply == "3")


def sampler(turns, max_tokens=200, allowed=3):
    tokenizer = make(DEFAULT_TEMPLATE)
    task = Sums(tools_=("calculator",))
    engine = Scripted(tokenizer, turns)
    params = SamplingParams(max_tokens=max_tokens, record_routes=True)
    asked = [Asked(task, task.problem("train", 0, 0), (0, 0))]
    (group,) = Sampler(engine, tokenizer, params, allowed).sample(asked, 1, ("x",), lambda drawn: None)
    return tokenizer, engine, group


CALLING = '<tool_call>{"name": "calculator", "arguments": {"expression": "1+2"}}</tool_call><|im_end|>'


def test_turns_grow_by_tokens_and_only_drawn_ones_count():
    tokenizer, engine, group = sampler([CALLING, "3<|im_end|>"])
    (t,) = group.trajectories
    first, second = tokenizer.encode(CALLING), tokenizer.encode("3<|im_end|>")
    assert engine.asked[1][0] == [*t.prompt, *t.tokens[: -len(second)]]  # what was drawn is read again as it was drawn
    assert t.tokens[: len(first)] == first and t.tokens[-len(second) :] == second
    between = t.tokens[len(first) : -len(second)]
    assert tokenizer.decode(between) == "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    assert t.own == [True] * len(first) + [False] * len(between) + [True] * len(second)
    assert t.logps == [-0.5] * len(first) + [0.0] * len(between) + [-1.5] * len(second)
    assert len(t.routes) == len(t.prompt) + len(t.tokens) - 1 and t.finished
    assert group.texts == ["3"]  # graded by its last turn
    batch = pack_lessons([Lesson(t, 1.0, 1.0)])
    assert batch.targets_T[batch.weights_T > 0].tolist() == first + second
    assert engine.asked[1][1].max_tokens == 200 - len(first) - len(between)


def test_turns_end_with_the_budget_and_the_allowance():
    for options in ({"allowed": 1}, {"max_tokens": len(make(DEFAULT_TEMPLATE).encode(CALLING)) + 5}):
        _, engine, group = sampler([CALLING, "3<|im_end|>"], **options)
        assert len(engine.asked) == 1 and all(group.trajectories[0].own)
    assert not group.trajectories[0].finished  # it called and could not be answered
    _, engine, group = sampler([CALLING.replace("1+2", "1+"), CALLING, CALLING], max_tokens=900)
    assert len(engine.asked) == 3 and "error" in engine.tokenizer.decode(group.trajectories[0].tokens)


@dataclass(frozen=True)
class Slow(Sums):
    """Its tool waits for `ready`, then says how long the expression is."""

    ready: Any = None

    def quick(self, name):
        return False

    def call(self, problem, name, arguments):
        self.ready(arguments["expression"])
        return str(len(arguments["expression"]))


class Stepped(Scripted):
    """Draws a token of every answer a step; notes the step before which each turn was submitted, and does what a step was given to do."""

    def __init__(self, tokenizer, turns, at_step=None):
        super().__init__(tokenizer, turns)
        self.steps, self.submitted, self.under_way, self.at_step = 0, [], {}, at_step or {}

    def submit(self, prompt, params):
        id = super().submit(prompt, params)
        self.under_way[id] = self.tokenizer.encode(self.turns[id])
        self.submitted.append(self.steps)
        return id

    def step(self):
        assert self.under_way
        self.steps += 1
        self.at_step.get(self.steps, int)()
        events = []
        for id, tokens in list(self.under_way.items()):
            whole = self.tokenizer.encode(self.turns[id])
            done = len(tokens) == 1
            sample = Sample(whole, [-1.0] * len(whole), [-1.0] * len(whole), "stop", self.version) if done else None
            events.append(Event(id, tokens[0], -1.0, -1.0, [], 0, 0.0, sample))
            self.under_way[id] = tokens[1:]
            if done:
                del self.under_way[id]
        return events


def sampled(turns, ready, size, at_step=None):
    task = Slow(tools_=("calculator",), ready=ready)
    tokenizer = make(DEFAULT_TEMPLATE)
    engine = Stepped(tokenizer, turns, at_step)
    asked = [Asked(task, task.problem("train", 0, 0), (0, 0))]
    (group,) = Sampler(engine, tokenizer, SamplingParams(max_tokens=900), 3).sample(asked, size, ("x",), lambda drawn: None)
    return engine, group


@pytest.mark.parametrize("answers", [1, 2])
def test_calls_are_made_at_once_and_answered_in_order(answers, monkeypatch):
    """Both of one turn, or one of each of two answers: they wait for each other here."""
    monkeypatch.setattr(rollout, "PROCESSES", 2)
    call = CALLING.replace("<|im_end|>", "") + CALLING.replace("1+2", "10+20") if answers == 1 else CALLING
    together = threading.Barrier(2)
    _, group = sampled([call] * answers + ["3<|im_end|>"] * answers, lambda expression: together.wait(60), answers)
    between = "\n\n[calculator] 3\n\n[calculator] 5\n\n" if answers == 1 else "\n\n[calculator] 3\n\n"
    for transcript, t in zip(group.transcripts, group.trajectories):
        assert transcript.endswith(between + "3") and t.turns == 2 and t.finished
    assert group.texts == ["3"] * answers


def test_others_go_on_while_a_tool_works_and_its_speed_changes_nothing():
    """The first answer's tool does not come back before the second has drawn ten tokens more; one that is done at once gives the same."""
    long = "word " * 40 + "<|im_end|>"
    called = len(make(DEFAULT_TEMPLATE).encode(CALLING))
    go = threading.Event()
    waits = sampled([CALLING, long, "3<|im_end|>"], lambda expression: go.wait(60) or pytest.fail("stalled"), 2, {called + 10: go.set})
    at_once = sampled([CALLING, long, "3<|im_end|>"], lambda expression: None, 2)
    assert waits[0].submitted == at_once[0].submitted == [0, 0, called + WAIT]
    assert [t.tokens for t in waits[1].trajectories] == [t.tokens for t in at_once[1].trajectories]


def test_nothing_else_to_sample_means_no_delay():
    engine, _ = sampled([CALLING, "3<|im_end|>"], lambda expression: None, 1)
    assert engine.submitted == [0, engine.steps - len(engine.tokenizer.encode("3<|im_end|>"))]


def test_a_tool_that_fails_is_our_fault_and_raises():
    def broken(expression):
        raise OSError("no process can be started")

    with pytest.raises(OSError, match="no process"):
        sampled([CALLING, "3<|im_end|>"], broken, 1)


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_over_turns_the_trainer_finds_what_the_sampler_drew_at(tiny_model, monkeypatch, family):
    """Every turn calls a tool here, whatever it is: the next one reads the last from the cache, and what was drawn counts alone."""
    tokenizer, task = make(DEFAULT_TEMPLATE), Sums(tools_=("calculator",))
    call = {"id": "call00000", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+2"}'}}
    monkeypatch.setattr(rollout, "read_reply", lambda *args, **options: Message("assistant", tool_calls=(call,)))
    model = tiny_model(family, vocab_size=tokenizer.size, max_position_embeddings=1024)
    engine = Engine(model, max_sequences=8, num_blocks=400, stop_ids=range(0, tokenizer.size, 6))
    params = SamplingParams(max_tokens=300, temperature=0.7, top_p=0.9, record_routes=family != "qwen2", record_support=True)
    asked = [Asked(task, task.problem("train", i, 0), (0, i)) for i in range(2)]
    groups = Sampler(engine, tokenizer, params, 3).sample(asked, 3, ("x",), lambda drawn: None)
    trajectories = [t for group in groups for t in group.trajectories]
    assert all(t.turns == 3 and t.finished for t in trajectories)
    assert all(text.count("[calculator] 3") == 2 for text in groups[0].transcripts)
    batch = pack_lessons([Lesson(t, 1.0, 1.0) for t in trajectories], temperature=0.7)
    metrics = Trainer(model, mtp_weight=0).forward_backward([batch], policy_loss(Objective()), 1.0)
    assert metrics.stats["max_mismatch"] < 1e-4 and metrics.stats["policy_tokens"] == sum(t.drawn for t in trajectories)
    assert metrics.stats["ratio"] == pytest.approx(metrics.stats["policy_tokens"], rel=1e-5)
