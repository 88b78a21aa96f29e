"""What a step of reinforcement learning looked like: one row of metrics, one line of progress, and the receipt's totals.

Beside what was learned a row holds what tells a reward that cannot teach, or is gamed, from one that works: the parts of the reward, the
share of groups that agree and how far the others differ, the share of replies without an answer to grade, verifiers that failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rich.markup import escape

from jevons.cost.arithmetic import forward_flops, parameters
from jevons.cost.receipt import format_flops, format_seconds
from jevons.engine.engine import Engine
from jevons.model.transformer import Transformer
from jevons.progress import Meter
from jevons.run import Run, Spending
from jevons.section import Rl
from jevons.stages.classroom import Harvest
from jevons.stages.forecast import token_flops
from jevons.stages.rehearsal import Rehearsal
from jevons.tasks.task import Task
from jevons.train.trainer import Metrics


class Scorecard:
    """`totals` (tokens drawn and trained, FLOPs, right answers) are saved with checkpoints, so that a resumed run's receipt goes on."""

    def __init__(self, run: Run, spending: Spending, meter: Meter, options: Rl, engine: Engine, totals: dict[str, Any]) -> None:
        self.run, self.spending, self.meter, self.options, self.engine = run, spending, meter, options, engine
        self.totals = {"drawn": 0, "trained": 0, "flops": 0.0, "answers": 0, "right": 0} | totals
        self._text = ""

    def open(self, model: Transformer, found: Path | None, rehearsal: Rehearsal | None) -> None:
        o, count = self.options, parameters(model.config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say = f"[bold]rl[/] {trained:,} of {count.total:,} parameters; {o.steps} steps of {o.problems} problems x {o.group} answers"
        if rehearsal:
            plan = rehearsal.plan
            say += f"; at their longest {rehearsal.memory / 2**30:.1f} of {rehearsal.available / 2**30:.1f} GiB, at most about "
            say += f"{format_seconds(plan.seconds)}, {format_flops(plan.flops)} and ${plan.money:.4f}"
        if (planned := self.spending.receipt.planned) and not (rehearsal and planned is rehearsal.plan):
            say += f"; as calibrated {format_seconds(planned.seconds)} and ${planned.money:.4f}"
        self.meter.console.print(say, highlight=False, soft_wrap=True)
        self.spending.update(tokens=self.totals["drawn"], flops=self.totals["flops"])  # of a run that only had to finish, too
        if found:
            self.meter.console.print(f"continuing from {found.name}", highlight=False)

    def notices(self, tasks: Sequence[Task]) -> None:
        """Problems that were left out, and what the sandbox cannot do on this system."""
        for notice in dict.fromkeys(notice for task in tasks for notice in task.notices()):
            self.meter.console.print(f"[yellow]{escape(notice)}[/]", highlight=False)

    def show(self, step: int, drawn: int) -> None:
        """While a step is sampled."""
        self.meter.update(step, f"sampling {drawn:,} tokens  {self._text}")

    def add(
        self, step: int, harvest: Harvest, learned: list[tuple[Metrics, float]], lr: float, handover: float, training: float
    ) -> None:
        """The row of a step that is done."""
        trained = sum(metrics.tokens for metrics, _ in learned)
        groups = harvest.groups
        trajectories = [t for group in groups for t in group.trajectories]
        scores = [score for group in groups for score in group.scores]
        parts = [part for group in groups for part in group.parts]
        drawn = sum(t.drawn for t in trajectories)
        context = fmean(len(t.prompt) + len(t.tokens) for t in trajectories)
        config = self.engine.model.config
        totals = self.totals
        totals["drawn"] += drawn
        totals["trained"] += trained
        totals["flops"] += (drawn + harvest.read) * forward_flops(config, context / 2)
        totals["flops"] += trained * token_flops(self.engine.model.config, self.options, context)
        totals["answers"] += len(scores)
        totals["right"] += sum(score == 1.0 for score in scores)
        receipt = self.spending.update(tokens=totals["drawn"], flops=totals["flops"])
        row: dict[str, Any] = {
            "reward": fmean(sum(part.values()) for part in parts),
            **{f"reward_{name}": fmean(part[name] for part in parts) for name in parts[0]},
            "accuracy": fmean(score == 1.0 for score in scores),
            "no_signal": harvest.dropped / len(groups),
            "group_deviation": fmean(pstdev(group.rewards) for group in groups),
            "unanswered": fmean(not group.asked.task.vote(group.asked.problem, text) for group in groups for text in group.texts),
            **({} if all(group.asked.task.trusted for group in groups) else {"verifier_failures": harvest.failures}),
            "groups": len(groups),
            "response_tokens": drawn / len(trajectories),
            **({"turns": fmean(t.turns for t in trajectories)} if self.options.max_turns > 1 else {}),
            "unfinished": fmean(not t.finished for t in trajectories),
            "lr": lr,
            **summary(learned),
            "rollout_seconds": harvest.seconds,
            "grade_seconds": harvest.grading,
            "train_seconds": training,
            "handover_seconds": handover,
            "rollout_tokens_per_second": drawn / harvest.seconds,
            "train_tokens_per_second": trained / training,
            "tokens": totals["drawn"],
            "seconds": receipt.seconds,
            "money": receipt.money,
        }
        self.run.log("rl", step, **row)
        if step == 1 and row.get("turns") == 1:
            say = f"not one of {len(trajectories)} replies called a tool as the chat template writes calls, so all had one turn: "
            say += "show the form in the task's instruction, or teach it first ([sft])"
            self.meter.console.print(f"[yellow]{say}[/]", highlight=False)
        self._text = f"reward {row['reward']:.3f}  right {row['accuracy']:.1%}  {row['response_tokens']:.0f} tokens  ${receipt.money:.4f}"
        self.meter.update(step, self._text)

    def held_out(self, step: int, accuracies: dict[str, float]) -> None:
        if accuracies:
            more = {f"held_out_{name}": value for name, value in accuracies.items()} if len(accuracies) > 1 else {}
            self.run.log("rl", step, held_out=fmean(accuracies.values()), **more)
            words = ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items())
            self.meter.console.print(f"rl {step}: held out {words}", highlight=False)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.run.log("rl", step, sample=row)


def summary(learned: list[tuple[Metrics, float]]) -> dict[str, float]:
    """Means over the tokens trained on, of all updates of a step; empty where nothing was learned.

    The mismatch of sampler and trainer is read off the first update, which is made at the sampler's weights.
    """
    learned = [(metrics, norm) for metrics, norm in learned if metrics.stats["policy_tokens"]]
    if not learned:
        return {}
    stats = [metrics.stats for metrics, _ in learned]
    tokens = sum(s["policy_tokens"] for s in stats)
    known = ("entropy", "ratio", "clipped_low", "clipped_high", "masked", "tis_clipped", "kl_old", "kl")
    means = [name for name in known if name in stats[0]]
    first = stats[0]
    return {
        "loss": fmean(metrics.loss for metrics, _ in learned),
        "grad_norm": fmean(norm for _, norm in learned),
        **{name: sum(s[name] for s in stats) / tokens for name in means},
        "ratio_max": max(s["max_ratio"] for s in stats),
        "mismatch_mean": first["mismatch"] / first["policy_tokens"],
        "mismatch_max": first["max_mismatch"],
        "mismatch_kl": first["mismatch_kl"] / first["policy_tokens"],
    }
