// The settings drawer. What is typed holds at once and is kept in this browser only; what is left empty is not sent, so that
// the model's own defaults hold. A value that makes no sense is marked and not taken.

import { h, icon, iconButton, one } from "./dom.js";
import { DEFAULTS, saveSettings } from "./store.js";

const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: "any" }, "0 is greedy; higher is more varied"],
  ["top_p", "Top-p", { min: 0, max: 1, step: "any" }, "Keeps the likeliest tokens up to this share"],
  ["top_k", "Top-k", { min: 0, step: 1 }, "Keeps this many tokens"],
  ["min_p", "Min-p", { min: 0, max: 1, step: "any" }, "Drops tokens below this share of the likeliest"],
  ["max_tokens", "Max tokens", { min: 1, step: 1 }, "Thinking counts"],
  ["seed", "Seed", { step: 1 }, "The same seed, the same text"],
];

const label = (text, control, hint = "") => h("label", {}, h("span", {}, text), control, hint && h("small", {}, hint));
const select = (name, options) => h("select", { name }, ...options.map(([value, text]) => h("option", { value }, text)));

export class Settings {
  constructor(settings, changed) {
    Object.assign(this, { settings, changed });
    this.dialog = one("#settings");
    this.form = h("form", { novalidate: true, autocomplete: "off" },
      h("header", {}, h("h2", { id: "settings-title" }, "Settings"), iconButton("close", "Close", () => this.dialog.close())),
      label("System prompt", h("textarea", { name: "system", rows: 4, placeholder: "How the model should behave" })),
      h("fieldset", {}, h("legend", {}, "Thinking"),
        h("div", { class: "pairs" },
        label("Thinking", select("thinking", [["auto", "As the model does"], ["on", "On"], ["off", "Off"]])),
        label("Effort", select("effort", [["", "Default"], ["low", "Low"], ["high", "High"], ["max", "Max"]])),
        label("Budget", h("input", { name: "budget", type: "number", min: 1, step: 1, placeholder: "none" }), "Tokens of thinking at most"))),
      h("fieldset", {}, h("legend", {}, "Sampling"), h("div", { class: "pairs" },
        ...NUMBERS.map(([name, text, range, hint]) => label(text, h("input", { name, type: "number", placeholder: "default", ...range }), hint)))),
      h("fieldset", {}, h("legend", {}, "This browser"), h("div", { class: "pairs" },
        label("API key", h("input", { name: "key", type: "password", placeholder: "none", spellcheck: "false", autocomplete: "off" }), "Kept here, sent to this server only"),
        label("Theme", select("theme", [["auto", "As the system"], ["light", "Light"], ["dark", "Dark"]])))),
      h("footer", {}, h("button", { type: "button", class: "quiet", click: () => this.#reset() }, "Defaults"),
        h("button", { type: "submit", class: "primary" }, "Done")));
    this.dialog.append(this.form);
    this.form.addEventListener("input", (event) => this.#take(event.target));
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.dialog.close()));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close()); // beside the drawer
    one("#bar").append(h("button", { type: "button", class: "icon-button", id: "open-settings", title: "Settings", "aria-label": "Settings", click: () => this.open() }, icon("gear")));
    this.theme();
  }

  open(field = null) {
    this.#fill();
    this.dialog.showModal();
    if (field) this.form.elements[field].focus();
  }

  set(name, value) {
    this.settings[name] = value;
    saveSettings(this.settings);
    if (name === "theme") this.theme();
    this.changed(name);
  }

  theme() {
    const { theme } = this.settings;
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  }

  #fill() {
    for (const control of this.form.elements) {
      if (!control.name) continue;
      control.value = this.settings[control.name];
      control.removeAttribute("aria-invalid");
    }
  }

  #take(control) {
    const valid = control.checkValidity();
    control.setAttribute("aria-invalid", String(!valid));
    if (valid) this.set(control.name, control.value);
  }

  #reset() {
    for (const [name, value] of Object.entries(DEFAULTS)) if (name !== "key" && name !== "model" && name !== "theme") this.set(name, value);
    this.#fill();
  }
}
