"""Plans of stages from what was measured: for `jevons plan` (no torch) and for a stage that begins, so that both say the same.

    entry = measured(recipe, "pretrain", config, profile)          None: `reason` says why
    plan = forecast(recipe, "pretrain", config, entry)             tokens, FLOPs, seconds, money, memory
    drift(recipe, "evaluate", entry)                               what it still assumes, in words

Seconds of a stage are those of its parts times how often the recipe has them: start, steps, measurements on held-out data, samples,
checkpoints, end. What a calibration depends on is in `shape`: every option of the section but those that only say how often, and what it
learns from. So a plan follows the recipe when steps or intervals change, and is not made where anything else did.

What can drift: the length of answers (the plan has that of the first steps, or of a model of before), and the share of groups that agree,
so teach nothing: it is counted in what a calibration samples of the run's own first steps, and changes as a model learns. Speed does not
depend on what a model has learned, so fine-tuning and evaluation are planned before their model is there: from new weights of its shape,
answers then as long as assumed. Not done: reinforcement learning whose model another stage has yet to make; fine-tuning that stops early.
"""

from __future__ import annotations

from math import ceil

from jevons.cost.arithmetic import cache_bytes_per_token, forward_flops, prefill_flops, train_flops
from jevons.cost.profile import Entry, Profile, Shape
from jevons.cost.receipt import Plan
from jevons.cost.training import adapter_flops
from jevons.model.config import ModelConfig
from jevons.recipe import Recipe
from jevons.section import Pretrain, Rl, Sft

KIND = {"pretrain": "train", "sft": "sft", "rl": "rl", "evaluate": "evaluate"}
ANSWER = 0.5  # of max_tokens, where nobody knows how long answers will be
# what changes how often something is done, or numbers that a step's time and memory do not depend on
OFTEN = {"log_every", "evaluate_every", "sample_every", "save_every", "keep_last", "steps"}
RATES = {"lr", "minimum_lr", "schedule", "warmup_steps", "decay_steps", "betas", "weight_decay", "clip", "bias_speed"}
RATES |= {"memory_lr", "memory_lr_share"}
DATA = {"sources", "field", "tasks", "tokenizer", "loss_on"}  # of [prepare]
# of [sft]: how many chats, how often they are read, and what is shown of them
CHATS = {"documents", "epochs", "warmup_share", "validation_share", "validation_documents", "bad_lines"}


def shape(recipe: Recipe, stage: str) -> Shape:
    """What a measurement of this stage holds for; JSON."""
    section = getattr(recipe, stage)
    often = OFTEN | RATES | (CHATS if stage == "sft" else {"before_rl", "examples"} if stage == "evaluate" else set())
    out: Shape = {"stage": stage, "dtype": recipe.dtype, **section.model_dump(mode="json", exclude=often)}
    if stage == "pretrain":
        assert recipe.prepare is not None
        out["data"] = recipe.prepare.model_dump(mode="json", include=DATA)
    if stage == "evaluate":
        out["tasks"] = [mix.model_dump(mode="json") for mix in recipe.task_mixes]
        out["max_turns"] = turns(recipe)
        out["text"] = recipe.pretrain.sequence_length if recipe.prepare and recipe.pretrain else 0
    return out


def turns(recipe: Recipe) -> int:
    """Of the assistant in an answer to the evaluation, where its task has tools."""
    assert recipe.evaluate is not None
    return recipe.evaluate.max_turns or (recipe.rl.max_turns if recipe.rl else 1)


def held_out_count(options: Sft, documents: int) -> int:
    """How many of so many chats are held out."""
    share = options.validation_share
    return min(options.validation_documents, max(1, round(documents * share))) if share else 0


def reads(chats: int, options: Sft) -> int:
    """How many conversations are read, all epochs together: the last step takes what is left of them."""
    return max(1, round(chats * options.epochs))


def validates(chats: int, options: Sft, step: int) -> bool:
    """Whether the validation loss is due after so many steps: every so many, else after the step in which an epoch ends."""
    if options.evaluate_every:
        return step % options.evaluate_every == 0
    return step * options.batch_size // chats > (step - 1) * options.batch_size // chats


def measured(recipe: Recipe, stage: str, config: ModelConfig, profile: Profile | None) -> Entry | None:
    """What was measured of a stage of this recipe, if anything was that still holds."""
    if profile is None or stage not in KIND:
        return None
    return profile.find(KIND[stage], config, **shape(recipe, stage))


