"""Claims about sparse parameters: UltraMem's speed against experts, and how far a mixture reaches beyond what it computes.

The bytes that a step of decoding reads decide its time while batches are small, and they can be counted without any device: what
every token uses, plus the different experts, or rows of memory, that a batch of tokens chooses between them.
"""

from __future__ import annotations

import json
from typing import Any

from jevons.cost.arithmetic import distinct
from jevons.cost.claim import Claim, Table, cite, show
from jevons.cost.result import recorded
from jevons.cost.scaling import LEVERAGE, read_measured

# UltraMem's table 1: validation loss by the dense part's size, then the 1.6B models; MoE chooses 2 of 32 experts
MIXTURE_LOSS = {"151M": 2.63, "1.6B": 2.30}
ULTRAMEM_LOSS = {"151M": 2.67, "1.6B": 2.24}
MIXTURE, MIXTURE_FLOPS, EXPERTS, CHOSEN = 21.36e9, 3.52e9, 32, 2
ULTRAMEM, ULTRAMEM_FLOPS, WIDTH, PICKS, LAYERS = 21.41e9, 3.50e9, 1024, 84, 6  # a row is D / 2 wide; rows a token in each memory layer


def _mixture_read(batch: float) -> float:
    """Parameters that a step of the 1.6B mixture reads."""
    active = MIXTURE_FLOPS / 2
    expert = (MIXTURE - active) / (EXPERTS - CHOSEN)  # all layers' together
    return active + (distinct(CHOSEN * batch, EXPERTS) - CHOSEN) * expert if batch > 1 else active


def _ultramem_read(batch: float) -> float:
    """... and of the 1.6B UltraMem."""
    active = ULTRAMEM_FLOPS / 2
    rows = (ULTRAMEM - active) / WIDTH / LAYERS
    return active + LAYERS * distinct(PICKS * batch, round(rows)) * WIDTH


def ultramem_speed() -> Claim:
    batches = (1, 4, 16, 64, 256, 512, 8192, 131072)
    ratio = {batch: _mixture_read(batch) / _ultramem_read(batch) for batch in batches}
    rows = ((f"{b:,}", show(2 * _mixture_read(b), "B"), show(2 * _ultramem_read(b), "B"), f"{ratio[b]:.1f}x") for b in batches)
    return Claim(
        name="ultramem-speed",
        statement="UltraMem is 2 to 6 times as fast as MoE",
        source=(cite("tmtpost"), cite("ultramem", "figure 1, table 1")),
        method="weights that a decoding step reads, 1.6B models of table 1 in bf16: 2 of 32 experts against 84 rows in each of 6 layers, "
        "batch 64",
        published=(2, 6),
        ours=ratio[64],
        unit="x",
        bound=True,
        verdict="with a caveat",
        note="One step of decoding, 1.6B models on an A100, up to 6 times near batch 64, where weights alone allow "
        f"{show(ratio[64], 'x')}; attention's cache, which both read, takes the rest. At batch 1 there is nothing to gain "
        f"({ratio[1]:.1f}x), at {batches[-1]:,} tokens, as in training, nothing either ({ratio[batches[-1]]:.1f}x). Loss at equal size: "
        f"worse than the mixture's at 151M ({ULTRAMEM_LOSS['151M']} against {MIXTURE_LOSS['151M']}), better at 1.6B "
        f"({ULTRAMEM_LOSS['1.6B']} against {MIXTURE_LOSS['1.6B']}).",
        tables=(Table("Weights that a step reads, rows and experts chosen evenly", ("batch", "MoE", "UltraMem", "ratio"), tuple(rows)),),
    )


def ultramem_cost() -> Claim:
    return Claim(
        name="ultramem-cost",
        statement="UltraMem makes inference 83 % cheaper",
        source=(cite("tmtpost"),),
        method="1 - 1/6, the best of the speeds in ultramem-speed",
        published=83,
        ours=100 * (1 - 1 / 6),
        unit="%",
        verdict="with a caveat",
        note="The best point of a curve in other words: time of one step at the batch where the ratio is largest. A service that is busy "
        f"runs larger batches: at 8,192 tokens the bytes are {_mixture_read(8192) / _ultramem_read(8192):.1f} apart. Prompts, where "
        "products decide, gain nothing.",
    )


def ultramem_measured() -> Claim:
    return measured_speed(json.loads(path.read_text(encoding="utf-8")) if (path := recorded("sparse")) else {})


