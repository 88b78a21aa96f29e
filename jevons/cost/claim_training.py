"""Claims about what training took: hours from FLOPs and the published share of peak, money from hours and the published rent.

The story's cheapest trick is to quote a last step for the whole way. What each figure leaves out stands beside it.
"""

from __future__ import annotations

from jevons.cost.arithmetic import train_flops
from jevons.cost.claim import Claim, Table, cite, percent, show
from jevons.cost.hardware import Hardware
from jevons.cost.published import published
from jevons.cost.training import training_hours

# DeepSeek-V3's report, tables 1 and section 4; the share from arXiv 2505.09343, table 4 (385 TFLOPS of an H800's 989.5, causal)
V3_TOKENS = 14.8e12
V3_SHARE = 0.3894
V3_HOURS = {"pretraining": 2664e3, "context extension": 119e3, "post-training": 5e3}
V3_DEVICES = 2048
RENT = 2.0  # dollars an H800-hour, as all of DeepSeek's own figures assume
EXTENSION = {32768: 1000 * 1920, 131072: 1000 * 480}  # length: sequences (1,000 steps each), section 4.3
R1_HOURS = {"R1-Zero": 101e3, "data for fine-tuning": 5e3, "R1": 41e3}  # R1's supplement


def _peak(device: str) -> float:
    return Hardware.load().device(device).peak["bf16"]


def _v3_hours() -> dict[str, float]:
    """H800-hours by stage: from FLOPs where tokens are published, else as published."""
    config, peak = published("deepseek-v3"), _peak("H800")
    flops = {"pretraining": V3_TOKENS * train_flops(config, 4096, mtp=False)}
    flops["context extension"] = sum(length * count * train_flops(config, length, mtp=False) for length, count in EXTENSION.items())
    return V3_HOURS | {stage: training_hours(amount, peak, V3_SHARE) for stage, amount in flops.items()}


def v3_hours() -> Claim:
    hours, total = _v3_hours(), sum(V3_HOURS.values())
    extension = hours["context extension"] / V3_HOURS["context extension"]
    computed = {stage: "as published" if hours[stage] == value else show(hours[stage], "h") for stage, value in V3_HOURS.items()}
    rows = [(stage, show(value, "h"), computed[stage]) for stage, value in V3_HOURS.items()]
    rows.append(("all", show(total, "h"), show(sum(hours.values()), "h")))
    return Claim(
        name="v3-hours",
        statement="V3 was trained in 2.788M H800-hours",
        source=(cite("v3", "table 1"), cite("isca", "table 4")),
        method=f"14.8T tokens x FLOPs a token / ({100 * V3_SHARE:.2f} % of 989.5 TFLOPS), two phases of context extension in the same way",
        published=total,
        ours=sum(hours.values()),
        unit="h",
        tolerance=0.03,
        verdict="confirmed",
        note=f"Pretraining comes out at {100 * hours['pretraining'] / V3_HOURS['pretraining']:.1f} % of what was published. Context "
        f"extension at {percent(extension)}: long sequences reached that share of the usual speed, or the phases took more than their "
        "tokens. Post-training's 5K hours are taken as published, its tokens are not public. The share of peak is DeepSeek's own figure: "
        "what is confirmed is that tokens, FLOPs, speed and hours fit together, not that somebody else counted them.",
        tables=(Table("H800-hours", ("stage", "published", "from FLOPs"), tuple(rows)),),
    )


