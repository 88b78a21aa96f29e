// What the browser keeps: conversations in IndexedDB, one record each, and settings in localStorage. Nothing is kept on the server.
//
// All conversations are held in memory too, so that listing and searching are plain loops. Writes are gathered for a third
// of a second: while a reply streams its conversation is written a few times a second. A page that is left cannot wait for a
// database; what is not written yet then goes to sessionStorage, which is written at once, and is taken up by the reload.
// Other tabs of the same browser hear of a write and read that record again.

const NAME = "conversations";
const DELAY = 300; // ms
const LATE = "jevons.late";

export const DEFAULTS = {
  model: "", key: "", theme: "auto", system: "", thinking: "auto", effort: "", budget: "",
  temperature: "", top_p: "", top_k: "", min_p: "", max_tokens: "", seed: "",
};

export function loadSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem("jevons.settings") ?? "{}") };
  } catch {
    return { ...DEFAULTS }; // no localStorage here, or not ours: begin with defaults
  }
}

export function saveSettings(settings) {
  try {
    localStorage.setItem("jevons.settings", JSON.stringify(settings));
  } catch {
    return false;
  }
  return true;
}

/** Random and also there on pages without TLS, unlike crypto.randomUUID. */
export const newId = () => [...crypto.getRandomValues(new Uint8Array(8))].map((b) => b.toString(16).padStart(2, "0")).join("");

const settle = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class Store extends EventTarget {
  #db = null;
  #dirty = new Set();
  #writing = new Set();
  #timer = 0;
  #channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("jevons") : null;
  conversations = new Map();

  /** Opens the database and reads all; without one (some private windows) conversations live until the tab is closed. */
  async open() {
    try {
      const request = indexedDB.open("jevons", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(NAME, { keyPath: "id" });
      this.#db = await settle(request);
    } catch {
      return false;
    }
    const kept = await settle(this.#table("readonly").getAll());
    const late = JSON.parse(sessionStorage.getItem(LATE) ?? "[]");
    sessionStorage.removeItem(LATE);
    for (const conversation of [...kept, ...late]) {
      for (const message of conversation.messages) {
        if (message.state === "streaming") message.state = "interrupted"; // by a reload; what had come is here
      }
      this.conversations.set(conversation.id, conversation);
    }
    for (const conversation of late) this.save(conversation);
    this.#channel?.addEventListener("message", (event) => this.#refresh(event.data));
    addEventListener("pagehide", () => this.#leave());
    addEventListener("pageshow", () => sessionStorage.removeItem(LATE)); // left and back without a reload: all of it is here
    return true;
  }

  /** Latest first, those that hold all of the words of `query` in their title or text. */
  list(query = "") {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const holds = (c) => {
      const text = [c.title, ...c.messages.map((m) => m.content)].join("\n").toLowerCase();
      return words.every((word) => text.includes(word));
    };
    return [...this.conversations.values()].filter(holds).sort((a, b) => b.updated - a.updated);
  }

  create() {
    const now = Date.now();
    const conversation = { id: newId(), title: "", created: now, updated: now, messages: [] };
    this.conversations.set(conversation.id, conversation);
    return conversation; // written with its first message
  }

  save(conversation, { touch = false } = {}) {
    if (touch) conversation.updated = Date.now();
    this.conversations.set(conversation.id, conversation);
    this.#dirty.add(conversation.id);
    this.#timer ||= setTimeout(() => this.flush(), DELAY);
  }

  delete(id) {
    this.conversations.delete(id);
    this.#dirty.add(id);
    return this.flush();
  }

  /** Writes what has changed; one transaction. */
  async flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const ids = [...this.#dirty];
    this.#dirty.clear();
    if (!this.#db || !ids.length) return;
    for (const id of ids) this.#writing.add(id);
    const table = this.#table("readwrite");
    const done = ids.map((id) => {
      const conversation = this.conversations.get(id);
      return settle(conversation ? table.put(conversation) : table.delete(id));
    });
    try {
      await Promise.all(done);
    } catch (error) {
      this.dispatchEvent(new CustomEvent("failed", { detail: error })); // the disk is full: the page says so
      return;
    } finally {
      for (const id of ids) this.#writing.delete(id);
    }
    this.#channel?.postMessage(ids);
  }

  #leave() {
    const ids = new Set([...this.#dirty, ...this.#writing]);
    const late = [...ids].map((id) => this.conversations.get(id)).filter(Boolean);
    try {
      if (late.length) sessionStorage.setItem(LATE, JSON.stringify(late));
    } catch {
      // too long for sessionStorage (some megabytes): what the last write had is kept
    }
    this.flush();
  }

  async #refresh(ids) {
    for (const id of ids) {
      const record = await settle(this.#table("readonly").get(id));
      const here = this.conversations.get(id);
      if (here?.messages.some((m) => m.state === "streaming")) continue; // this tab is writing it
      if (record) this.conversations.set(id, record);
      else this.conversations.delete(id);
    }
    this.dispatchEvent(new CustomEvent("changed", { detail: ids }));
  }

  #table(mode) {
    return this.#db.transaction(NAME, mode).objectStore(NAME);
  }
}
