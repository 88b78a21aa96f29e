"""Charts for a page that must stand alone.

A run's report is opened years later, on a phone, without a network; so each chart is HTML that carries its own drawing. The
curves are paths in an SVG that stretches with the page (strokes do not), and every word is HTML placed by percentages, so
that text stays readable at any width. Colours are CSS variables: one file serves dark and light. Not done: zooming, a
grammar of graphics.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle, pairwise
from typing import Literal

Point = tuple[float, float]

SIDE = 10_000  # curves are drawn in integer units on a square of this side, whatever its shape on the screen
LIMIT = 1000  # points of a curve that reach the page
CELLS = 40_000  # cells of all heat maps of one stage together, about 350 kB at worst
LAYERS = 12  # heat maps of one stage
EDGES = (0.1, 0.25, 0.5, 0.7, 0.9, 1.11, 1.43, 2.0, 4.0, 10.0)  # of load x experts, mirrored around 1


@dataclass(frozen=True)
class Curve:
    """Points (x ascending, all finite) and how to draw them. `thin` curves are background without a label; `joined` are dots on one."""

    name: str
    points: Sequence[Point]
    kind: Literal["line", "thin", "dots", "joined"] = "line"
    colour: str = "accent"  # a CSS variable of the page


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] onto 0..1, linearly or by logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(self.low), math.log(self.high), math.log(value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis, about `count` of them."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                values = [m * 10.0**e for e in range(first, last + 1) for m in mantissas if self.low <= m * 10.0**e <= self.high]
                if len(values) >= 3:
                    return values[:: math.ceil(len(values) / (count + 2))]
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def fit_axis(values: Sequence[float], log_ratio: float = math.inf, zero: bool = False) -> Axis:
    """An axis around `values` (finite, not empty) with a little air: logarithmic where all are positive and the largest is
    `log_ratio` times the smallest or more, otherwise linear, from zero where `zero` and none is negative."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= log_ratio:
        air = (high / low) ** 0.05
        return Axis(low / air, high * air, log=True)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(0.0 if zero and low >= 0 else low - air, high + air)


def number(value: float, digits: int = 3) -> str:
    """A number for people: 12,345 -> 12.3k, 0.00031 -> 0.00031, 1.2e-7 -> 1.2e-7."""
    if abs(value) >= 9999.5:
        value = float(f"{value:.{digits}g}")  # before the unit is chosen: 999,999 is 1M, not 1000k
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return scientific(value, digits)
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            scale = 1e3 if unit == "k" else bound
            return f"{float(f'{value / scale:.{digits}g}'):g}{unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{max(digits - 1 - math.floor(math.log10(size)), 0) if size else 0}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float, digits: int = 3) -> str:
    """A very large or very small number for people: 2.1e15."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Seconds for people: 9,660 -> 2 h 41 min."""
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    minutes = round(seconds / 60)
    for size, large, small, unit in ((1440, "d", "h", 60), (60, "h", "min", 1)):
        if minutes >= size:
            rest = minutes % size // unit
            return f"{minutes // size} {large} {rest} {small}" if rest else f"{minutes // size} {large}"
    return f"{minutes} min"


