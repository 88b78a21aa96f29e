// Elements from plain data. Everything the page shows, also what a model wrote, becomes a tree of strings and
// [tag, attributes, ...children] arrays, and this file alone turns trees into nodes, with createElement and text nodes.
// No markup is ever parsed (the server's policy asks the browser to refuse it), so a model's text cannot become code.

const SPACE = { svg: "http://www.w3.org/2000/svg", math: "http://www.w3.org/1998/Math/MathML" };

/** The DOM node of a tree. Values that are functions become event listeners, false and null leave an attribute out. */
export function build(tree, space = null) {
  if (tree instanceof Node) return tree;
  if (!Array.isArray(tree)) return document.createTextNode(tree ?? "");
  const [tag, attributes, ...children] = tree;
  space = SPACE[tag] ?? space;
  const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  for (const child of children) if (child != null && child !== false) element.append(build(child, space));
  return element;
}

export const h = (tag, attributes, ...children) => build([tag, attributes, ...children]);
export const one = (selector, root = document) => root.querySelector(selector);

// outlines on a 24 x 24 grid
const ICON = {
  menu: "M4 7h16M4 12h16M4 17h10",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  down: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 13l4 4L19 7",
  retry: "M4 12a8 8 0 1 0 2.6-5.9M4 4v4h4",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  gear: "M4 8h8M18 8h2M4 16h2M12 16h8M12.5 8a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0M6.5 16a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  close: "M6 6l12 12M18 6L6 18",
  chevron: "M9 6l6 6-6 6",
};

export const icon = (name) =>
  build(["svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, ["path", { d: ICON[name] }]]);

/** A button with an icon; its label is its tooltip and what screen readers say. */
export const iconButton = (name, label, click, extra = {}) =>
  h("button", { type: "button", class: "icon-button", title: label, "aria-label": label, click, ...extra }, icon(name));

/** Tells screen readers what changed, without reading a streaming reply word by word. */
export function announce(text) {
  one("#status").textContent = text;
}

let toastTimer = 0;

/** A short message at the bottom, with one action, e.g. to undo. */
export function toast(text, action = null, act = null) {
  const box = one("#toast");
  const close = () => (box.hidden = true);
  const undo = action && h("button", { type: "button", click: () => (close(), act()) }, action);
  box.replaceChildren(h("span", {}, text), ...(undo ? [undo] : []));
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(close, 7000);
}

/** To the clipboard; pages served without TLS on another address than localhost have no navigator.clipboard. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "hidden-copy", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Hands the person a file that was made in the browser. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
