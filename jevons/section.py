"""The sections of a recipe: what each stage can be told, with the checks that need nothing but the section itself.

Every default is the one that most users want; every error names the key and the fix. `recipe.py` reads them from a file, and checks
how they fit together.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from jevons.model.config import ModelConfig
from jevons.tasks.reward import make_part
from jevons.tasks.task import get_task
from jevons.train.objective import TAU, Objective


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
    memory_lr: float | None = Field(None, ge=1)  # times lr: memory layers' values at first; None: 4 as in UltraMem's code (its paper: 10)
    memory_lr_share: float | None = Field(None, gt=0, le=1)  # of the steps, over which that falls to 1; None: all
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

    def check_memory(self, config: ModelConfig) -> None:
        """ValueError where it speaks of memory layers and the model has none."""
        for name in ("memory_lr", "memory_lr_share"):
            if getattr(self, name) is not None and not config.memory_layers:
                raise ValueError(f"pretrain.{name}: the model has no memory_layers whose values it could be for; remove it")


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685) instead of training every weight."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank: for high ranks (arXiv 2312.03732)
    targets: tuple[Literal["attention", "mlp", "experts"], ...] = ("attention", "mlp", "experts")


class Sft(Section):
    """Supervised fine-tuning on chats, or on the worked solutions of tasks; only the assistant's tokens are learned."""

    sources: tuple[str, ...] = ()
    field: str | None = None  # of JSON lines and Parquet; None: messages, or ShareGPT's conversations
    tasks: tuple[TaskMix, ...] = ()
    documents: int = Field(0, ge=0)  # how many to generate from tasks, or to take at most from sources (0: all)
    processes: int = Field(2, ge=1)  # that tokenise
    sequence_length: int = Field(ge=8)  # of one conversation, at most
    too_long: Literal["cut", "drop"] = "cut"  # to sequence_length, or leave it out
    batch_size: int = Field(16, ge=1)  # conversations a step
    micro_batch_tokens: int = Field(8192, ge=1)  # at once; memory grows with it
    epochs: float = Field(1.0, gt=0)
    lr: float = Field(1e-5, gt=0)
    minimum_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_share: float = Field(0.05, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0)
    mtp_weight: float = Field(0.0, ge=0)
    balance_weight: float = Field(0.0, ge=0)
    bias_speed: float = Field(0.0, ge=0)
    recompute: bool = False
    lora: Lora | None = None
    validation_share: float = Field(0.05, ge=0, lt=0.5)  # of the conversations, held out; 0: none
    validation_documents: int = Field(200, ge=1)  # at most
    evaluate_every: int = Field(0, ge=0)  # steps between validations; 0: once an epoch
    samples: int = Field(2, ge=0)  # held-out questions whose replies are logged at the start and the end
    patience: int = Field(0, ge=0)  # validations without a better loss before it stops early and keeps the best; 0: never
    log_every: int = Field(1, ge=1)
    save_every: int = Field(0, ge=0)
    keep_last: int = Field(1, ge=1)
    bad_lines: int = Field(100, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Sft:
        if bool(self.sources) == bool(self.tasks):
            raise ValueError("sources: give either these or tasks")
        if self.tasks and not self.documents:
            raise ValueError("documents: say how many to generate from tasks")
        if self.micro_batch_tokens < self.sequence_length:
            raise ValueError(f"micro_batch_tokens: {self.micro_batch_tokens} is less than sequence_length {self.sequence_length}")
        if self.minimum_lr > self.lr:
            raise ValueError(f"minimum_lr: {self.minimum_lr} is more than lr {self.lr}")
        if self.patience and not self.validation_share:
            raise ValueError("patience: without validation_share there is no loss to wait for")
        if self.lora and self.bias_speed:
            raise ValueError("bias_speed: an adapter cannot hold router biases; leave it 0 with lora")
        return self


class Reward(Section):
    """One part of the reward, by name (jevons/tasks/reward.py), times its weight."""

    part: str = "correct"
    weight: float = 1.0
    from_step: NonNegativeInt = 0  # steps that are made without it first (k1.5: of length, R1's second stage: of preferences)
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _exists(self) -> Reward:
        make_part(self.part, self.options)
        return self


class Rl(Section):
    """Reinforcement learning on problems whose answers can be checked: GRPO as DeepSeek-R1 did it, its successors by flags."""

    tasks: tuple[TaskMix, ...]
    rewards: tuple[Reward, ...] = (Reward(),)
    steps: int = Field(ge=1)
    problems: int = Field(8, ge=1)  # a step; R1: 32
    group: int = Field(8, ge=2)  # samples a problem; R1: 16
    max_tokens: int = Field(256, ge=1)  # of a reply (all turns of it together)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_turns: int = Field(1, ge=1)  # of the assistant; more than one needs a task with tools

    # what is learned from them
    loss: Literal["grpo", "gspo", "cispo", "mirror"] = "grpo"
    advantage: Literal["grpo", "dr", "batch"] = "grpo"  # divided by the group's standard deviation, by nothing, by the batch's
    aggregation: Literal["sample", "token", "constant"] = "sample"  # GRPO: mean over samples of means over tokens; DAPO; Dr.GRPO
    clip_low: float | None = Field(None, gt=0)  # of ratios below 1; None: what is usual for the loss (train/policy.py), grpo 0.2, gspo 3e-4
    clip_high: float | None = Field(None, gt=0)  # above 1: grpo 0.2, DAPO 0.28, R1 10 both; gspo 4e-4; cispo 4
    two_sided: float | None = Field(None, gt=1)  # bound on the ratio where the advantage is negative (INTELLECT-2: 4)
    importance_cap: float | None = Field(None, gt=1)  # truncated importance sampling between sampler and trainer (2); None: off
    importance_mode: Literal["truncate", "mask"] = "truncate"
    sequence_mask: float | None = Field(None, gt=0)  # V3.2: drop samples of negative advantage that drifted further than this
    kl_weight: float = Field(0.0, ge=0)  # R1: 0.001
    kl: Literal["k3", "unbiased"] = "k3"
    reference_every: int = Field(0, ge=0)  # steps after which the reference becomes the policy (R1: 400); 0: never
    tau: float = Field(TAU, gt=0)  # of loss "mirror"
    replay_routes: bool = True  # the trainer uses the experts that the sampler chose, and the rows that its memory layers looked up
    updates: int = Field(1, ge=1)  # optimizer steps on each step's samples, which are split between them (R1: 16)

    # which problems
    no_signal: Literal["drop", "refill"] = "drop"  # groups whose rewards are all equal; refill: sample others instead (DAPO)
    refill_rounds: int = Field(4, ge=1)
    sampling: Literal["uniform", "prioritised", "curriculum"] = "uniform"
    pool: int = Field(0, ge=0)  # how many different problems to train on; 0: as many as the task has, or new ones for ever

    # optimizer
    lr: float = Field(1e-6, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0)
    mtp_weight: float = Field(0.0, ge=0)
    balance_weight: float = Field(0.0, ge=0)
    bias_speed: float = Field(0.0, ge=0)
    micro_batch_tokens: int = Field(16384, ge=1)  # at once in training
    cache_gb: float = Field(4.0, gt=0)  # of the sampler's keys and values, at most
    recompute: bool = False
    lora: Lora | None = None

    # around it
    verifier_seconds: float = Field(10.0, gt=0)
    verifier_failures: int = Field(100, ge=0)  # hangs and crashes of verifiers before the run stops
    evaluate_every: int = Field(0, ge=0)  # steps between measurements on held-out problems; 0: never
    evaluate_problems: int = Field(64, ge=1)
    sample_every: int = Field(10, ge=0)  # steps between logged replies; 0: never
    save_every: int = Field(20, ge=0)  # steps between checkpoints; 0: at the end only
    keep_last: int = Field(1, ge=1)
    dry_run: bool = True  # the longest rollouts and the fullest batch before step 0, to see whether the memory suffices

    @model_validator(mode="after")
    def _fits(self) -> Rl:
        if not self.tasks:
            raise ValueError("tasks: name at least one, as [[rl.tasks]]")
        if not self.rewards:
            raise ValueError("rewards: name at least one part, as [[rl.rewards]]")
        if not any(reward.weight and not reward.from_step for reward in self.rewards):
            raise ValueError("rewards: no part has a weight from the first step on, so nothing is learned there; give one")
        labels = [make_part(reward.part, reward.options)[0] for reward in self.rewards]
        if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
            raise ValueError(f"rewards: {twice[0]} is there twice; add up the weights")
        if late := [reward for reward in self.rewards if reward.from_step >= self.steps]:
            raise ValueError(f"rewards: {late[0].part} would count from step {late[0].from_step} on, the last is {self.steps - 1}")
        if self.temperature < 1e-5:
            raise ValueError("temperature: at 0 all samples of a group are the same, so nothing can be learned; 1.0 is usual")
        if self.top_k == 1:
            raise ValueError("top_k: at 1 all samples of a group are the same, so nothing can be learned; 0 leaves all tokens")
        if self.problems % self.updates:
            raise ValueError(f"updates: {self.updates} does not divide problems {self.problems}")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: must be less than steps {self.steps}, is {self.warmup_steps}")
        if self.lora and self.bias_speed:
            raise ValueError("bias_speed: an adapter cannot hold router biases; leave it 0 with lora")
        if self.reference_every and not self.kl_weight:
            raise ValueError("reference_every: without kl_weight there is no reference to renew; give kl_weight, or leave it 0")
        _ = self.objective  # which checks what the loss is made of
        if self.no_signal == "drop" and self.refill_rounds != 4:
            raise ValueError("refill_rounds: nothing is refilled with no_signal 'drop'; set that to 'refill', or leave it out")
        if self.loss == "mirror" and self.aggregation != "sample":
            raise ValueError("aggregation: mirror squares sums over whole samples, there is nothing to average; leave it out")
        if self.sampling != "uniform" and not self.pool:
            raise ValueError(f"pool: sampling {self.sampling!r} needs a fixed set of problems; say how many")
        return self

    @property
    def objective(self) -> Objective:
        return Objective(
            kind=self.loss,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            two_sided=self.two_sided,
            kl_weight=self.kl_weight,
            kl=self.kl,
            importance_cap=self.importance_cap,
            importance_mode=self.importance_mode,
            sequence_mask=self.sequence_mask,
            tau=self.tau,
        )


class Evaluate(Section):
    """Held-out problems of the tasks, answered and graded, and bits per byte on held-out text."""

    tasks: tuple[TaskMix, ...] = ()  # none: those of rl, sft or prepare
    problems: int = Field(200, ge=1)  # of each task, or all that it has
    samples: int = Field(1, ge=1)  # answers to each; more than one also give pass@k and majority@k
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(256, ge=1)  # of a reply (all turns of it together)
    max_turns: int | None = Field(None, ge=1)  # of the assistant; None: as in [rl], else 1
    concurrency: int = Field(64, ge=1)  # replies under way at once
    before_rl: bool = True  # also measure the model that [rl] began with
    examples: int = Field(8, ge=0)
    windows: int = Field(64, ge=1)  # of validation text

    @model_validator(mode="after")
    def _differ(self) -> Evaluate:
        if self.samples > 1 and self.temperature < 1e-5:
            raise ValueError(f"temperature: at 0 all {self.samples} samples of a problem are the same; give 0.6 or so, or samples = 1")
        return self


class Addition(Section):
    """Device-hours that a plan adds as they are stated: what no stage of the recipe describes."""

    name: str
    device_hours: float = Field(ge=0)
    note: str = ""  # where the figure is from


class Planning(Section):
    """What `jevons plan` takes where the command line says nothing and nothing was measured; no stage reads it."""

    on: str | None = None  # devices, as 8xH100; None: this machine
    share: float | None = Field(None, gt=0, le=1)  # of peak that training reaches; None: the planner's own default
    additions: tuple[Addition, ...] = ()