def dollars(money: float) -> str:
    """Money for people: two decimals, below ten cents two digits, never an exponent."""
    if abs(money) >= 0.1 or money == 0:
        return f"${money:,.2f}"
    return f"${money:.{1 - math.floor(math.log10(abs(money)))}f}".rstrip("0")


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def thin_out(points: Sequence[Point], limit: int = LIMIT) -> list[Point]:
    """At most `limit` points: the first, the last, and from each bucket of neighbours its lowest and its highest."""
    if len(points) <= limit:
        return list(points)
    inner, buckets = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(buckets):
        bucket = inner[len(inner) * i // buckets : len(inner) * (i + 1) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept + [points[-1]]


def smooth(points: Sequence[Point], share: float = 0.03) -> list[Point]:
    """A centred running mean over `share` of the points. The window shrinks towards the first point, so that the steep start
    of a loss curve is not bent, and is one-sided at the last, so that the final value is no single noisy batch."""
    half = max(5, round(len(points) * share / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        start, stop = i - min(i, half), min(len(points), i + min(i, half) + 1)
        means.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return means


def is_noisy(points: Sequence[Point]) -> bool:
    """Whether a curve goes up and down so much that a reader wants its running mean."""
    ys = [y for _, y in points]
    return len(ys) > 20 and sum(abs(b - a) for a, b in pairwise(ys)) > 4 * (max(ys) - min(ys))


def calm(points: Sequence[Point]) -> Sequence[Point]:
    """A curve, or where it is noisy its running mean."""
    return smooth(points) if is_noisy(points) else points


def trace(name: str, points: Sequence[Point]) -> list[Curve]:
    """A curve, or where it is noisy its running mean over the thin curve itself."""
    return [Curve("each step", points, "thin"), Curve(name, smooth(points))] if is_noisy(points) else [Curve(name, points)]


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Positions 0..1 moved apart, order kept, until neighbours are `gap` from each other and all fit above 1."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved, bound = list(places), 1 - gap / 2
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + gap)
    for i in reversed(order):
        moved[i] = min(moved[i], bound)
        bound = moved[i] - gap
    return moved


def draw_chart(
    title: str,
    curves: Sequence[Curve],
    height: int = 120,
    log_ratio: float = math.inf,
    zero: bool = False,
    against: str = "step",
    log_x: bool = False,
) -> str:
    """One chart of `curves`, `height` pixels high; `against` is what x is, by its logarithm if `log_x`. With one curve its last value
    stands beside the title, with several each is labelled at its end."""
    curves = [curve for curve in curves if curve.points]
    xs, ys = ([p[k] for curve in curves for p in curve.points] for k in (0, 1))
    first, last = min(xs), max(xs)
    x_axis, y_axis = Axis(0 if first < 0.05 * last and not log_x else first, max(last, first + 1), log_x), fit_axis(ys, log_ratio, zero)

    def unit(point: Point) -> str:
        return f"{round(SIDE * x_axis.place(point[0]))} {round(SIDE * (1 - y_axis.place(point[1])))}"

    grid, words, paths = [], [], []
    ticks = y_axis.ticks(5 if height > 200 else 3)
    digits = next(d for d in range(3, 18) if d == 17 or len({number(value, d) for value in ticks}) == len(ticks))
    for value in ticks:
        y = 1 - y_axis.place(value)
        grid.append(f"M0 {round(SIDE * y)}H{SIDE}")
        words.append(f'<i class="y" style="top:{100 * y:.1f}%">{number(value, digits)}</i>')
    for value in x_axis.ticks(5 if height > 200 else 3):
        words.append(f'<i class="x" style="left:{100 * x_axis.place(value):.1f}%">{number(value)}</i>')
    for curve in curves:
        points = thin_out(curve.points)
        dots, line = "".join(f"M{unit(p)}h0" for p in points), "M" + "L".join(unit(p) for p in points)
        colour, name = f'style="stroke:var(--{curve.colour})"', f'data-name="{escape(curve.name)}"'
        if curve.kind == "joined":
            paths.append(f'<path class="thin" {colour} d="{line}"/>')
        if curve.kind in ("dots", "joined"):
            paths.append(f'<path class="dots" {colour} {name} d="{dots}"/>')
        else:
            paths.append(f'<path class="{curve.kind}" {colour} {name} d="{line}"/>')
    named = [curve for curve in curves if curve.kind != "thin"]
    ends = [curve.points[-1][1] for curve in named]
    aside = ""
    if len(named) == 1:
        aside = f'<b style="color:var(--{named[0].colour})">{number(ends[0])}</b>'
    else:
        for curve, end, top in zip(named, ends, spread([1 - y_axis.place(end) for end in ends], 38 / height)):
            label = f"<b>{end:.2f}</b>" if 1 <= abs(end) < 10 else f"<b>{number(end)}</b>"
            words.append(f'<i class="end" style="top:{100 * top:.1f}%;color:var(--{curve.colour})">{label}{escape(curve.name)}</i>')
    scale = f"{x_axis.low} {x_axis.high} {y_axis.low} {y_axis.high} {int(y_axis.log)} {int(log_x)}"
    note = " <small>log scale</small>" if y_axis.log else ""
    return (
        f'<figure class="chart{" wide" if len(named) > 1 else ""}"><figcaption>{escape(title)}{note}{aside}</figcaption>'
        f'<div class="plot" style="height:{height}px" data-scale="{scale}" data-x="{against}">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(title)} against {against}">'
        f'<path class="grid" d="{"".join(grid)}"/>{"".join(paths)}</svg>{"".join(words)}</div></figure>'
    )


def draw_bars(rows: Sequence[tuple[str, float, str, float | None]], colours: Sequence[str] = ("right",)) -> str:
    """A bar a row: its name, its length (0 to 1), what stands at its end, and the length of a thin grey one above it, if any."""
    bars = ""
    for (name, length, text, was), colour in zip(rows, cycle(colours)):
        above = f'<i class="was" style="width:{100 * was:.1f}%"></i>' if was is not None else ""
        bar = f'{above}<i style="width:{100 * length:.1f}%;background:var(--{colour})"></i>'
        bars += f"<dt>{escape(name)}</dt><dd>{bar}</dd><dd>{escape(text)}</dd>"
    return f'<dl class="bars">{bars}</dl>'


def mean_loads(loads: Sequence[Sequence[Sequence[float]]], columns: int) -> list[list[list[float]]]:
    """Loads [record][layer][expert] (shares, summing to 1 over the experts) -> [layer][expert][column] of share x experts,
    averaged over neighbouring records into at most `columns` columns; 1 is a balanced expert."""
    columns = min(columns, len(loads))
    spans = [(len(loads) * c // columns, len(loads) * (c + 1) // columns) for c in range(columns)]
    return [
        [
            [len(layer) * sum(loads[r][index][expert] for r in range(start, stop)) / (stop - start) for start, stop in spans]
            for expert in range(len(layer))
        ]
        for index, layer in enumerate(loads[0])
    ]


def heat_level(value: float) -> int:
    """The colour of a load x experts, 0 (dead) to 10 (ten times its share), 5 is balanced."""
    return bisect_right(EDGES, value)


def draw_heat(title: str, cells: Sequence[Sequence[float]], steps: Sequence[int]) -> str:
    """A heat map of cells [expert][column] of load x experts; `steps` holds the first step of each column, then the last step."""
    runs: dict[int, list[str]] = {}
    for y, row in enumerate(cells):
        levels = [heat_level(value) for value in row]
        start = 0
        for x in range(1, len(levels) + 1):
            if x == len(levels) or levels[x] != levels[start]:
                runs.setdefault(levels[start], []).append(f"M{start} {y}.5h{x - start}")
                start = x
    paths = "".join(f'<path class="h{level}" d="{"".join(run)}"/>' for level, run in sorted(runs.items()))
    height = min(max(len(cells) * 9, 72), 200)
    return (
        f'<figure class="heat"><figcaption>{escape(title)}</figcaption>'
        f'<div class="plot" style="height:{height}px" data-steps="{" ".join(map(str, steps))}" data-experts="{len(cells)}">'
        f'<svg viewBox="0 0 {len(cells[0])} {len(cells)}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}: expert loads">'
        f'{paths}</svg><i class="y" style="top:0">0</i><i class="y last" style="top:100%">{len(cells) - 1}</i>'
        f'<i class="x first" style="left:0">{number(steps[0])}</i>'
        f'<i class="x last" style="left:100%">{number(steps[-1])}</i></div></figure>'
    )


def draw_heats(steps: Sequence[int], loads: Sequence[Sequence[Sequence[float]]]) -> str:
    """Heat maps of the loads [record][layer][expert] recorded at `steps`, one a layer, of at most LAYERS layers evenly chosen."""
    depth = len(loads[0])
    layers = sorted({i * (depth - 1) // (LAYERS - 1) for i in range(LAYERS)}) if depth > LAYERS else range(depth)
    columns = min(len(steps), max(2, min(80, CELLS // sum(len(loads[0][i]) for i in layers))))
    cells = mean_loads(loads, columns)
    starts = [steps[len(steps) * c // columns] for c in range(columns)] + [steps[-1]]
    return f'<div class="grid">{"".join(draw_heat(f"MoE layer {i}", cells[i], starts) for i in layers)}</div>'


def draw_legend() -> str:
    """The colours of the heat maps, in words."""
    swatches = "".join(
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none"><path class="h{level}" d="M0 .5h1"/></svg>' for level in range(len(EDGES) + 1)
    )
    edges = [(k + 1, f"{EDGES[k]:g}x") for k in (0, 2, 7, 9)] + [((len(EDGES) + 1) / 2, "balanced")]
    words = "".join(f'<i style="left:{100 * at / (len(EDGES) + 1):.1f}%">{word}</i>' for at, word in edges)
    return f'<div class="legend"><div class="swatches">{swatches}</div><div class="words">{words}</div></div>'


# One sheet for page and charts, on one set of colours.
STYLE = """
:root{--page:#fcfcfa;--card:#fff;--ink:#17191d;--dim:#686d76;--line:#e7e7e3;--accent:#2463d1;--second:#d4570b;--third:#7a4fd0;--fourth:#0b8a8a;--right:#15803d;
--wrong:#c02626;--cold:#2463d1;--hot:#d43d0b;--even:#eeeeea;--sans:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
--mono:ui-monospace,"SF Mono",Menlo,Consolas,monospace}@media(prefers-color-scheme:dark){:root{--page:#111316;--card:#181b1f;--ink:#eceae6;
--dim:#979ca6;--line:#2a2e34;--accent:#75a7ff;--second:#ff9d5c;--third:#b694ff;--fourth:#4fc7c7;--right:#4cc38a;--wrong:#ff7a70;--cold:#4c8dff;--hot:#ff7a3d;--even:#24282d}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 var(--sans)}
main{max-width:1040px;margin:0 auto;padding:52px 28px 80px}h1{font-size:40px;line-height:1.1;letter-spacing:-.025em;margin:0 0 14px;
font-weight:700;overflow-wrap:anywhere}.meta{color:var(--dim);font-size:13px;margin:0 0 10px}.summary{font-size:19px;line-height:1.5;
margin:0;max-width:46em;text-wrap:pretty}h2{font-size:23px;letter-spacing:-.015em;margin:64px 0 20px;padding-top:18px;
border-top:1px solid var(--line)}h3{font-size:16px;margin:38px 0 8px}.note{color:var(--dim);font-size:14px;margin:0 0 12px;max-width:62em}
.alarm{color:var(--wrong);font-weight:600}.warn{margin:18px 0 0;padding-left:12px;border-left:3px solid var(--second)}.tiles{display:flex;
flex-wrap:wrap;gap:1px;margin:32px 0 0;background:var(--line);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.tile{flex:1 1 200px;background:var(--card);padding:16px 18px 15px;display:flex;flex-direction:column}
.tile span,.tile small{color:var(--dim);font-size:13px;line-height:1.35}.tile strong{font-size:29px;line-height:1.25;font-weight:650;
letter-spacing:-.02em;font-variant-numeric:tabular-nums;white-space:nowrap}.track{position:relative;height:4px;border-radius:2px;
background:var(--line);margin:5px 0 8px}.track i{position:absolute;inset:0 auto;border-radius:2px;background:var(--right);opacity:.45}
.track b{position:absolute;top:-3px;width:3px;height:10px;margin-left:-1.5px;border-radius:2px;background:var(--right)}.grid{display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(290px,100%),1fr));gap:16px 28px;margin-top:40px}.samples{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:20px;align-items:start}.whole{grid-template-columns:1fr}article{background:var(--card);
border:1px solid var(--line);border-radius:12px;padding:16px 18px;min-width:0}h4{font-size:15px;margin:0 0 10px;display:flex;gap:12px;
justify-content:space-between;align-items:baseline}h4 small{color:var(--dim);font-weight:400;font-size:13px;text-align:right}
code,pre{font:13px/1.5 var(--mono);margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}h4 code{font-weight:600;
font-size:14px}ol{list-style:none;margin:0;padding:0}li{display:flex;gap:10px;padding:8px 0;border-top:1px solid var(--line)}
li>span{flex:0 0 3.2em;color:var(--dim);font-size:12px;line-height:20px;text-align:right;font-variant-numeric:tabular-nums}
li>div{min-width:0;flex:1}.answers{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:8px 24px}.answer{display:flex;gap:10px;min-width:0}.answer>div{
min-width:0;flex:1}li small,em{color:var(--dim);font-size:12px}.mark{font-style:normal;font-weight:700;width:1em;line-height:20px;
color:var(--dim)}.mark.right{color:var(--right)}.mark.wrong{color:var(--wrong)}.thought{color:var(--dim);font-size:12px}
summary{cursor:pointer;color:var(--dim);font-size:13px}article>details{margin-top:10px}.bars{display:grid;
grid-template-columns:auto 1fr auto;gap:5px 10px;margin:0;font-size:13px;align-items:center;font-variant-numeric:tabular-nums}
.bars dd{margin:0;text-align:right}.bars dd:has(i){background:var(--line);border-radius:3px}.bars i{display:block;height:8px;
border-radius:3px;background:var(--right)}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;
font-variant-numeric:tabular-nums}td,th{padding:9px 14px 9px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:baseline;
font-weight:400}td{white-space:nowrap}td:last-child,th:last-child{padding-right:0}th:first-child{text-align:left;color:var(--dim)}
tr:first-child th{color:var(--dim);font-size:13px}tr:last-child td,tr:last-child th{font-weight:650;color:var(--ink);border-bottom:0}
td small{display:block;color:var(--dim);font-weight:400;font-size:12px}section>details{border-bottom:1px solid var(--line);padding:12px 0}
section>details>summary{font-size:15px;color:var(--ink)}.source{padding:12px 0 4px}@media(max-width:600px){main{padding:30px 18px 60px}
h1{font-size:31px}.summary{font-size:17px}.tile{flex-basis:140px;padding:13px 14px}.tile strong{font-size:25px}
.wide .plot{margin-right:70px}table{font-size:13px}td small{font-size:11px}th,td{padding-right:9px}}figure{margin:0 0 26px}
figcaption{font-size:13px;color:var(--dim);display:flex;gap:.5em;align-items:baseline;margin-bottom:8px;text-wrap:balance}
figcaption b{margin-left:auto;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}figcaption small{font-size:11px;
opacity:.75;white-space:nowrap}.plot{position:relative;margin:0 8px 0 42px;touch-action:pan-y}
.wide{margin-bottom:42px}.wide .plot{margin-right:84px}.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}.plot .grid{stroke:var(--line);
stroke-width:1}.plot .line{stroke-width:1.8}.plot .thin{stroke-width:1;opacity:.28}.plot .dots{stroke-width:6.5}.plot i{position:absolute;
font:11px/1.1 var(--sans);font-variant-numeric:tabular-nums;color:var(--dim);white-space:nowrap;pointer-events:none}.plot .y{right:100%;
margin-right:8px;transform:translateY(-50%)}.plot .x{top:100%;margin-top:7px;transform:translateX(-50%)}.plot .end{left:100%;
margin-left:10px;transform:translateY(-50%)}.plot .end b{display:block;font-size:15px;font-weight:650}.plot .cursor{top:0;bottom:0;
width:1px;background:var(--dim);opacity:.5}.plot .read{bottom:100%;margin-bottom:-14px;padding:5px 8px;border-radius:6px;
background:var(--ink);color:var(--page);z-index:2;line-height:1.45;white-space:pre}.heat .plot{margin-left:24px}
.heat .plot path,.legend path{vector-effect:none;stroke-width:1;stroke-linecap:butt;shape-rendering:crispEdges}.heat .y{transform:none}
.heat .y.last{transform:translateY(-100%)}.heat .x.first{transform:none}.heat .x.last{transform:translateX(-100%)}.legend{max-width:330px;
font-size:11px;color:var(--dim);margin:14px 0 4px}.legend i{font-style:normal;position:absolute;transform:translateX(-50%);
white-space:nowrap}.swatches{display:flex}.swatches svg{flex:1;height:10px}.words{position:relative;height:18px;margin-top:3px}
.track.was{margin-bottom:2px}.track.was i,.track.was b{background:var(--dim)}.intervals{margin:44px 0 0}.intervals dl{display:grid;
grid-template-columns:fit-content(40%) 1fr auto;gap:12px 18px;align-items:center;margin:14px 0 0;font-size:14px}.intervals dd{margin:0;
font-variant-numeric:tabular-nums;font-weight:600}.intervals dt{overflow-wrap:anywhere}.intervals .track{height:6px}.intervals .track b{
height:12px}.ticks{position:relative;height:1em}.ticks i{position:absolute;transform:translateX(-50%);font:11px/1 var(--sans);
color:var(--dim)}.plain tr:last-child td,.plain tr:last-child th{font-weight:400;border-bottom:1px solid var(--line)}.plain th:first-child{
color:var(--ink);min-width:8em}
.plot .end{max-width:76px;overflow:hidden;text-overflow:ellipsis}
.bars .was{height:3px;background:var(--dim);margin-bottom:1px}
""" + "\n".join(
    f".h{level}{{stroke:color-mix(in oklab,var(--{'cold' if level < 5 else 'hot'}) {100 * (abs(level - 5) / 5) ** 0.8:.0f}%,var(--even))}}"
    for level in range(len(EDGES) + 1)
)

# Reads the numbers back from the drawn paths, so that they are not in the file twice.
SCRIPT = (
    """
const show=(v)=>Math.abs(v)>=1e4?Math.round(v).toLocaleString('en'):String(+v.toPrecision(4));
for(const plot of document.querySelectorAll('.plot')){
  const read=document.createElement('i'),cursor=document.createElement('i');read.className='read';cursor.className='cursor';
  const curves=[...plot.querySelectorAll('[data-name]')].map(p=>[p.dataset.name,p.classList.contains('dots'),
    p.getAttribute('d').split(/[ML]/).slice(1).map(q=>q.split(/[ h]/).map(Number))]);
  plot.onpointermove=(event)=>{
    const box=plot.getBoundingClientRect(),u=Math.min(Math.max((event.clientX-box.left)/box.width,0),.9999);
    let words,at=u;
    if(plot.dataset.steps){
      const steps=plot.dataset.steps.split(' ').map(Number),column=Math.floor(u*(steps.length-1)),edges=[0,EDGES];
      const level=(event.target.getAttribute('class')||'').match(/^h(\\d+)$/);if(!level)return;
      const expert=Math.floor((event.clientY-box.top)/box.height*plot.dataset.experts),k=+level[1];
      words=`expert ${expert}, step ${show(steps[column])}\\n`+(k<10?`${edges[k]} to ${edges[k+1]}`:`over ${edges[k]}`)+' x its fair share';
    }else{
      const [x0,x1,y0,y1,log,logX]=plot.dataset.scale.split(' ').map(Number);
      const near=curves.map(([name,dots,points])=>[name,dots,points.reduce((a,b)=>Math.abs(b[0]-u*SIDE)<Math.abs(a[0]-u*SIDE)?b:a)]);
      at=(near.find(n=>!n[1])||near[0])[2][0]/SIDE;
      words=`${plot.dataset.x} ${show(Math.round(logX?x0*Math.pow(x1/x0,at):x0+at*(x1-x0)))}`+near.map(([name,,p])=>{const v=1-p[1]/SIDE;
        return '\\n'+name+'  '+show(log?y0*Math.pow(y1/y0,v):y0+v*(y1-y0))}).join('');
    }
    read.textContent=words;read.style.left=cursor.style.left=100*at+'%';read.style.transform=`translateX(-${100*at}%)`;plot.append(cursor,read);
  };
  plot.onpointerleave=()=>{read.remove();cursor.remove()};
}
""".replace("EDGES", ",".join(f"{edge:g}" for edge in EDGES)).replace("SIDE", str(SIDE))
)
