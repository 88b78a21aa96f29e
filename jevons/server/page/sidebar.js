// The list of conversations: search, rename, delete with a way back, export and import. On a phone it is a drawer.

import { download, h, icon, iconButton, one, toast } from "./dom.js";
import { day } from "./format.js";
import { newId } from "./store.js";

const phone = matchMedia("(max-width: 760px)");

export class Sidebar {
  constructor({ store, replies, open, fresh }) {
    Object.assign(this, { store, replies, open, current: null });
    this.element = one("#sidebar");
    this.list = one("#conversations");
    this.search = one("#search");
    one("#new").append(icon("plus"), "New chat");
    one("#new").addEventListener("click", () => (this.hide(), fresh()));
    this.search.addEventListener("input", () => this.draw());
    one("#export-all").addEventListener("click", () => this.#export(store.list(), "jevons-conversations"));
    one("#import").addEventListener("click", () => one("#import-file").click());
    one("#import-file").addEventListener("change", (event) => this.#import(event.target));
    this.toggle = iconButton("menu", "Conversations", () => this.#flip());
    one("#bar").prepend(this.toggle);
    one("#backdrop").addEventListener("click", () => this.hide());
    this.element.addEventListener("keydown", (event) => event.key === "Escape" && phone.matches && (this.hide(), this.toggle.focus()));
    phone.addEventListener("change", () => this.#settle(!phone.matches));
    this.#settle(!phone.matches);
  }

  #flip() {
    this.#settle(!this.shown);
    if (this.shown && phone.matches) one("#new").focus();
  }

  /** On a phone, when something was chosen. */
  hide() {
    if (phone.matches) this.#settle(false);
  }

  #settle(shown) {
    this.shown = shown;
    document.body.classList.toggle("with-sidebar", shown);
    this.element.inert = !shown;
    this.toggle.setAttribute("aria-expanded", shown);
  }

  draw() {
    const found = this.store.list(this.search.value);
    const groups = new Map();
    for (const conversation of found) {
      const heading = day(conversation.updated);
      groups.set(heading, [...(groups.get(heading) ?? []), conversation]);
    }
    const nodes = [...groups].flatMap(([heading, members]) => [h("h2", {}, heading), h("ul", {}, ...members.map((c) => this.#item(c)))]);
    if (!nodes.length) nodes.push(h("p", { class: "empty" }, this.search.value ? "Nothing found." : "Your conversations will be here."));
    this.list.replaceChildren(...nodes);
  }

  #item(conversation) {
    const title = conversation.title || "New chat";
    const here = conversation.id === this.current;
    const name = h("button", { type: "button", class: "name", title, "aria-current": here ? "page" : null, click: () => (this.hide(), this.open(conversation.id)) },
      h("span", {}, title), this.replies.running(conversation) && h("span", { class: "dot", title: "A reply is coming" }));
    const item = h("li", { class: here ? "here" : null }, name, h("span", { class: "tools" },
      iconButton("edit", `Rename "${title}"`, () => this.#rename(item, conversation)),
      iconButton("save", `Export "${title}"`, () => this.#export([conversation], `jevons-${conversation.id}`)),
      iconButton("trash", `Delete "${title}"`, () => this.#delete(conversation))));
    return item;
  }

  #rename(item, conversation) {
    const input = h("input", { type: "text", "aria-label": "Title", maxlength: "120" });
    input.value = conversation.title;
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      if (keep && input.value.trim()) {
        conversation.title = input.value.trim();
        this.store.save(conversation);
      }
      this.draw();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") event.stopPropagation(), finish(false);
    });
    input.addEventListener("blur", () => finish(true));
    item.replaceChildren(input);
    input.select();
  }

  #delete(conversation) {
    this.replies.stop(conversation);
    this.store.delete(conversation.id);
    if (conversation.id === this.current) this.open(null);
    this.draw();
    toast("Conversation deleted", "Undo", () => {
      this.store.save(conversation);
      this.draw();
      this.open(conversation.id);
    });
  }

  #export(conversations, name) {
    download(`${name}.json`, JSON.stringify({ jevons: 1, conversations }, null, 1));
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    let conversations = [];
    try {
      conversations = JSON.parse(await file.text()).conversations.map(imported);
    } catch (error) {
      return toast(`This file is not an export of this page: ${error.message}`);
    }
    for (const conversation of conversations) this.store.save(conversation);
    this.draw();
    toast(`${conversations.length} conversation${conversations.length === 1 ? "" : "s"} imported`);
  }
}

/** A conversation of a file, checked, under a new name so that nothing here is overwritten. */
function imported({ title, created, updated, messages }) {
  const text = (value) => (typeof value === "string" ? value : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const read = (m) => {
    if (m.role !== "user" && m.role !== "assistant") throw new Error(`role ${m.role}`);
    const message = { id: newId(), role: m.role, content: text(m.content), created: time(m.created) };
    if (m.role === "user") return message;
    const known = Object.fromEntries(["model", "thinkingSeconds", "firstToken", "duration", "finish", "usage"].filter((k) => k in m).map((k) => [k, m[k]]));
    return { ...message, ...known, reasoning: text(m.reasoning), state: m.state === "stopped" ? "stopped" : "done" };
  };
  return { id: newId(), title: text(title), created: time(created), updated: time(updated), messages: messages.map(read) };
}