def measured_speed(results: dict[str, Any]) -> Claim:
    """The claim from what benchmarks/sparse.py wrote; an empty dictionary where it has not run."""
    found, learned = (results.get("ours", {}).get(part) for part in ("latency", "loss"))
    about: dict[str, Any] = {
        "name": "ultramem-measured",
        "statement": "... and how many times as fast in Jevons",
        "source": (cite("ultramem", "figure 1"), "docs/results/sparse.json"),
        "published": (2, 6),
        "unit": "x",
    }
    if not found:
        method = "python benchmarks/sparse.py --part latency --out docs/results"
        return Claim(**about, method=method, ours=None, verdict="not yet measured", note="No run is recorded here.")
    moe, memory = (found["models"][name] for name in ("moe", "memory"))
    ratio = {batch: float(times) for batch, times in found["ratio"].items()}
    best, worst = max(ratio, key=ratio.__getitem__), min(ratio, key=ratio.__getitem__)
    rows = tuple(
        (
            f"{int(batch):,}",
            *(f"{model['batches'][batch]['median']:.2f} ms" for model in (moe, memory)),
            f"{times:.2f}x",
            *(show(model["batches"][batch]["bytes"]["total"], "B") for model in (moe, memory)),
            f"{moe['batches'][batch]['bytes']['total'] / memory['batches'][batch]['bytes']['total']:.2f}x",
        )
        for batch, times in ratio.items()
    )
    size = show(moe["sparse_parameters"], "")
    reached = "" if ratio[best] >= about["published"][0] else ", short of the claim's range"
    note = f"{ratio[best]:.2f} times at batch {best}{reached}, {ratio[worst]:.2f} at {worst}; {size} sparse parameters in {found['dtype']} "
    note += f"on {found['device']}, {found['date']} ({found['command']})."
    if plain := found.get("ratio_through_torch"):  # where the mixture has no native kernels, which is no comparison of equals
        note += f" There the mixture ran through torch and memory natively; both through torch, {plain[best]:.2f} times."
    if learned:
        losses = {name: learned["models"][name] for name in ("moe", "memory")}
        tokens, time = (losses["memory"][f"loss_at_equal_{of}"] - losses["moe"][f"loss_at_equal_{of}"] for of in ("tokens", "time"))
        note += f" Loss in small, memory's less the mixture's: {tokens:+.3f} nats a token at equal tokens, {time:+.3f} at equal time "
        note += f"({learned['date']})."
    columns = ("batch", "MoE", "UltraMem", "faster", "MoE reads", "UltraMem reads", "fewer")
    return Claim(
        **about,
        method="median time of a decoding step, mixture over memory, equal parameters and FLOPs a token, the best of its batches",
        ours=ratio[best],
        verdict="measured",
        note=note,
        tables=(Table("A step of decoding, one token a sequence", columns, rows),),
    )


def doubao_leverage() -> Claim:
    public = [evidence for evidence in LEVERAGE if evidence.flops]
    low, high = (f(evidence.leverage for evidence in public) for f in (min, max))
    rows = [(evidence.source, f"{evidence.leverage:.1f}x") for evidence in public]
    note = "Neither size, loss nor data of Doubao are public. Published comparisons with dense models reach "
    note += f"{low:.1f} to {high:.1f} times what is activated, so 7 is high and not impossible; that takes fine experts and long training."
    if (path := recorded("sparse")) and (ours := read_measured(path)):
        at = show(ours.flops, "FLOP")
        rows.append((f"Jevons, benchmarks/sparse.py, {ours.date}, {at} of training in all", f"{ours.leverage.middle:.2f}x"))
        note += f" In small, at {at}, it was {ours.leverage.middle:.2f} here."
    return Claim(
        name="doubao-leverage",
        statement="Doubao 1.5 equals dense models 7x as large",
        source=(cite("tmtpost"), cite("doubao")),
        method="nearest public figures: size of the dense model with a mixture's results / what the mixture activates (cost/scaling.py)",
        published=7,
        ours=(low, high),
        unit="x",
        verdict="not verifiable",
        note=note,
        tables=(Table("A mixture's dense equal over what it activates", ("measured by", "lever"), tuple(rows)),),
    )


def doubao_price() -> Claim:
    return Claim(
        name="doubao-price",
        statement="Doubao runs 85 % below the industry's cost",
        source=(cite("sina"), cite("tmtpost")),
        method="nothing to compute from: no size, no method, no average is public",
        published=85,
        ours=None,
        unit="%",
        verdict="not verifiable",
        note="A sentence of marketing. The industry's average is not named, and what Doubao computes for a token is not known.",
    )