def reason(recipe: Recipe, stage: str, config: ModelConfig, profile: Profile | None) -> str:
    """Why `measured` has nothing, in words."""
    if profile is None:
        return f"nothing was measured on this device; `jevons plan {recipe.name} --calibrate` does it"
    return profile.missing(KIND[stage], config, **shape(recipe, stage)) if stage in KIND else f"{stage} is not calibrated"


def forecast(recipe: Recipe, stage: str, config: ModelConfig, entry: Entry, carried: int = 0) -> Plan:
    """What a stage takes by what was measured of it, in a process of its own; `carried` bytes are there already from stages before."""
    if stage == "pretrain":
        assert recipe.pretrain is not None
        tokens, flops, seconds = _pretrain(recipe.pretrain, config, entry.rates)
    elif stage == "sft":
        assert recipe.sft is not None
        tokens, flops, seconds = _sft(recipe.sft, config, entry.rates)
    elif stage == "rl":
        assert recipe.rl is not None
        tokens, flops, seconds = _rl(recipe.rl, config, entry.rates)
    else:
        tokens, flops, seconds = _evaluate(recipe, config, entry.rates)
    return Plan(tokens, flops, seconds, seconds / 3600 * recipe.price_per_hour, memory=round(entry.rates["memory"]) + carried)


def drift(recipe: Recipe, stage: str, entry: Entry) -> str:
    """What a plan from a measurement still assumes; empty where it assumes nothing that is not always so."""
    if stage == "evaluate" and entry.rates["untrained"]:
        return f"evaluate: answers of {entry.rates['answer']:,.0f} tokens, half of evaluate.max_tokens; its model is not trained yet"
    if stage == "rl" and recipe.rl is not None:
        rates, share = entry.rates, silent_share(entry.rates)
        becomes = "are replaced" if recipe.rl.no_signal == "refill" else "are not trained on"
        becomes = "are trained on all the same" if trains_all(recipe.rl) else becomes
        seen = f"{rates['silent']:,.0f} of {rates['groups']:,.0f} did"
        return f"rl: {share:.0%} of groups agree and {becomes} ({seen}), answers of {rates['answer']:,.0f} tokens; both change as it learns"
    if stage == "sft" and recipe.sft is not None and recipe.sft.patience:
        return "sft: all of its steps, though sft.patience may end it early"
    return ""


