// The page: puts its parts together, and keeps the address in step with what is shown (#/c/ID a conversation, #/live the live
// state), so that reloading, the back button and a bookmark do what one expects.

import { Chat } from "./chat.js";
import { h, one, toast } from "./dom.js";
import { Replies } from "./reply.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { StateView } from "./state.js";
import { Store, loadSettings } from "./store.js";
import { request } from "./stream.js";

const settings = loadSettings();
const store = new Store();
const replies = new Replies(store, settings);
const state = new StateView(settings);
const drawer = new Settings(settings, changed);
const sidebar = new Sidebar({ store, replies, open, fresh: () => open(null) });
const chat = new Chat({ store, replies, created, needsModel });
const model = one("#model");
const thinking = one("#thinking");
const tabs = [one("#tab-chat"), one("#tab-live")];

function open(id) {
  const address = id ? `#/c/${id}` : "#/";
  if (location.hash === address) route();
  else location.hash = address;
  if (!id) chat.focus();
}

/** A first message was sent: the conversation has an address now, and is shown already. */
function created(conversation) {
  history.pushState(null, "", `#/c/${conversation.id}`);
  mark(conversation);
}

function mark(conversation) {
  sidebar.current = conversation?.id ?? null;
  sidebar.draw();
  document.title = conversation?.title ? `${conversation.title} – Jevons` : "Jevons";
}

function route() {
  const live = location.hash === "#/live";
  tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", String((i === 1) === live));
    tab.tabIndex = (i === 1) === live ? 0 : -1;
  });
  one("#chat").hidden = live;
  one("#live").hidden = !live;
  state.show(live);
  if (live) return void sidebar.draw();
  const id = /^#\/c\/(\w+)$/.exec(location.hash)?.[1];
  const conversation = store.conversations.get(id) ?? null;
  if (conversation !== chat.conversation || !one("#messages").childElementCount) chat.show(conversation);
  mark(conversation);
}

tabs[0].addEventListener("click", () => open(chat.conversation?.id));
tabs[1].addEventListener("click", () => (location.hash = "#/live"));
one(".tabs").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = tabs[tabs.indexOf(document.activeElement) === 0 ? 1 : 0];
  other.focus();
  other.click();
});

function notice(...content) {
  one("#notice").replaceChildren(...content);
  one("#notice").hidden = !content.length;
}

const button = (text, click) => h("button", { type: "button", class: "quiet", click }, text);

/** The models that the key may use; says what to do if there are none. */
async function loadModels() {
  let names = [];
  try {
    const response = await request("v1/models", { key: settings.key });
    names = (await response.json()).data.map((entry) => entry.id);
    notice();
  } catch (error) {
    if (error.status === 401) notice("This server asks for a key.", button("Enter key", () => drawer.open("key")));
    else notice(error.message, button("Try again", loadModels));
  }
  model.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  model.hidden = !names.length;
  if (names.length && !names.includes(settings.model)) drawer.set("model", names[0]);
  model.value = settings.model;
}

function needsModel() {
  if (settings.model) return true;
  loadModels();
  return false;
}

let keyTimer = 0;

function changed(name) {
  if (name === "thinking") thinking.value = settings.thinking;
  if (name !== "key") return;
  clearTimeout(keyTimer);
  keyTimer = setTimeout(loadModels, 500); // once the key is typed
}

model.addEventListener("change", () => drawer.set("model", model.value));
thinking.addEventListener("change", () => drawer.set("thinking", thinking.value));
thinking.value = settings.thinking;

replies.addEventListener("change", ({ detail }) => detail.what !== "piece" && sidebar.draw());
store.addEventListener("failed", ({ detail }) => toast(`This browser could not keep the conversation: ${detail.message}`));
store.addEventListener("changed", ({ detail }) => {
  sidebar.draw();
  if (!detail.includes(chat.conversation?.id)) return;
  chat.conversation = store.conversations.get(chat.conversation.id) ?? null;
  chat.draw();
});

addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") event.preventDefault(), open(null);
});

if (!(await store.open())) toast("This browser keeps nothing here: conversations last until this tab is closed.");
route();
chat.focus();
await loadModels();
