// The live tab: what the server does now, asked for once a second while the tab is seen. The last minutes are remembered by
// the page; the server keeps no history for it. What a server does not say is a dash.

import { Chart } from "./chart.js";
import { h, one } from "./dom.js";
import { count, counted, duration, money, percent, rate } from "./format.js";
import { request } from "./stream.js";

const EVERY = 1000; // ms

const share = (part, whole) => (whole > 0 && typeof part === "number" ? part / whole : undefined);

// name, caption, value of a state
const FIGURES = [
  ["running", "Running", (s) => count(s.running)],
  ["waiting", "Waiting", (s) => count(s.waiting)],
  ["completion", "Tokens per second", (s) => rate(s.completion_tokens_per_second)],
  ["hits", "Cache hit rate", (s) => percent(s.hit_rate)],
  ["cache", "Cache in use", (s) => percent(share(s.cache?.used_blocks, s.cache?.total_blocks))],
  ["money", "Money today", (s) => money(s.money_today)],
];

export class StateView {
  #timer = 0;
  #shown = false;

  constructor(settings) {
    this.settings = settings;
    this.values = new Map();
    const card = ([name, caption]) => {
      const value = h("dd", { id: `live-${name}` }, "–");
      this.values.set(name, value);
      return h("div", { class: "card" }, h("dt", {}, caption), value);
    };
    this.trouble = h("div", { class: "trouble", role: "alert", hidden: true });
    this.about = h("p", { class: "about" });
    this.charts = {
      decode: new Chart({ title: "Tokens written per second", lines: ["completion"], format: rate }),
      prefill: new Chart({ title: "Tokens read per second", lines: ["prompt"], format: rate }),
      load: new Chart({ title: "Requests", lines: ["running", "waiting"], format: count }),
      cache: new Chart({ title: "Cache blocks", lines: ["in use", "kept for reuse"], format: percent, top: 1 }),
    };
    one("#live").append(h("div", { class: "live" }, h("h1", {}, "Live"), this.about, this.trouble,
      h("dl", { class: "cards" }, ...FIGURES.map(card)), h("div", { class: "charts" }, ...Object.values(this.charts).map((c) => c.element))));
    document.addEventListener("visibilitychange", () => this.#poll());
  }

  show(shown) {
    this.#shown = shown;
    this.#poll();
  }

  async #poll() {
    clearTimeout(this.#timer);
    if (!this.#shown || document.hidden) return;
    const round = (this.round = {}); // a later call takes over
    try {
      const response = await request("state", { key: this.settings.key });
      const state = await response.json();
      if (this.#shown) this.#draw(state);
      this.trouble.hidden = true;
    } catch (error) {
      this.trouble.replaceChildren(h("strong", {}, String(error.status || "offline")), h("span", {}, error.message));
      this.trouble.hidden = false;
    }
    if (round === this.round) this.#timer = setTimeout(() => this.#poll(), EVERY);
  }

  #draw(state) {
    const now = Date.now() / 1000;
    for (const [name, , read] of FIGURES) this.values.get(name).textContent = read(state);
    const { total_blocks: total, used_blocks: used, cached_blocks: kept } = state.cache ?? {};
    this.charts.decode.add(now, [state.completion_tokens_per_second]);
    this.charts.prefill.add(now, [state.prompt_tokens_per_second]);
    this.charts.load.add(now, [state.running, state.waiting]);
    this.charts.cache.add(now, [share(used, total), share(kept, total)]);
    const parts = [state.model, state.version && `Jevons ${state.version}`, state.uptime != null && `up ${duration(state.uptime)}`];
    parts.push(state.requests_today != null && `${counted(state.requests_today, "request")} today`, total && counted(total, "cache block"));
    this.about.textContent = parts.filter(Boolean).join(" · ");
  }
}
