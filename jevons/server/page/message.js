// One message on the page. A reply's view is told its message as often as it likes and changes only what differs: of a text
// the blocks that are done stay as they are, so that a long reply streams at the cost of its last paragraph.

import { build, copy, h, icon, iconButton, one } from "./dom.js";
import { count, counted, money, rate, seconds } from "./format.js";
import { blocks, tree } from "./markdown.js";
import { speed } from "./reply.js";

class TextView {
  #sources = [];

  constructor(element) {
    this.element = element;
  }

  update(text) {
    const parts = blocks(text);
    const children = this.element.children;
    parts.forEach((block, i) => {
      if (this.#sources[i] === block.source) return;
      const node = build(tree(block));
      if (children[i]) children[i].replaceWith(node);
      else this.element.append(node);
      this.#sources[i] = block.source;
    });
    while (children.length > parts.length) children[children.length - 1].remove();
    this.#sources.length = parts.length;
  }
}

/** Copies, and shows for a moment that it did. */
export async function copyFrom(button, text) {
  await copy(text);
  const before = [...button.childNodes];
  button.replaceChildren(button.classList.contains("icon-button") ? icon("check") : "Copied");
  setTimeout(() => button.replaceChildren(...before), 1200);
}

/** A person's message: shown as it was typed. */
export function userView(message, { edit }) {
  const article = h("article", { class: "user", "aria-label": "You" });
  const show = () => {
    const tools = h("div", { class: "actions" },
      iconButton("copy", "Copy message", (event) => copyFrom(event.currentTarget, message.content)),
      iconButton("edit", "Edit message", change));
    article.replaceChildren(h("div", { class: "bubble" }, message.content), tools);
  };
  const change = () => {
    const area = h("textarea", { "aria-label": "Edit message", rows: Math.min(12, message.content.split("\n").length + 1) });
    area.value = message.content;
    const send = () => (area.value.trim() ? edit(area.value) : area.focus());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") show();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
    });
    article.replaceChildren(h("div", { class: "editor" }, area, h("div", { class: "row" },
      h("button", { type: "button", class: "quiet", click: show }, "Cancel"),
      h("button", { type: "button", class: "primary", click: send }, "Send"))));
    area.focus();
  };
  show();
  return article;
}

export class ReplyView {
  #touched = false; // the person folded or unfolded the thinking: it is theirs from then on
  #timer = 0;

  constructor(message, { retry }) {
    this.message = message;
    this.retry = retry;
    this.label = h("span", {});
    this.thought = h("div", { class: "text" });
    this.thinking = h("details", { class: "thinking", hidden: true },
      h("summary", { click: () => (this.#touched = true) }, icon("chevron"), this.label), this.thought);
    this.body = h("div", { class: "text" });
    this.pulse = h("div", { class: "pulse", "aria-hidden": "true" });
    this.trouble = h("div", { class: "trouble", role: "alert", hidden: true });
    this.figures = h("div", { class: "figures" });
    this.actions = h("div", { class: "actions" },
      iconButton("copy", "Copy reply", (event) => copyFrom(event.currentTarget, this.message.content)),
      iconButton("retry", "Retry", () => this.retry(), { class: "icon-button retry" }));
    this.element = h("article", { class: "reply", "aria-label": "Reply" }, this.thinking, this.body, this.pulse, this.trouble,
      h("footer", {}, this.figures, this.actions));
    this.views = { thought: new TextView(this.thought), body: new TextView(this.body) };
    this.update();
  }

  update() {
    const { message } = this;
    const streaming = message.state === "streaming";
    this.element.classList.toggle("streaming", streaming);
    this.element.setAttribute("aria-busy", streaming);
    this.pulse.hidden = !streaming;
    this.#showThinking(streaming);
    this.views.body.update(message.content);
    if (!streaming) {
      this.#showFigures();
      this.#showTrouble();
    }
  }

  #showThinking(streaming) {
    const { message } = this;
    this.thinking.hidden = !message.reasoning;
    if (!message.reasoning) return;
    const now = streaming && message.thinkingSeconds === undefined;
    if (!this.#touched) this.thinking.open = now;
    this.thinking.classList.toggle("now", now);
    this.views.thought.update(message.reasoning);
    if (now && !this.#timer) this.#timer = setInterval(() => this.#tick(), 100);
    if (!now) clearInterval(this.#timer), (this.#timer = 0);
    this.#tick();
    if (now) this.thought.scrollTop = this.thought.scrollHeight;
  }

  #tick() {
    const { thinkingSeconds: took, thinkingSince: since } = this.message;
    if (!this.element.isConnected && this.#timer) clearInterval(this.#timer), (this.#timer = 0);
    this.label.textContent = took === undefined ? (since ? `Thinking for ${((Date.now() - since) / 1000).toFixed(1)} s` : "Thinking") : `Thought for ${seconds(took)}`;
    if (this.message.state === "interrupted" && took === undefined) this.label.textContent = "Thinking, interrupted";
  }

  #showFigures() {
    const { message } = this;
    const { usage } = message;
    const parts = [];
    const add = (text, title, name) => parts.push(h("span", { title, class: name }, text));
    if (message.state === "stopped") add("Stopped", "What had come until then is kept", "mark");
    if (message.finish === "length") add("Cut at the token limit", "finish_reason: length", "mark");
    if (usage) {
      const reasoning = usage.completion_tokens_details?.reasoning_tokens;
      add(counted(usage.completion_tokens, "token"), reasoning ? `${count(reasoning)} of them thinking` : "Completion tokens", "tokens");
      if (speed(message)) add(`${rate(speed(message))} tok/s`, "Tokens per second after the first", "speed");
    }
    if (message.firstToken !== undefined) add(`first in ${seconds(message.firstToken)}`, "Time to the first token", "first");
    if (message.state === "stopped") add(seconds(message.duration), "Time until it was stopped");
    if (usage?.prompt_cache_hit_tokens > 0)
      add(`${count(usage.prompt_cache_hit_tokens)} cached`, `Of ${count(usage.prompt_tokens)} prompt tokens, found in the cache`, "cached");
    if (usage?.jevons?.cost != null) add(money(usage.jevons.cost), "What this reply cost", "cost");
    if (message.model) add(message.model, "Model", "model");
    this.figures.replaceChildren(...parts);
  }

  #showTrouble() {
    const { message } = this;
    const { error } = message;
    this.trouble.hidden = !error && message.state !== "interrupted";
    if (this.trouble.hidden) return;
    const kind = error ? [error.status || "", error.type].filter(Boolean).join(" ") : "interrupted";
    const text = error ? error.message : "The page was reloaded while this reply came. What had come is kept.";
    const again = h("button", { type: "button", class: "quiet retry", click: () => this.retry() }, "Retry");
    this.trouble.replaceChildren(h("strong", {}, kind || "error"), h("span", {}, text), again);
    this.trouble.classList.toggle("mild", !error);
    if (!error?.retryAt) return;
    const wait = () => {
      const left = Math.ceil((error.retryAt - Date.now()) / 1000);
      again.disabled = left > 0;
      again.textContent = left > 0 ? `Retry in ${left} s` : "Retry";
      if (left > 0) setTimeout(wait, 250);
    };
    wait();
  }

  /** Only the last reply can be asked for again. */
  set last(value) {
    one("footer .retry", this.element).hidden = !value;
    const button = one(".trouble .retry", this.element);
    if (button) button.hidden = !value;
  }
}
