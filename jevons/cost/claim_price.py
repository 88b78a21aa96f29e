"""Claims about prices: like against like, from the dated table, where the story compared a cached prompt with a written answer."""

from __future__ import annotations

from datetime import UTC, date, datetime, time

from jevons.cost.claim import Claim, Table, cite, percent, show
from jevons.cost.claim_serving import LISTED, revenue
from jevons.cost.price import Prices, Tariff

STORY = date(2025, 2, 7)  # when the articles were being written: V3 still at its promotional prices
KINDS = {"output": "output", "prompt": "miss", "cached prompt": "hit"}  # as people call a tariff's fields
META = 2.80  # dollars a million tokens, as the article has it


def _prices(*models: str, day: date = STORY) -> list[Tariff]:
    table = Prices.load()
    return [table.at(model, datetime.combine(day, time(), UTC).timestamp()) for model in models]


def meta_price() -> Claim:
    (first,), (later,) = _prices("deepseek-chat"), _prices("deepseek-chat", day=LISTED)
    rows = (
        ("cached prompt, promotional", f"${first.hit:.3f}", show(META / first.hit, "x")),
        ("other prompt, promotional", f"${first.miss:.2f}", show(META / first.miss, "x")),
        ("output, promotional", f"${first.output:.2f}", show(META / first.output, "x")),
        ("output, from 8 February 2025", f"${later.output:.2f}", show(META / later.output, "x")),
    )
    return Claim(
        name="meta-price",
        statement="1.4 cents a million tokens, 1/200 of Meta's",
        source=(cite("sina"),),
        method="$2.8 / V3's price of a million generated tokens (cost/prices.toml)",
        published=200,
        ours=META / first.output,
        unit="x",
        verdict="wrong comparison",
        note=f"1.4 cents was the price of a prompt that the cache already has, in the promotional weeks: {META:g} / {first.hit:g} is the "
        f"story's {META / first.hit:.0f}. Generated tokens cost ${first.output:.2f}, later ${later.output:.2f}: the honest ratio is "
        f"{META / first.output:.0f}, then {META / later.output:.1f}. Whether Meta's $2.8 was for generated tokens the article does not "
        "say.",
        tables=(Table("Meta's $2.8 over V3's prices of a million tokens", ("V3's price of", "dollars", "ratio"), rows),),
    )


def o1_price() -> Claim:
    r1, o1 = _prices("deepseek-reasoner", "o1")
    traffic = revenue("deepseek-reasoner", STORY) / revenue("o1", STORY)
    pairs = {kind: (getattr(r1, field), getattr(o1, field)) for kind, field in KINDS.items()}
    rows = tuple((kind, f"${ours:.2f}", f"${theirs:.2f}", percent(ours / theirs)) for kind, (ours, theirs) in pairs.items())
    return Claim(
        name="o1-price",
        statement="R1 costs 2 to 4 % of o1: $2.19 against $60",
        source=(cite("wallstreetcn"),),
        method="prices of a million tokens in February 2025 (cost/prices.toml), output",
        published=(2, 4),
        ours=100 * r1.output / o1.output,
        unit="%",
        verdict="confirmed",
        note=f"Output {percent(r1.output / o1.output)}, prompts the same, cached ones {percent(r1.hit / o1.hit)}; the tokens of "
        f"DeepSeek's day cost {percent(traffic)}. A price a token is not a price an answer: that depends on how long each model thinks.",
        tables=(Table("Dollars a million tokens", ("", "R1", "o1", "R1 of o1"), rows),),
    )


def gpt4_price() -> Claim:
    r1, gpt4o, gpt4, o1 = (price.output for price in _prices("deepseek-reasoner", "gpt-4o", "gpt-4", "o1"))
    rows = (("o1", o1), ("GPT-4 of March 2023, 8K", gpt4), ("GPT-4o of the time", gpt4o))
    return Claim(
        name="gpt4-price",
        statement="R1's $2.19 against GPT-4's $60 (3.65 %)",
        source=(cite("wallstreetcn"),),
        method="R1's output price / that of GPT-4 as sold in February 2025, GPT-4o",
        published=100 * 2.19 / 60,
        ours=100 * r1 / gpt4o,
        unit="%",
        verdict="wrong comparison",
        note=f"$60 was o1's price, and two years earlier the first GPT-4's. GPT-4o cost ${gpt4o:.0f} when R1 came: R1 was "
        f"{show(gpt4o / r1, 'x')} cheaper, not {show(gpt4 / r1, 'x')}. R1 against o1, which it was built to match, is the fair pair "
        "(o1-price).",
        tables=(
            Table(
                f"R1's ${r1:.2f} against",
                ("model", "dollars", "R1's share"),
                tuple((name, f"${price:.2f}", percent(r1 / price)) for name, price in rows),
            ),
        ),
    )


def price_fall() -> Claim:
    years = (STORY - date(2023, 3, 14)).days / 365.25
    gpt4, gpt4o, r1, v3 = _prices("gpt-4", "gpt-4o", "deepseek-reasoner", "deepseek-chat")
    falls = {
        "GPT-4o, output": (gpt4.output, gpt4o.output),
        "GPT-4o, prompt": (gpt4.miss, gpt4o.miss),
        "R1, output": (gpt4.output, r1.output),
        "V3, output, promotional": (gpt4.output, v3.output),
    }
    rows = ((name, f"${a:.2f}", f"${b:.2f}", show(a / b, "x"), f"{(a / b) ** (1 / years):.1f}x") for name, (a, b) in falls.items())
    return Claim(
        name="price-fall",
        statement="$60 to $2 a million tokens in two years",
        source=(cite("sina"),),
        method=f"prices of a million generated tokens, GPT-4 in March 2023 and GPT-4o {years:.1f} years later (cost/prices.toml)",
        published=60 / 2,
        ours=gpt4.output / gpt4o.output,
        unit="x",
        verdict="wrong comparison",
        note=f"$60 was the price of generated tokens. GPT-4, which the article sees at $2, is at ${gpt4o.output:.0f} for those; only its "
        f"prompts come near (${gpt4o.miss:.2f}, from ${gpt4.miss:.0f}). Like for like the price fell "
        f"{show(gpt4.output / gpt4o.output, 'x')}. By a change of maker it did fall that far: R1's output costs ${r1.output:.2f}.",
        tables=(Table("Dollars a million tokens since March 2023", ("", "GPT-4", "now", "fell", "a year"), tuple(rows)),),
    )


def fiftieth() -> Claim:
    r1, v3, o1, gpt4o = _prices("deepseek-reasoner", "deepseek-chat", "o1", "gpt-4o")
    pairs = ((o1, r1), (gpt4o, v3))
    rows = tuple((kind, *(show(getattr(dear, f) / getattr(cheap, f), "x") for dear, cheap in pairs)) for kind, f in KINDS.items())
    return Claim(
        name="fiftieth",
        statement="DeepSeek at 1/50 of the cost",
        source=(cite("sina"),),
        method="the nearest prices, o1 / R1 for cached prompts (cost/prices.toml)",
        published=50,
        ours=o1.hit / r1.hit,
        unit="x",
        verdict="not verifiable",
        note="Of which cost the article does not say, and nobody but OpenAI knows theirs. In prices a token there is a pair that far "
        f"apart, cached prompts; output is {show(o1.output / r1.output, 'x')} apart.",
        tables=(Table("How many times dearer a token was in February 2025", ("", "o1 over R1", "GPT-4o over V3"), rows),),
    )
