"""Claims about what serving V3 and R1 took: the day that DeepSeek published, against itself, a roofline, and prices.

One day of both models, 27 February 2025 04:00 UTC to the next (open-infra-index, day 6): tokens, nodes, speeds, the revenue that
R1's prices would have brought. The figures check each other, and the hardware's data sheet bounds them.
"""

from __future__ import annotations

from datetime import date

from jevons.cost.arithmetic import cache_bytes_per_token
from jevons.cost.claim import Claim, Table, cite, percent, show
from jevons.cost.claim_training import RENT
from jevons.cost.comparison import Traffic, bills, margin
from jevons.cost.deployment import FORMATS, Deployment, Layout
from jevons.cost.hardware import Hardware
from jevons.cost.price import Prices
from jevons.cost.published import published
from jevons.cost.serving import node_hours, price_per_million

INPUT, CACHED, OUTPUT = 608_000_000_000, 342_000_000_000, 168_000_000_000  # tokens of the day
NODES, PER_NODE = 226.75, 8
PREFILL_RATE, DECODE_RATE = 73.7e3, 14.8e3  # tokens/s of a node; prompts' cached tokens are counted
SPEED = 21  # tokens/s of one answer, published as 20 to 22
CONTEXT = 4989  # mean cached tokens of a generated one
TRAFFIC = Traffic(INPUT, CACHED, OUTPUT)
# days of other prices: V3's promotion, both models at their list prices, R1 with the discount at night that had begun the evening before
PROMOTIONAL, LISTED, DISCOUNTED = date(2025, 2, 1), date(2025, 2, 20), date(2025, 2, 27)
COST = NODES * 24 * PER_NODE * RENT


def _prompt() -> int:
    """Mean tokens of a prompt: prompt + answer / 2 = CONTEXT, and the two are as INPUT to OUTPUT."""
    return round(CONTEXT / (1 + OUTPUT / INPUT / 2))


def _v3(devices: int) -> Deployment:
    """V3 as DeepSeek lays it out: attention copied, experts dealt out over as many H800."""
    return Deployment(published("deepseek-v3"), Hardware.load().device("H800"), Layout(data=devices, expert=devices), FORMATS["fp8"])


def revenue(model: str, day: date) -> float:
    """Dollars for the day's tokens at a model's prices of that date, hour by hour."""
    return next(bill.dollars for bill in bills(TRAFFIC, Prices.load(), day) if bill.model == model)


def prefill_rate() -> Claim:
    deployment, prompt = _v3(32), _prompt()
    cached = round(prompt * CACHED / INPUT)
    step = deployment.prefill(prompt, cached)
    computed = PREFILL_RATE * (1 - CACHED / INPUT) / PER_NODE
    most = step.tokens / step.roofline / deployment.layout.devices * PER_NODE / (1 - CACHED / INPUT)
    flops = computed * step.flops * deployment.layout.devices / step.tokens
    return Claim(
        name="prefill-rate",
        statement="A node reads 73.7K tokens/s of prompts",
        source=(cite("day"),),
        method=f"roofline of V3 on 32 H800 (4 nodes), fp8 weights, bf16 peak, prompts of {prompt:,} tokens with {cached:,} cached",
        published=PREFILL_RATE,
        ours=most,
        unit="/s",
        bound=True,
        verdict="with a caveat",
        note=f"{percent(1 - CACHED / INPUT)} of them are computed: {computed:,.0f} a second and device, {show(flops, 'FLOPS')} or "
        f"{percent(PREFILL_RATE / most)} of what bf16 products allow; theirs in fp8 may go faster. Possible, and in the range of their "
        "training. Not reproduced: that takes 32 such devices.",
    )