def serving(config: ModelConfig, entry: Entry, requests: int, price_per_hour: float) -> Plan:
    """What `jevons serve` takes for so many requests of the traffic that was measured (kind "serve"); tokens are those generated.

    Clients that each wait for their answer go in waves, and the last one may not be full. The cache's memory is touched as it is used,
    so it grows with the requests up to the whole cache.
    """
    traffic, rates = entry.shape, entry.rates
    prompt, output, clients = traffic["prompt"], traffic["output"], traffic["clients"]
    seconds = rates["start"] + -(-requests // clients) * rates["wave"]
    context = prompt + output
    flops = prefill_flops(config, prompt) + output * forward_flops(config, prompt + output / 2)
    per_token = cache_bytes_per_token(config, rates["scalar"])
    before, after = (min(n * context * per_token, rates["cache"]) for n in (rates["requests"], requests))
    memory = round(rates["memory"] + max(after - before, 0.0))
    return Plan(requests * output, requests * flops, seconds, seconds / 3600 * price_per_hour, memory)


def token_flops(config: ModelConfig, options: Sft | Rl, length: float) -> float:
    """Training FLOPs of a token in sequences of this length, under adapters where the section has them."""
    mtp = bool(options.mtp_weight) and config.num_nextn_predict_layers > 0
    if lora := options.lora:
        return adapter_flops(config, length, lora.rank, lora.targets, mtp=mtp)
    return train_flops(config, length, mtp=mtp)


def times(every: int, steps: int, *, last: bool = True) -> int:
    """How often something comes that is due every so many steps (0: never), and after the last one."""
    due = steps // every if every else 0
    return due + (last and not (every and steps % every == 0))


def _pretrain(options: Pretrain, config: ModelConfig, rates: dict[str, float]) -> tuple[int, float, float]:
    steps = options.steps
    tokens = steps * options.batch_size * options.sequence_length
    mtp = bool(options.mtp_weight) and config.num_nextn_predict_layers > 0
    seconds = rates["start"] + steps * rates["step"] + rates["finish"]
    seconds += (1 + times(options.evaluate_every, steps)) * rates["validation"]
    seconds += times(options.sample_every, steps) * rates["sample"] + times(options.save_every, steps) * rates["checkpoint"]
    return tokens, tokens * train_flops(config, options.sequence_length, mtp=mtp), seconds


def _sft(options: Sft, config: ModelConfig, rates: dict[str, float]) -> tuple[int, float, float]:
    documents = options.documents or round(rates["documents"])
    kept = round(documents * rates["kept"])
    held = held_out_count(options, documents if options.tasks else kept)
    chats = kept if options.tasks else kept - held  # tasks have problems of their own to hold out
    count = reads(chats, options)
    steps = ceil(count / options.batch_size)
    written = documents + (held if options.tasks else 0)
    seconds = rates["start"] + written * rates["tokenise"] + steps * rates["step"] + rates["finish"]
    validations = 1 + sum(step == steps or validates(chats, options, step) for step in range(1, steps + 1))
    seconds += validations * held * rates["validation"]
    seconds += 2 * rates["sample"] + times(options.save_every, steps) * rates["checkpoint"]
    tokens = round(count * rates["length"])
    return tokens, tokens * token_flops(config, options, rates["length"]), seconds


def _evaluate(recipe: Recipe, config: ModelConfig, rates: dict[str, float]) -> tuple[int, float, float]:
    """The model before reinforcement learning sits the same exam; held-out text is read once."""
    options = recipe.evaluate
    assert options is not None
    rounds = 2 if recipe.rl is not None and options.before_rl and rates["drawn"] else 1
    seconds = rounds * (rates["start"] + rates["answers"] + rates["grading"]) + rates["text"]
    context = rates["prompt"] + rates["answer"] / 2
    flops = rates["read"] * forward_flops(config, rates["prompt"] / 2, head=False) + rates["drawn"] * forward_flops(config, context)
    return round(rounds * rates["drawn"]), rounds * flops + text_flops(recipe, config), seconds


def text_flops(recipe: Recipe, config: ModelConfig) -> float:
    """Of the held-out text that the evaluation reads, where the recipe has any."""
    if recipe.evaluate is None or recipe.prepare is None or recipe.pretrain is None:
        return 0.0
    length = recipe.pretrain.sequence_length
    return recipe.evaluate.windows * length * forward_flops(config, length / 2)


def trains_all(options: Rl) -> bool:
    """Whether groups without a signal are trained on, too: a pull to the reference needs none, nor does mirror descent's to the policy that
    sampled, once an update has left that."""
    return options.no_signal == "drop" and bool(options.kl_weight or (options.loss == "mirror" and options.updates > 1))


def silent_share(rates: dict[str, float]) -> float:
    """Of groups, how many will all agree: by Laplace's rule, since a few that all teach do not mean that all will."""
    return (rates["silent"] + 1) / (rates["groups"] + 2)


def group_counts(options: Rl, silent: float) -> tuple[float, float, float]:
    """Groups that a step samples, groups that it trains on, and the share of steps that train, where groups agree with that probability."""
    rounds = options.refill_rounds if options.no_signal == "refill" else 1
    sampled = options.problems * sum(silent**i for i in range(rounds))  # each round replaces those that agreed in the one before
    if trains_all(options):
        return sampled, sampled, 1.0
    return sampled, sampled * (1 - silent), 1 - silent ** (options.problems * rounds)


def _rl(options: Rl, config: ModelConfig, rates: dict[str, float]) -> tuple[int, float, float]:
    steps, evaluated, shown = options.steps, options.evaluate_every > 0, options.sample_every > 0
    sampled, taught, training = group_counts(options, silent_share(rates))
    step = sampled * (rates["rollout"] + rates["grading"]) + taught * rates["training"] + training * rates["update"]
    seconds = rates["start"] + steps * step + rates["finish"]
    seconds += (evaluated + times(options.evaluate_every, steps, last=evaluated)) * rates["held_out"]
    seconds += times(options.sample_every, steps, last=shown) * rates["sample"] + times(options.save_every, steps) * rates["checkpoint"]
    context = rates["prompt"] + rates["answer"]
    flops = sampled * (rates["drawn"] + rates["read"]) * forward_flops(config, context / 2)
    flops += taught * rates["trained"] * token_flops(config, options, context)
    return round(steps * sampled * rates["drawn"]), steps * flops, seconds
