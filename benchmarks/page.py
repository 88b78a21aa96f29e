"""What benchmarks/sparse.py found, as tables for a terminal and as one page that stands alone, a plot for each question."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from jevons.plot import Curve, dollars, draw_chart, duration, number
from jevons.report import page, tile

TITLES = {"dense": "dense", "moe": "mixture", "memory": "memory", "memory_torch": "by torch"}
COLOURS = {"dense": "fourth", "moe": "second", "memory": "accent", "memory_torch": "third"}
HEIGHT = 300
Rows = list[list[str]]


def ratio_rows(found: dict[str, Any]) -> Rows:
    """A line a batch: mixture against memory, and how fast the bytes are that one reads and the other does not."""
    by_torch = found["ratio_through_torch"]
    more = ["by torch"] if by_torch else []
    rows = [["batch", "mixture ms", "memory ms", "ratio", *more, "mixture MB", "memory MB", "ratio", "GB/s of the difference"]]
    for batch, ratio in found["ratio"].items():
        moe, memory = (found["models"][name]["batches"][batch] for name in ("moe", "memory"))
        read = [row["bytes"]["total"] for row in (moe, memory)]
        speed = found["bytes_per_second_of_the_difference"][batch]
        cells = [batch, f"{moe['median']:.1f}", f"{memory['median']:.1f}", f"{ratio:.2f}"]
        cells += [f"{by_torch[batch]:.2f}"] if by_torch else []
        cells += [f"{size / 1e6:,.1f}" for size in read]
        rows.append([*cells, f"{read[0] / read[1]:.2f}", f"{speed / 1e9:.1f}" if speed else ""])
    return rows


def step_of_decoding_rows(found: dict[str, Any]) -> Rows:
    """A line a batch and model: times, what was chosen a layer, bytes."""
    rows = [["batch", "model", "median ms", "p90 ms", "cold ms", "chosen", "if uniform", "MB", "GB/s"]]
    for batch in found["ratio"]:
        for name, model in found["models"].items():
            row = model["batches"][batch]
            cells = [batch, TITLES[name], *(f"{row[key]:.1f}" for key in ("median", "p90", "cold"))]
            cells += [number(row["unique"]), number(row["expected_unique"])] if row["unique"] else ["", ""]
            rows.append([*cells, f"{row['bytes']['total'] / 1e6:,.1f}", f"{row['bytes_per_second'] / 1e9:.1f}"])
    return rows


def loss_rows(found: dict[str, Any]) -> Rows:
    """A line a model; the money is the time's at one price, so one column does for both."""
    rows = [["model", "parameters", "loss, equal tokens", "equal time or money", "tokens/s", "seconds"]]
    for name, row in found["models"].items():
        losses = [f"{row[f'loss_at_equal_{what}']:.4f}" for what in ("tokens", "time")]
        rows.append([TITLES[name], number(row["parameters"]), *losses, f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.0f}"])
    return rows


def trained_rows(found: dict[str, Any]) -> Rows:
    """A line a batch: what trained models choose on held-out text, beside uniform choices."""
    rows = [["batch", "experts chosen", "if uniform", "rows chosen", "if uniform"]]
    moe, memory = (found["models"][name]["chosen"] for name in ("moe", "memory"))
    for batch in moe:
        rows.append([batch, *(number(side[batch][key]) for side in (moe, memory) for key in ("unique", "expected_unique"))])
    return rows


def training_step_rows(found: dict[str, Any]) -> Rows:
    rows = [["model", "parameters", "seconds a step", "of it the optimizer"]]
    for name, row in found["models"].items():
        rows.append([TITLES[name], number(row["parameters"]), f"{row['step']:.2f}", f"{row['optimizer']:.2f}"])
    return rows


MODELS = (
    "Three models, alike in width, depth and attention. The dense one has an ordinary feed-forward in each block. The mixture has many, "
    "its experts, and a router that sends each token through a few. The one with memory looks up some dozens of rows for a token in tables "
    "of about a million (UltraMem). Mixture and memory have the same parameters in all, and all three do the same work for a token."
)
NOTES = {
    "Mixture against memory": "A ratio above 1: memory is faster, or reads less. The last column is how fast the bytes would have to be "
    "read that the mixture reads more, to explain the difference in time.",
    "Each model": "Cold: with the processor's caches emptied first. Chosen: experts or rows that a layer reads for the whole batch, beside "
    "how many even choices would take; MB: all that a step reads, GB/s: that over the median.",
    "What a layer of the trained models chooses": "On text that was not trained on. Fewer than even choices would take: tokens agree on "
    "rows, so that less is read.",
}
TABLES = {
    "latency": {"Mixture against memory": ratio_rows, "Each model": step_of_decoding_rows},
    "loss": {"Losses": loss_rows, "What a layer of the trained models chooses": trained_rows},
    "step": {"Seconds": training_step_rows},
}


def show(part: str, found: dict[str, Any]) -> None:
    """The part's tables on the terminal, and in a line what it was measured with."""
    print(f"\n{part}: {words(part, found)}")
    for make in TABLES[part].values():
        rows = make(found)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        print("\n" + "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows))


def words(part: str, found: dict[str, Any]) -> str:
    """What stands above a part's table."""
    if part == "latency":
        machine, moe = found["machine"], found["models"]["moe"]
        kernels = "packed weights" if found["packed"] else "weights where they lie"
        return (
            f"{found['dtype']}, {kernels}; {number(moe['sparse_parameters'])} sparse parameters; this machine reads "
            f"{machine['bandwidth'] / 1e9:.1f} GB/s in order and {machine['gather'] / 1e9:.1f} GB/s in random rows"
        )
    if part == "loss":
        return (
            f"equal tokens are {found['tokens']:,.0f}, equal time is {found['seconds']:.0f} s, equal money {dollars(found['money'])} "
            f"(every model at {dollars(found['price_per_hour'])} an hour, so it orders them as time does)"
        )
    return f"{found['tokens']:,} tokens a step, {found['dtype']}"


def _curve(name: str, points: Sequence[Any], kind: Any = "joined") -> Curve:
    return Curve(TITLES[name], [(float(x), float(y)) for x, y in points], kind, COLOURS[name])


def draw(results: dict[str, Any]) -> str:
    """The page of all parts that were measured."""
    ours, tiles, body = results["ours"], "", ""
    sentences = []
    if found := ours.get("latency"):
        best = max(found["ratio"], key=found["ratio"].get)
        worst = min(found["ratio"], key=found["ratio"].get)
        note = f"at batch {best}; {found['ratio'][worst]:.2f}x at {worst}"
        if found["ratio_through_torch"]:
            note += f"; {found['ratio_through_torch'][best]:.2f}x at {best} with both through torch"
        tiles += tile("speed of decoding, memory over mixture", f"{found['ratio'][best]:.2f}x", note)
        sentences.append(
            f"With memory layers a model decodes {found['ratio'][best]:.2f} times as fast as a mixture of experts of the same size and "
            f"work, at batch {best}; at batch {worst} {found['ratio'][worst]:.2f} times"
        )
        body += _section("Decoding", "latency", found, _latency_charts(found))
    if found := ours.get("loss"):
        moe, memory = (found["models"][name]["loss_at_equal_tokens"] for name in ("moe", "memory"))
        tiles += tile("loss, memory less mixture", f"{memory - moe:+.3f}", "nats a token, at equal tokens")
        moe, memory = (found["models"][name]["loss_at_equal_time"] for name in ("moe", "memory"))
        tiles += tile("the same at equal time", f"{memory - moe:+.3f}", f"after {duration(found['seconds'])}, {dollars(found['money'])}")
        better = min(found["models"], key=lambda name: found["models"][name]["loss_at_equal_time"])
        names = {"dense": "the dense model", "moe": "the mixture"}
        sentences.append(f"For equal time and money {names.get(better, 'the model with memory')} learns most")
        body += _section("Learning", "loss", found, _loss_charts(found))
    if found := ours.get("step"):
        note = f"optimizer {found['ratio']['optimizer']:.2f}x"
        tiles += tile("training step, mixture over memory", f"{found['ratio']['step']:.2f}x", note)
        body += _section("A training step of larger models", "step", found, "")
    about = f'<p class="note" style="margin-top:14px">{MODELS}</p>'
    summary = f'<p class="summary">{escape(". ".join(sentences))}.</p>{about}<div class="tiles">{tiles}</div>'
    return page("Dense, mixture of experts or memory", ["Jevons", results["device"], results["date"]], summary, [], body)


def _latency_charts(found: dict[str, Any]) -> str:
    models = found["models"]
    time = [_curve(name, [(b, row["median"]) for b, row in m["batches"].items()]) for name, m in models.items()]
    once = {name: m for name, m in models.items() if name != "memory_torch"}
    read = [_curve(name, [(b, row["bytes"]["total"] / 1e6) for b, row in m["batches"].items()]) for name, m in once.items()]
    axes = {"height": HEIGHT, "log_ratio": 3, "against": "batch", "log_x": True}
    first = draw_chart("Milliseconds of one decoding step by batch, median", time, **axes)
    return first + draw_chart("Megabytes that a step reads by batch", read, **axes)


def _loss_charts(found: dict[str, Any]) -> str:
    # without the untrained model, whose loss would flatten all others
    by = {axis: [_curve(name, c[axis][1:]) for name, c in found["curves"].items()] for axis in ("tokens", "seconds")}
    price = f"{dollars(found['price_per_hour'])} an hour"
    return draw_chart("Validation loss by tokens, nats", by["tokens"], HEIGHT, against="token") + draw_chart(
        f"Validation loss by seconds, at {price} also by money", by["seconds"], HEIGHT, against="second"
    )


def _section(title: str, part: str, found: dict[str, Any], charts: str) -> str:
    made = {name: _lines(make(found)) for name, make in TABLES[part].items()}
    notes = {name: f'<p class="note">{escape(NOTES[name])}</p>' if name in NOTES else "" for name in made}
    tables = "".join(
        f'<h3>{name}</h3>{notes[name]}<div class="scroll"><table class="plain">{lines}</table></div>' for name, lines in made.items()
    )
    return (
        f'<section><h2>{title}</h2><p class="note">{escape(words(part, found))}.</p>{charts}{tables}'
        f'<p class="note"><code>{escape(found["command"])}</code>, {found["date"]}</p></section>'
    )


def _lines(rows: Rows) -> str:
    tags = ["th", *["td"] * (len(rows) - 1)]
    cells = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row[1:]) for tag, row in zip(tags, rows))
    return "".join(f"<tr><th>{escape(row[0])}</th>{rest}</tr>" for row, rest in zip(rows, cells))