def decode_rate() -> Claim:
    deployment, context = _v3(144), CONTEXT
    each = round(DECODE_RATE / PER_NODE / SPEED)
    step = deployment.decode(each * deployment.layout.devices, context)
    most = step.tokens / step.roofline / deployment.layout.devices * PER_NODE
    cache = each * context * cache_bytes_per_token(deployment.config)
    rows = (
        ("weights on a device", show(deployment.weights, "B")),
        (f"cache of {each} sequences of {context:,} tokens", show(cache, "B")),
        ("a step waits for memory", f"{1e3 * step.memory:.1f} ms"),
        ("... for products, at bf16's peak", f"{1e3 * step.compute:.1f} ms"),
        ("... for tokens on their way to experts", f"{1e3 * step.communication:.1f} ms"),
        (f"seen, at {SPEED} tokens/s an answer", f"{1e3 / SPEED:.1f} ms"),
    )
    return Claim(
        name="decode-rate",
        statement="A node writes 14.8K tokens/s",
        source=(cite("day"),),
        method=f"roofline of V3 on 144 H800 (18 nodes), fp8 weights, {each} answers a device (14.8K / 8 / {SPEED}), {context:,} tokens of "
        "context",
        published=DECODE_RATE,
        ours=most,
        unit="/s",
        bound=True,
        verdict="with a caveat",
        note=f"{percent(DECODE_RATE / most)} of what the {step.bound} allows. Possible. Not reproduced: that takes 144 such devices.",
        tables=(Table("One step of decoding", ("on each device", ""), rows),),
    )


def day_cost() -> Claim:
    hours = node_hours(INPUT, OUTPUT, PREFILL_RATE, DECODE_RATE)
    node = PER_NODE * RENT
    reading, writing = price_per_million(node, PREFILL_RATE), price_per_million(node, DECODE_RATE)
    return Claim(
        name="day-cost",
        statement="Serving all users costs $87,072 a day",
        source=(cite("day"),),
        method="tokens of the day / tokens/s of a node x 8 devices x $2; published from 226.75 nodes over 24 hours",
        published=87_072,
        ours=hours * node,
        unit="$",
        tolerance=0.005,
        verdict="confirmed",
        note=f"The speeds and the nodes are published separately and agree: {hours:,.1f} node-hours against {NODES * 24:,.0f}. At $2 a "
        f"device; a million tokens read cost {reading * 100:.1f} cents (cached ones counted), a million written {writing * 100:.1f}.",
    )


def day_margin() -> Claim:
    full, discounted = (revenue("deepseek-reasoner", day) for day in (LISTED, DISCOUNTED))
    at = {
        "R1": full,
        "R1, with the night's discount": discounted,
        "V3, from 8 February 2025": revenue("deepseek-chat", LISTED),
        "V3, promotional, until then": revenue("deepseek-chat", PROMOTIONAL),
    }
    rows = tuple((name, show(money, "$"), percent(margin(money, COST)), percent(1 - COST / money)) for name, money in at.items())
    return Claim(
        name="day-margin",
        statement="Serving earns 545 % on its cost",
        source=(cite("day"),),
        method="the day's tokens at R1's prices (cost/prices.toml) / $87,072 - 1",
        published=545,
        ours=100 * margin(full, COST),
        unit="%",
        verdict="with a caveat",
        note="If everything had been sold at R1's full price, and DeepSeek says that it was not: the web page and the app are free, V3 "
        f"is cheaper, nights are discounted (with that alone {percent(margin(discounted, COST))}, tokens spread evenly). It is profit "
        f"over cost; as a margin of revenue it is {percent(1 - COST / full)}.",
        tables=(Table(f"The day's tokens, against {show(COST, '$')} of cost", ("prices of", "revenue", "over cost", "of revenue"), rows),),
    )


def margin_promotional() -> Claim:
    money = revenue("deepseek-chat", PROMOTIONAL)
    return Claim(
        name="margin-promotional",
        statement="V3 can be sold at its first prices ($0.28)",
        source=(cite("sina", "1.4 cents"), cite("day")),
        method="the day's tokens at V3's promotional prices / $87,072 - 1; 0 % is break-even",
        published=None,
        ours=100 * margin(money, COST),
        unit="%",
        verdict="with a caveat",
        note=f"{show(money, '$')} a day against {show(COST, '$')}: the prices that made the story famous just paid for the devices at "
        "full use, at $2 an hour, and for nothing else. They ended on 8 February 2025.",
    )


def margin_list() -> Claim:
    money = revenue("deepseek-chat", LISTED)
    return Claim(
        name="margin-list",
        statement="... and at its list prices ($1.10)",
        source=(cite("day"), cite("prices")),
        method="the day's tokens at V3's prices from 8 February 2025 / $87,072 - 1",
        published=None,
        ours=100 * margin(money, COST),
        unit="%",
        verdict="with a caveat",
        note=f"{show(money, '$')} a day. It pays as long as devices are busy: the day's mean was {NODES:g} nodes where its peak was 278, "
        "and nodes not needed at night went to research.",
    )