def v3_cost() -> Claim:
    hours = sum(_v3_hours().values())
    h100 = Hardware.load().device("H100").on_demand
    assert h100 is not None
    rows = [(f"at ${price:.2f} an hour", show(hours * price, "$")) for price in (RENT, h100, 4.0)]
    return Claim(
        name="v3-cost",
        statement="V3 cost $5.6M to train",
        source=(cite("yicai"), cite("v3", "table 1: $5.576M")),
        method="our hours of v3-hours x $2, the rent that the report assumes",
        published=5.576e6,
        ours=hours * RENT,
        unit="$",
        tolerance=0.03,
        verdict="with a caveat",
        note="The last run only, at an assumed rent, and the report says so. Not in it: earlier research, ablations and failed runs, "
        "data, people, the R1 model whose answers it was fine-tuned on, and the machines, which DeepSeek bought.",
        tables=(Table("The same hours at other rents (the second is today's of an H100 on demand)", ("rent", "money"), tuple(rows)),),
    )


def v3_trillion() -> Claim:
    flops = 1e12 * train_flops(published("deepseek-v3"), 4096, mtp=False)
    hours = training_hours(flops, _peak("H800"), V3_SHARE)
    days = training_hours(flops, _peak("H800"), V3_SHARE, V3_DEVICES) / 24
    return Claim(
        name="v3-trillion",
        statement="A trillion tokens take 180K H800-hours",
        source=(cite("v3", "section 1"),),
        method=f"1e12 x FLOPs a token / ({100 * V3_SHARE:.2f} % of 989.5 TFLOPS)",
        published=180e3,
        ours=hours,
        unit="h",
        tolerance=0.02,
        verdict="confirmed",
        note=f"On {V3_DEVICES:,} devices {days:.1f} days; published are 3.7.",
    )


def v2_training() -> Claim:
    shown = {"deepseek-67b": 300.6e3, "deepseek-v2": 172.8e3}  # H800-hours a trillion tokens
    peak = _peak("H800")
    flops = {name: train_flops(published(name), 4096) for name in shown}
    shares = {name: 1e12 * flops[name] / (hours * 3600 * peak) for name, hours in shown.items()}
    saved = 1 - shown["deepseek-v2"] / shown["deepseek-67b"]
    rows = tuple((name, show(flops[name], "FLOP"), show(hours, "h"), percent(shares[name])) for name, hours in shown.items())
    return Claim(
        name="v2-training",
        statement="Experts save 42.5 % of training's cost",
        source=(cite("v2", "section 3.2.3"),),
        method="H800-hours a trillion tokens, V2 against DeepSeek 67B, both as measured by DeepSeek; FLOPs from config.json",
        published=42.5,
        ours=100 * saved,
        unit="%",
        verdict="with a caveat",
        note=f"In hours. In FLOPs V2 saves {percent(1 - flops['deepseek-v2'] / flops['deepseek-67b'])}: a third of what sparsity saved "
        f"was lost again, to {percent(shares['deepseek-v2'])} of peak where the dense model reached {percent(shares['deepseek-67b'])}. "
        f"V3's share is back at {percent(V3_SHARE)}.",
        tables=(Table("One trillion tokens", ("model", "FLOPs a token", "H800-hours", "of peak"), rows),),
    )


def v3_chips() -> Claim:
    hardware = Hardware.load()
    weak, strong = hardware.device("H800"), hardware.device("H100")
    assert weak.link and strong.link
    columns = ("", "H800", "H100")
    rows = (
        ("bf16 products", show(weak.peak["bf16"], "FLOPS"), show(strong.peak["bf16"], "FLOPS")),
        ("memory", show(weak.memory, "B"), show(strong.memory, "B")),
        ("memory's bandwidth", show(weak.bandwidth, "B/s"), show(strong.bandwidth, "B/s")),
        ("NVLink, one direction", show(weak.link, "B/s"), show(strong.link, "B/s")),
    )
    return Claim(
        name="v3-chips",
        statement="V3's chips were less advanced (NVLink)",
        source=(cite("yicai"),),
        method="the H800's data sheet against the H100's (cost/hardware.toml), NVLink as the figure",
        published=None,
        ours=100 * weak.link / strong.link,
        unit="%",
        verdict="with a caveat",
        note=f"The H800 multiplies as fast as the H100 ({percent(weak.peak['bf16'] / strong.peak['bf16'])}) and has "
        f"{percent(weak.link / strong.link)} of its NVLink. What had to be made good was communication between devices, and that is what "
        "the report's engineering is about.",
        tables=(Table("Two devices", columns, rows),),
    )


