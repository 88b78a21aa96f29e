// A line chart of the last minutes, in SVG: time on the left to now on the right, from zero up. Lines break where nothing was
// measured (the tab was hidden), for a straight line over a gap would be an invention.

import { build, h } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 150;
const GAP = 5; // seconds without a point after which a line breaks

/** The next 1, 2 or 5 times a power of ten. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.9999) * power;
}

/** SVG path of [time, value] points. */
export function path(points, { from, span, top }) {
  let last = -Infinity;
  return points
    .map(([time, value]) => {
      const x = ((time - from) / span) * WIDTH;
      const y = HEIGHT - (value / top) * HEIGHT;
      const begins = time - last > GAP;
      last = time;
      return `${begins ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}${begins ? "h0" : ""}`; // h0: one point alone is a dot
    })
    .join("");
}

export class Chart {
  constructor({ title, lines, format, top = null, span = 300 }) {
    Object.assign(this, { title, lines, format, top, span, points: lines.map(() => []) });
    this.now = lines.map((line, i) => h("b", { class: `line-${i}` }, "–"));
    this.plot = h("div", { class: "plot" });
    this.scale = h("span", {});
    this.cursor = h("output", { class: "cursor", hidden: true });
    this.element = h("figure", { class: "chart" },
      h("figcaption", {}, h("h3", {}, title), h("span", { class: "legend" }, ...lines.map((line, i) => h("span", {}, `${line} `, this.now[i])))),
      h("div", { class: "frame" }, this.plot, this.cursor, h("span", { class: "top" }, this.scale)),
      h("div", { class: "axis" }, h("span", {}, `${span / 60} min ago`), h("span", {}, "now")));
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => (this.cursor.hidden = true));
  }

  add(time, values) {
    values.forEach((value, i) => {
      this.now[i].textContent = this.format(value);
      if (typeof value === "number") this.points[i].push([time, value]);
      while (this.points[i].length && this.points[i][0][0] < time - this.span) this.points[i].shift();
    });
    this.time = time;
    this.draw();
  }

  draw() {
    const from = this.time - this.span;
    const top = this.top ?? ceiling(Math.max(...this.points.flat().map(([, value]) => value), 0));
    const view = { from, span: this.span, top };
    const grid = [0.25, 0.5, 0.75].map((share) => ["line", { class: "grid", x1: 0, x2: WIDTH, y1: HEIGHT * share, y2: HEIGHT * share }]);
    const lines = this.points.map((points, i) => ["path", { class: `line line-${i}`, d: path(points, view), "vector-effect": "non-scaling-stroke" }]);
    const summary = this.lines.map((line, i) => `${line} ${this.now[i].textContent}`).join(", ");
    this.plot.replaceChildren(build(["svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${this.title}: ${summary}` }, ...grid, ...lines]));
    this.scale.textContent = this.format(top);
  }

  #point(event) {
    const box = this.plot.getBoundingClientRect();
    const time = this.time - this.span + ((event.clientX - box.left) / box.width) * this.span;
    const near = this.points.map((points) => points.reduce((best, p) => (!best || Math.abs(p[0] - time) < Math.abs(best[0] - time) ? p : best), null));
    if (!near[0] || Math.abs(near[0][0] - time) > GAP) return void (this.cursor.hidden = true);
    this.cursor.hidden = false;
    this.cursor.textContent = `${Math.round(this.time - near[0][0])} s ago: ${near.map((p, i) => (p ? `${this.lines[i]} ${this.format(p[1])}` : "")).filter(Boolean).join(", ")}`;
  }
}
