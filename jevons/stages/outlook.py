"""What each stage of a recipe will take where nothing was measured: FLOPs from its numbers, time from a stated share of peak, memory.

    Outlook(recipe, config, on, share).stages()         a StagePlan each, in order

Problem: a recipe says steps and batches, a plan needs tokens, FLOPs, bytes and hours. Approach: each stage's own arithmetic, in the order
in which the stage works. What only the data knows is assumed and said: `assumed` lists it, with the key that changes it. Answers of
unknown length count as half of what they may have, conversations as three quarters full, prompts as PROMPT tokens. Tokens are
generated at the roofline of cost/deployment.py, all answers of a step at once and the longest alone at the end. Not done: the time that
graders, checkpoints and validation take; `jevons plan --calibrate` measures them.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from pathlib import Path

from jevons.cost.arithmetic import forward_flops, train_flops, weight_bytes
from jevons.cost.deployment import FORMATS, Deployment, Layout
from jevons.cost.hardware import Cluster, Device
from jevons.cost.memory import CONTEXT, PROCESS, Memory, cache_memory, training_memory
from jevons.cost.training import StagePlan, training_hours
from jevons.model.config import ModelConfig
from jevons.recipe import Recipe
from jevons.section import Lora, Rl, Sft
from jevons.stages.forecast import ANSWER, held_out_count, text_flops, token_flops

PROMPT = 100  # tokens of a problem
FULL = 0.75  # of sequence_length, a conversation
TEXT = 4.0  # bytes of a token
PREPARED = 4e5  # tokens/s of one process: recipes/text.toml takes half a minute for 100 MB with two
DOCUMENT = 45  # tokens of a generated conversation, for each of its problems
LEAST_DEVICES = 65536  # more are not tried

Trials = Iterator[tuple[str, Callable[[], Memory]]]


class Outlook:
    """The stages of one recipe on one cluster."""

    def __init__(
        self, recipe: Recipe, config: ModelConfig, on: Cluster, share: float, origin: str, cpu: Device, base: float = 0.0
    ) -> None:
        """`share` of the bf16 peak that training reaches, and `origin`, where that is from. `cpu`: what text is prepared on, two
        cores of it a unit. `base`: bytes that a process has at least.
        """
        self.recipe, self.config, self.on, self.cpu = recipe, config, on, cpu
        self.share, self.basis = share, f"{share:.1%} of peak, {origin}"
        self.assumed: list[str] = []
        self.step_tokens: dict[str, float] = {}  # that an optimizer step of fine-tuning or reinforcement learning trains on
        self.on_cpu = on.device.name.startswith("CPU")
        self.bytes = 2 if recipe.dtype == "bfloat16" else 4
        self.base = max(base, PROCESS[self.bytes] if self.on_cpu else CONTEXT)

    def stages(self) -> list[StagePlan]:
        makers = {"prepare": self.prepare, "pretrain": self.pretrain, "sft": self.sft, "rl": self.rl, "evaluate": self.evaluate}
        return [makers[stage]() for stage in self.recipe.stages]

    def prepare(self) -> StagePlan:
        section, pretrain = self.recipe.prepare, self.recipe.pretrain
        assert section is not None
        if section.tasks:
            tokens = section.documents * DOCUMENT * sum(m.turns * m.share for m in section.tasks) / sum(m.share for m in section.tasks)
            self.assumed.append(f"prepare: {DOCUMENT} tokens for each generated problem")
        elif size := text_bytes(section.sources):
            tokens = size / TEXT
            self.assumed.append(f"prepare: {TEXT:g} bytes of text a token")
        else:
            tokens = pretrain.steps * pretrain.batch_size * pretrain.sequence_length if pretrain else 0
            self.assumed.append("prepare: the sources are not here, so as much text as pretraining reads once")
        on = self.on if self.on_cpu else Cluster(self.cpu, max(1, section.processes // 2))
        seconds = tokens / (PREPARED * section.processes)
        return StagePlan(stage="prepare", on=on, tokens=tokens, seconds=seconds, basis=f"{PREPARED:,.0f} tokens/s a process, a default")

    def pretrain(self) -> StagePlan:
        section = self.recipe.pretrain
        assert section is not None
        tokens = section.steps * section.batch_size * section.sequence_length
        mtp = bool(section.mtp_weight) and self.config.num_nextn_predict_layers > 0
        flops = tokens * train_flops(self.config, section.sequence_length, mtp=mtp)
        return StagePlan(
            stage="pretrain",
            on=self.on,
            tokens=tokens,
            flops=flops,
            seconds=self.training(flops),
            basis=self.basis,
            memory=self.pretrain_memory(section.micro_batch_size or section.batch_size, section.recompute, self.on.count),
        )

    def pretrain_memory(self, micro_batch: int, recompute: bool, devices: int) -> Memory:
        section = self.recipe.pretrain
        assert section is not None
        return training_memory(
            self.config,
            tokens=ceil(micro_batch / devices) * section.sequence_length,
            dtype_bytes=self.bytes,
            recompute=recompute,
            micro_batches=section.batch_size // micro_batch,
            devices=devices,
            mtp=bool(section.mtp_weight),
            cpu=self.on_cpu,
            other=self.base,
        )

    def sft(self) -> StagePlan:
        section = self.recipe.sft
        assert section is not None
        if not section.documents and not (size := text_bytes(section.sources)):
            raise ValueError("sft.documents: the sources are not here, so say how many conversations there will be: sft.documents=1000")
        documents = section.documents or round(size / TEXT / (FULL * section.sequence_length))
        length = FULL * section.sequence_length
        self.assumed.append(f"sft: conversations of {length:,.0f} tokens on average, so {FULL:.0%} of sft.sequence_length")
        if not section.documents:
            self.assumed.append(f"sft: {documents:,} conversations, by the size of the files")
        if not section.tasks:
            documents -= held_out_count(section, documents)
        steps = ceil(documents * section.epochs / section.batch_size)
        self.step_tokens["sft"] = section.batch_size * length
        tokens = steps * self.step_tokens["sft"]
        flops = tokens * token_flops(self.config, section, length)
        return StagePlan(
            stage="sft",
            on=self.on,
            tokens=tokens,
            flops=flops,
            seconds=self.training(flops),
            basis=self.basis,
            memory=self.tuning_memory("sft", section.micro_batch_tokens, section.recompute, self.on.count),
        )

    def rl(self) -> StagePlan:
        section = self.recipe.rl
        assert section is not None
        answer = ANSWER * section.max_tokens
        said = f"half of rl.max_tokens; problems of {PROMPT}; all groups teach"
        self.assumed.append(f"rl: answers of {answer:,.0f} tokens on average, {said}")
        samples = section.problems * section.group
        seconds, flops, drawn = self.generate(section.problems, section.group, answer, section.max_tokens)
        parts = {"rollouts": section.steps * seconds}
        # a prompt is read once for all of its answers, unless multi-token prediction has to look across it
        trained = samples * answer + PROMPT * (samples if section.mtp_weight else section.problems)
        self.step_tokens["rl"] = trained / section.updates
        token = token_flops(self.config, section, PROMPT + answer)
        scored = forward_flops(self.config, (PROMPT + answer) / 2) * (bool(section.kl_weight) + bool(section.importance_cap))
        learned = trained * (token + scored)
        parts["training"] = section.steps * self.training(learned)
        flops, drawn = section.steps * (flops + learned), section.steps * drawn
        if section.evaluate_every:
            times = 1 + ceil(section.steps / section.evaluate_every)
            seconds, more, _ = self.generate(section.evaluate_problems * len(section.tasks), 1, answer, section.max_tokens)
            parts["held-out problems"], flops = times * seconds, flops + times * more
        return StagePlan(
            stage="rl",
            on=self.on,
            tokens=drawn,
            flops=flops,
            seconds=sum(parts.values()),
            basis=f"training at {self.basis}; rollouts at the roofline's default share",
            parts=parts,
            memory=self.tuning_memory("rl", section.micro_batch_tokens, section.recompute, self.on.count),
        )

    def evaluate(self) -> StagePlan:
        section = self.recipe.evaluate
        assert section is not None
        answer = ANSWER * section.max_tokens
        rounds = 1 + (self.recipe.rl is not None and section.before_rl)
        seconds = flops = drawn = 0.0
        parts = []
        if tasks := len(self.recipe.task_mixes):
            self.assumed.append(f"evaluate: answers of {answer:,.0f} tokens on average, half of evaluate.max_tokens")
            groups = ceil(tasks * section.problems * section.samples / section.concurrency)
            once = self.generate(section.concurrency, 1, answer, section.max_tokens)
            seconds, flops, drawn = (rounds * groups * x for x in once)
            parts.append("answers at the roofline's default share")
        if read := text_flops(self.recipe, self.config):  # once, of the last model
            seconds, flops = seconds + self.training(read), flops + read
            parts.append(f"text at {self.basis}")
        held = cache_memory(self.config, section.concurrency, PROMPT + section.max_tokens)
        memory = Memory(weight_bytes(self.config, self.bytes, mtp=True), 0, 0, 0, 0, held, self.base)
        return StagePlan(
            stage="evaluate",
            on=self.on,
            tokens=drawn,
            flops=flops,
            seconds=seconds,
            basis="; ".join(parts),
            memory=memory if self.on.count == 1 else None,
        )

    def training(self, flops: float) -> float:
        """Seconds of so many FLOPs at the share of peak."""
        return 3600 * training_hours(flops, self.on.device.peak["bf16"], self.share, self.on.count)

    def generate(self, prompts: float, group: int, answer: float, longest: int) -> tuple[float, float, float]:
        """Seconds, FLOPs and generated tokens of `group` answers to each of `prompts`, all at once; the longest goes on alone."""
        deployment, batch, context = self.deployment(), ceil(prompts * group), PROMPT + answer / 2
        read, step = deployment.prefill(PROMPT), deployment.decode(batch, context)
        tail = (longest - answer) * deployment.decode(1, PROMPT + longest).seconds
        drawn = batch * answer
        flops = prompts * PROMPT * forward_flops(self.config, PROMPT / 2, head=False) + drawn * forward_flops(self.config, context)
        return prompts * PROMPT / read.rate + answer * step.seconds + tail, flops, drawn

    def deployment(self) -> Deployment:
        """A copy of the model on each device, or in slices on each node where one does not hold it."""
        device, count = self.on.device, self.on.count
        whole = weight_bytes(self.config, 2) < device.memory / 2 or device.link is None
        slices = (t for t in range(min(count, device.per_node), 0, -1) if count % t == 0 and self.config.num_attention_heads % t == 0)
        tensor = 1 if whole else next(slices)
        return Deployment(self.config, device, Layout(tensor, count // tensor), FORMATS["bf16"])

    def tuning_memory(self, stage: str, at_once: float, recompute: bool, devices: int, lora: Lora | None = None) -> Memory:
        """Of fine-tuning or reinforcement learning with `at_once` tokens in a micro-batch, as planned above."""
        section: Sft | Rl = getattr(self.recipe, stage)
        tokens = self.step_tokens[stage]
        lora, cache, second = lora or section.lora, 0.0, 0.0
        if isinstance(section, Rl):
            second = weight_bytes(self.config, self.bytes) / devices * bool(section.kl_weight)  # the reference
            if self.on_cpu:  # a GPU's is given back before training
                length, samples = PROMPT + section.max_tokens, section.problems * section.group
                cache = cache_memory(self.config, samples / devices, length, section.cache_gb * 2**30)
        return training_memory(
            self.config,
            tokens=min(at_once, tokens) / devices,
            dtype_bytes=self.bytes,
            recompute=recompute,
            micro_batches=ceil(tokens / at_once),
            devices=devices,
            lora_rank=lora.rank if lora else None,
            lora_targets=lora.targets if lora else (),
            mtp=bool(section.mtp_weight),
            loss="log_probs",
            cpu=self.on_cpu,
            cache=cache,
            other=self.base + second,
        )

    def trials(self, stage: str) -> Trials:
        """What could be changed to make a stage fit, as it would be written on the command line, in the order of what it costs."""
        if stage in ("sft", "rl"):
            yield from self._tuning_trials(stage)
        if stage != "pretrain":
            return
        section = self.recipe.pretrain
        assert section is not None
        now = section.micro_batch_size or section.batch_size
        smaller = [n for n in range(now - 1, 0, -1) if section.batch_size % n == 0]
        for recompute in (False, True) if not section.recompute else (True,):
            for n in smaller if recompute == section.recompute else [now, *smaller]:
                changes = [f"pretrain.micro_batch_size={n}"] * (n != now) + ["pretrain.recompute=true"] * (recompute != section.recompute)
                yield " ".join(changes), partial(self.pretrain_memory, n, recompute, self.on.count)
        for more in self._more():
            yield f"--on {more}x{self.on.device}", partial(self.pretrain_memory, 1, True, more)

    def _tuning_trials(self, stage: str) -> Trials:
        section: Sft | Rl = getattr(self.recipe, stage)
        least = section.sequence_length if isinstance(section, Sft) else PROMPT + section.max_tokens
        sizes = [section.micro_batch_tokens]
        while sizes[-1] // 2 >= least:
            sizes.append(sizes[-1] // 2)
        for lora in (None, Lora.model_validate({})) if section.lora is None else (None,):
            for recompute in (False, True) if not section.recompute else (True,):
                for size in sizes:
                    changes = [f"{stage}.micro_batch_tokens={size}"] * (size != sizes[0])
                    changes += [f"{stage}.recompute=true"] * (recompute != section.recompute)
                    changes += [f"{stage}.lora.rank={lora.rank}"] if lora else []
                    if changes:
                        yield " ".join(changes), partial(self.tuning_memory, stage, size, recompute, self.on.count, lora)
        for more in self._more():
            yield f"--on {more}x{self.on.device}", partial(self.tuning_memory, stage, sizes[-1] * more, True, more)

    def _more(self) -> Iterator[int]:
        count = self.on.count * 2
        while count <= LEAST_DEVICES:
            yield count
            count *= 2


def text_bytes(sources: tuple[str, ...]) -> int:
    """Of the files that sources name, as they lie on the disk; 0 where none is there."""
    found = [Path(name) for source in sources for name in glob.glob(str(Path(source).expanduser()), recursive=True)]
    files = {file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    return sum(file.stat().st_size for file in files)