def r1_cost() -> Claim:
    hours = sum(R1_HOURS.values())
    base = sum(V3_HOURS.values())
    rows = [(stage, show(value, "h"), show(value * RENT, "$")) for stage, value in R1_HOURS.items()]
    rows.append(("V3, which it starts from", show(base, "h"), show(base * RENT, "$")))
    rows.append(("both", show(base + hours, "h"), show((base + hours) * RENT, "$")))
    return Claim(
        name="r1-cost",
        statement="R1 cost $294K",
        source=(cite("r1"),),
        method="H800-hours of its three parts x $2",
        published=294e3,
        ours=hours * RENT,
        unit="$",
        tolerance=0.005,
        verdict="with a caveat",
        note=f"On top of V3: with the base it is {show((base + hours) * RENT, '$')}. 512 devices for 198 and 80 hours give "
        f"{show((512 * (198 + 80) + R1_HOURS['data for fine-tuning']) * RENT, '$')}. Experiments before the last run are not in it either.",
        tables=(Table("H800-hours and money", ("part", "hours", "money"), tuple(rows)),),
    )


def s1_cost() -> Claim:
    hours = 26 / 60 * 16
    peak, config = _peak("H100"), published("qwen2.5-32b")
    tuned, base = 5 * 4.7e6 * train_flops(config, 4700), 18e12 * train_flops(config, 4096)
    share = tuned / (hours * 3600 * peak)
    base_hours = training_hours(base, peak, 0.4)
    rows = tuple((f"${price:.2f}", f"${hours * price:.2f}") for price in (2.0, 2.5, 7.0))
    return Claim(
        name="s1-cost",
        statement="s1 was trained for $50",
        source=(cite("tmtpost"), cite("s1", "section 4.1: 26 minutes on 16 H100")),
        method=f"26 minutes x 16 H100 = {hours:.2f} hours, at rents of $2 to $7",
        published=50,
        ours=hours * 7,
        unit="$",
        tolerance=0.05,
        verdict="with a caveat",
        note=f"$50 needs ${50 / hours:.2f} an hour, a large cloud's list price; at $2 it is ${hours * 2:.2f}. What was paid for is five "
        f"passes over 1,000 answers ({show(tuned, 'FLOP')}, {percent(share)} of peak). Not in it: the answers, which came from Gemini, "
        f"and Qwen2.5-32B, whose 18T tokens are {base / tuned:,.0f} times the FLOPs: {show(base_hours, 'H100-hours')} at 40 % of peak, "
        f"{show(base_hours * RENT, '$')} at $2.",
        tables=(Table(f"{hours:.2f} H100-hours", ("rent an hour", "money"), rows),),
    )


def tenth() -> Claim:
    config, peak = published("llama-3.1-405b"), _peak("H100")
    dense = 30.84e6  # H100-hours, model card
    computed = training_hours(15.6e12 * train_flops(config, 8192), peak, 0.38)
    v3 = sum(V3_HOURS.values())
    return Claim(
        name="tenth",
        statement="R1's level at a tenth of the cost",
        source=(cite("tmtpost"), cite("llama", "30.84M H100-hours for the 405B")),
        method="H100-hours of Llama 3.1 405B / H800-hours of V3, both as published; the first checked by FLOPs at 38 % of peak",
        published=10,
        ours=dense / v3,
        unit="x",
        verdict="not verifiable",
        note="The cost of o1, with which R1 is compared, is not public. A pair that is: the open dense model of its time took "
        f"{dense / v3:.1f} times V3's hours ({show(computed, 'h')} from its FLOPs alone). By price a token the ratio is another one, see "
        "o1-price.",
    )
