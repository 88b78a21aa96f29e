"""The worst step that a run can have, before its first: every answer as long as allowed, every batch as full.

Runs do not die at their first step but at the one with the longest answers, hours later. So that step is made here, on answers that may not
end, of the longest prompt, and thrown away; what it took in memory is said, and what time, which bounds the plan: that of as many steps, of
the measurements and samples between them, each at its longest too, and of what was spent before. What it cannot show, since nothing is
updated, is the optimizer's moments: they are added. Grading is not in it, and not saving.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from jevons.cost.arithmetic import forward_flops
from jevons.cost.receipt import Plan
from jevons.data.batch import Batch
from jevons.data.trajectory import Lesson, Trajectory, divide, pack_lessons
from jevons.section import Rl
from jevons.stages.classroom import Classroom
from jevons.stages.forecast import token_flops
from jevons.stages.reference import Reference
from jevons.train import device
from jevons.train.loss import Loss
from jevons.train.trainer import Trainer


@dataclass(frozen=True)
class Rehearsal:
    """The plan of a whole stage at its worst, and the memory, in bytes, that it takes at most beside what the system has."""

    plan: Plan
    memory: int
    available: int


def times(every: int, steps: int) -> int:
    """How often something is done in so many steps that is done every so many, and after the last one; 0: never."""
    return -(-steps // every) if every else 0


def rehearse(
    trainer: Trainer,
    classroom: Classroom,
    options: Rl,
    loss: Callable[[Tensor, Tensor, Batch], Loss],
    reference: Reference | None,
    price: float,
    spent: float,
    watch: Callable[[], None] = lambda: None,
) -> Rehearsal:
    """One step at its worst, thrown away; `spent` seconds went before. ValueError where the run would need more memory than there is.

    `watch` is called now and then, and may raise to stop it.
    """
    engine, config, length = classroom.engine, trainer.model.config, options.max_tokens
    words = config.vocab_size
    prompts = [[*classroom.longest[:-1], (classroom.longest[-1] + i) % words] for i in range(options.problems)]
    asked = [(prompt, j) for prompt in prompts for j in range(options.group)]
    params = classroom.sampler.params
    read = engine.prompt_tokens
    start = time.perf_counter()
    drawing = [replace(params, min_tokens=length, seed=i) for i in range(len(asked))]
    samples = engine.generate([p for p, _ in asked], drawing, lambda finished, drawn: watch())
    sampling = time.perf_counter() - start
    engine.new_weights(engine.version)  # nothing of this may be found in the cache later
    lessons = []
    for (prompt, j), s in zip(asked, samples):
        t = Trajectory(prompt, s.tokens, [True] * len(s.tokens), s.logps, s.raw_logps, False, s.version, s.routes, s.supports, s.picks)
        lessons.append(Lesson(t, 1.0 if j % 2 else -1.0, 1.0))
    if trainer.device.type == "cuda":
        engine.release()
    runs = divide(lessons, options.micro_batch_tokens)
    batches = [pack_lessons(run, temperature=options.temperature, share=not options.mtp_weight) for run in runs]
    if reference:
        reference.score(trainer, batches)
    if options.importance_cap:
        for batch, logps_T in zip(batches, trainer.score(batches)):
            batch.old_logps_T = logps_T
    trainer.forward_backward(batches, loss)
    trainer.optimizer.clear()
    device.synchronize(trainer.device)
    seconds = spent + (time.perf_counter() - start) * (1 + options.steps)
    for every, answers in ((options.evaluate_every, classroom.measured), (options.sample_every, classroom.shown)):
        # of fewer answers than a step's, each token still takes a pass over the weights
        seconds += times(every, options.steps) * -(-answers // len(asked)) * sampling
    seconds += sampling * bool(options.evaluate_every) * -(-classroom.measured // len(asked))  # before the first step

    drawn, trained = sum(len(s.tokens) for s in samples), sum(batch.num_tokens for batch in batches)
    context = len(classroom.longest) + length
    flops = (drawn + engine.prompt_tokens - read) * forward_flops(config, context / 2)
    flops += trained * token_flops(config, options, context)
    memory = device.peak_memory(trainer.device) + trainer.optimizer.bytes_to_come()
    plan = Plan(drawn * options.steps, flops * options.steps, seconds, seconds / 3600 * price, memory, bound=True)
    rehearsal = Rehearsal(plan, memory, device.total_memory(trainer.device))
    if rehearsal.memory > rehearsal.available:
        raise ValueError(
            f"rl: a step with answers of rl.max_tokens = {length} needs {rehearsal.memory / 2**30:.1f} GiB, there are "
            f"{rehearsal.available / 2**30:.1f}: lower rl.max_tokens or rl.micro_batch_tokens, set rl.recompute, or add [rl.lora]"
        )
    return rehearsal
