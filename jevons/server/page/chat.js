// The chat: one conversation on the page, its composer, and what can be done with it: send, stop, retry, edit.

import { announce, h, icon, iconButton, one } from "./dom.js";
import { ReplyView, copyFrom, userView } from "./message.js";
import { newId } from "./store.js";

const IDEAS = [
  ["Explain", "Explain how a mixture-of-experts layer routes tokens, with the formula for the gate."],
  ["Write code", "Write a Python function that merges overlapping intervals, with three tests."],
  ["Think it through", "Three switches outside a closed room, one lamp inside. One visit. Which switch is it?"],
];

const mouse = matchMedia("(hover: hover)");

export class Chat {
  #views = new Map(); // message id -> view of a reply
  #frame = 0;
  #stuck = true; // at the end of the text: stays there as it grows

  constructor({ store, replies, created, needsModel }) {
    Object.assign(this, { store, replies, created, needsModel, conversation: null });
    this.scroll = one("#scroll");
    this.list = one("#messages");
    this.prompt = one("#prompt");
    this.button = one("#send");
    this.end = one("#to-end");
    this.end.append(icon("down"));
    this.end.setAttribute("aria-label", "To the end");
    this.end.addEventListener("click", () => this.#toEnd());
    this.scroll.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    this.list.addEventListener("click", (event) => {
      const button = event.target.closest(".copy-code");
      if (button) copyFrom(button, one("code", button.closest("figure")).textContent);
    });
    one("#composer").addEventListener("submit", (event) => (event.preventDefault(), this.#act()));
    this.prompt.addEventListener("input", () => this.#typed());
    this.prompt.addEventListener("keydown", (event) => {
      const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && mouse.matches; // on a phone Enter breaks the line
      if (sends) event.preventDefault(), this.#act({ key: true });
      if (event.key === "Escape") this.replies.stop(this.conversation);
    });
    replies.addEventListener("change", ({ detail }) => this.#changed(detail));
    new ResizeObserver(() => this.#stuck && this.#toEnd()).observe(this.list);
  }

  /** Shows a conversation, or with null an empty one that is kept from its first message on. */
  show(conversation) {
    this.conversation = conversation;
    this.draw();
    this.#stuck = true;
    this.#toEnd();
  }

  draw() {
    this.#views.clear();
    const messages = this.conversation?.messages ?? [];
    this.list.replaceChildren(...(messages.length ? messages.map((message) => this.#view(message)) : [this.#welcome()]));
    this.#mark();
  }

  focus() {
    if (mouse.matches) this.prompt.focus({ preventScroll: true }); // on a phone the keyboard would cover the page
  }

  #view(message) {
    if (message.role === "user") return userView(message, { edit: (text) => this.#edit(message, text) });
    const view = new ReplyView(message, { retry: () => this.#retry(message) });
    this.#views.set(message.id, view);
    return view.element;
  }

  #welcome() {
    const idea = ([title, text]) =>
      h("button", { type: "button", click: () => ((this.prompt.value = text), this.#typed(), this.prompt.focus()) }, h("strong", {}, title), h("span", {}, text));
    return h("div", { class: "welcome" }, h("h1", {}, "What shall we work on?"),
      h("p", {}, "Everything stays between this browser and this server."), h("div", { class: "ideas" }, ...IDEAS.map(idea)));
  }

  #typed() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight, innerHeight * 0.4)}px`;
    this.#mark();
  }

  /** The composer's button: send, or stop while a reply comes. */
  #act({ key = false } = {}) {
    if (this.replies.running(this.conversation)) {
      if (!key) this.replies.stop(this.conversation);
      return;
    }
    const text = this.prompt.value.trim();
    if (!text || !this.needsModel()) return;
    this.prompt.value = "";
    this.#typed();
    this.#send(text);
  }

  #send(text) {
    const fresh = !this.conversation;
    const conversation = (this.conversation ??= this.store.create());
    conversation.title ||= text.split("\n")[0].slice(0, 80);
    conversation.messages.push({ id: newId(), role: "user", content: text, created: Date.now() });
    this.store.save(conversation, { touch: true });
    if (fresh) this.created(conversation);
    this.#ask();
  }

  #ask() {
    this.#stuck = true;
    this.draw();
    this.replies.start(this.conversation);
  }

  #cut(message, { itself }) {
    const { messages } = this.conversation;
    messages.length = messages.indexOf(message) + (itself ? 0 : 1);
  }

  #retry(message) {
    if (this.replies.running(this.conversation) || !this.needsModel()) return;
    this.#cut(message, { itself: true });
    this.#ask();
    this.focus();
  }

  #edit(message, text) {
    if (this.replies.running(this.conversation)) this.replies.stop(this.conversation);
    this.#cut(message, { itself: true });
    if (!this.conversation.messages.length) this.conversation.title = "";
    this.#send(text);
  }

  #changed({ conversation, message, what }) {
    if (what === "end") announce(message.state === "failed" ? `Failed: ${message.error.message}` : message.state === "stopped" ? "Stopped" : "Reply complete");
    if (what === "start") announce("Reply started");
    if (conversation !== this.conversation) return;
    if (what === "start") {
      this.list.append(this.#view(message));
      this.#mark();
    } else if (what === "end") {
      this.#views.get(message.id)?.update();
      this.#mark();
    } else this.#frame ||= requestAnimationFrame(() => this.#drawn());
  }

  #drawn() {
    this.#frame = 0;
    const message = this.conversation?.messages.at(-1);
    if (message) this.#views.get(message.id)?.update();
  }

  /** What depends on whether a reply is coming. */
  #mark() {
    const running = this.replies.running(this.conversation);
    const label = running ? "Stop" : "Send";
    one("#composer .hint").textContent = running ? "Esc stops" : "Enter sends, Shift+Enter breaks the line";
    if (this.button.title !== label) this.button.replaceChildren(icon(running ? "stop" : "send"));
    this.button.title = label;
    this.button.setAttribute("aria-label", label);
    this.button.disabled = !running && !this.prompt.value.trim();
    const last = this.conversation?.messages.at(-1);
    for (const [id, view] of this.#views) view.last = id === last?.id && !running;
    one(".unanswered", this.list)?.remove();
    if (last?.role === "user" && !running)
      this.list.append(h("div", { class: "unanswered" }, iconButton("retry", "Ask again", () => this.#ask(), { class: "icon-button retry" })));
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroll;
    this.#stuck = scrollHeight - scrollTop - clientHeight < 60;
    this.end.hidden = this.#stuck;
  }

  #toEnd() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
    this.end.hidden = true;
  }
}
