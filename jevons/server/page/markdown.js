// Markdown as models write it, to trees for dom.js: headings, lists, tables, quotes, fenced code, emphasis, links, TeX.
//
// Two steps. `blocks` cuts a text into its top-level blocks by lines alone, each with its source, so that a page that shows a
// streaming reply can keep what it built for all blocks but the last. `tree` reads one block. Both are linear in the text, but
// for nesting, which is bounded: the text is a model's, and may be hostile. HTML is shown as it is written, never interpreted.
// Links lead to http, https and mailto only. Images become links: loading them would tell their host what is read here.
// Unlike CommonMark: no reference links, no indented code (models indent by accident), "text\n---" is a rule, not a heading.

import { highlight } from "./highlight.js";
import { math } from "./math.js";

const NESTING = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+(?=\S)|[ \t]*$)/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MATH = /^ {0,3}(\$\$|\\\[|\\begin\{(?:equation|align|gather|aligned|eqnarray|multline)\*?\})/;
const URL = /https?:\/\/[^\s<>"`\\]+/y;

const indentOf = (line) => /^[ \t]*/.exec(line)[0].replace(/\t/g, "    ").length;
const blank = (line) => line.trim() === "";
const unindent = (line, width) => line.replace(/^\t/, "    ").slice(Math.min(width, indentOf(line)));

/** Top-level blocks: {kind, source, ...}. */
export function blocks(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const out = [];
  let i = 0;
  while (i < lines.length) {
    if (blank(lines[i])) {
      i++;
      continue;
    }
    const start = i;
    const block = read(lines, i, depth);
    i = block.end;
    out.push({ ...block, source: lines.slice(start, i).join("\n") });
  }
  return out;
}

/** Whether a line ends a paragraph above it. A number other than 1 does not begin a list there. */
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || MATH.test(line)) return true;
  const item = ITEM.exec(line);
  return Boolean(item) && item[0].length < line.length && (!/\d/.test(item[2]) || Number.parseInt(item[2], 10) === 1);
}

function read(lines, i, depth) {
  const line = lines[i];
  let match = FENCE.exec(line);
  if (match) return fenced(lines, i, match);
  match = HEADING.exec(line);
  if (match) return { kind: "heading", end: i + 1, level: match[1].length, text: (match[2] ?? "").replace(/[ \t]+#+[ \t]*$|^#+[ \t]*$/, "") };
  if (RULE.test(line)) return { kind: "rule", end: i + 1 };
  match = MATH.exec(line);
  const formula = match && displayed(lines, i, match[1]);
  if (formula) return formula;
  if (QUOTE.test(line) && depth < NESTING) {
    let end = i;
    while (end < lines.length && (QUOTE.test(lines[end]) || (!blank(lines[end]) && !interrupts(lines[end])))) end++;
    return { kind: "quote", end, text: lines.slice(i, end).map((l) => l.replace(/^ {0,3}> ?/, "")).join("\n"), depth };
  }
  match = ITEM.exec(line);
  if (match && depth < NESTING) return list(lines, i, match, depth);
  if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && DELIMITERS.test(lines[i + 1])) {
    const aligns = cells(lines[i + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : "left"));
    if (cells(line).length === aligns.length) {
      let end = i + 2;
      while (end < lines.length && lines[end].includes("|") && !blank(lines[end])) end++;
      return { kind: "table", end, head: cells(line), aligns, rows: lines.slice(i + 2, end).map(cells) };
    }
  }
  let end = i + 1;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines[end])) end++;
  return { kind: "paragraph", end, text: lines.slice(i, end).map((l) => l.replace(/^[ \t]+/, "")).join("\n") };
}

function fenced(lines, i, [, mark, info]) {
  const indent = indentOf(lines[i]);
  let end = i + 1;
  const closes = (line) => /^[ \t]*(`{3,}|~{3,})[ \t]*$/.exec(line)?.[1].startsWith(mark);
  while (end < lines.length && !closes(lines[end])) end++;
  const text = lines.slice(i + 1, end).map((l) => unindent(l, indent)).join("\n");
  return { kind: "code", end: Math.min(end + 1, lines.length), info: info.trim(), text };
}

/** A formula on its own lines, or null if text follows it. One that is not closed yet reaches to the end. */
function displayed(lines, i, open) {
  const close = open === "$$" ? "$$" : open === "\\[" ? "\\]" : open.replace("begin", "end");
  const bare = open.startsWith("\\begin");
  const first = lines[i].trimStart().slice(open.length);
  const parts = [];
  for (let end = i; end < lines.length; end++) {
    const line = end === i ? first : lines[end];
    const at = line.indexOf(close);
    if (at >= 0) {
      if (!/^[\s.,;:]*$/.test(line.slice(at + close.length))) return null;
      parts.push(line.slice(0, at));
      const text = parts.join("\n");
      return { kind: "math", end: end + 1, text: bare ? open + text + close : text };
    }
    parts.push(line);
  }
  return { kind: "math", end: lines.length, text: (bare ? open : "") + parts.join("\n") };
}

function list(lines, i, [, , marker], depth) {
  const ordered = /\d/.test(marker);
  const base = indentOf(lines[i]);
  const items = [];
  let loose = false;
  let end = i;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || match[2].at(-1) !== marker.at(-1) || indentOf(lines[end]) > base + 1 || (RULE.test(lines[end]) && end > i)) break;
    const width = match[0].length === lines[end].length ? match[1].length + match[2].length + 1 : match[0].replace(/\t/g, "    ").length;
    const content = [lines[end].slice(match[0].length)];
    let gap = false;
    for (end++; end < lines.length; end++) {
      const line = lines[end];
      const inner = indentOf(line) >= Math.min(width, base + 2);
      if (blank(line)) gap = true;
      else if (inner || (!gap && !interrupts(line) && !ITEM.test(line))) gap = false;
      else break;
      content.push(unindent(line, width));
    }
    while (content.length && blank(content.at(-1))) content.pop();
    const inside = blocks(content.join("\n"), depth + 1);
    // loose if a blank line is between two blocks of an item, or between items
    const more = end < lines.length && ITEM.exec(lines[end])?.[2].at(-1) === marker.at(-1);
    loose ||= (gap && more) || inside.filter((b) => b.kind === "paragraph").length > 1;
    items.push(inside);
  }
  return { kind: "list", end, ordered, start: ordered ? Number.parseInt(marker, 10) : 1, items, loose };
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return (row.match(/(?:\\[^]|`[^`]*`|[^|\\`]|[\\`])*(?:\||$)/g) ?? []).slice(0, -1).map((c) => c.replace(/\|$/, "").replace(/\\\|/g, "|").trim());
}

/** One block as a tree. */
export function tree(block) {
  switch (block.kind) {
    case "heading": return [`h${block.level}`, {}, ...inline(block.text)];
    case "rule": return ["hr", {}];
    case "math": return ["div", { class: "math" }, math(block.text, true)];
    case "code": return code(block);
    case "quote": return ["blockquote", {}, ...blocks(block.text, block.depth + 1).map(tree)];
    case "table": return ["div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table(block)];
    case "list": {
      const item = (inside) => inside.flatMap((b) => (b.kind === "paragraph" && !block.loose ? inline(b.text) : [tree(b)]));
      return [block.ordered ? "ol" : "ul", block.start !== 1 ? { start: block.start } : {}, ...block.items.map((b) => ["li", {}, ...task(item(b))])];
    }
  }
  return ["p", {}, ...inline(block.text)];
}

function task(nodes) {
  const match = typeof nodes[0] === "string" && /^\[([ xX])\] /.exec(nodes[0]);
  if (!match) return nodes;
  return [["input", { type: "checkbox", disabled: true, checked: match[1] !== " ", "aria-label": "Task" }], nodes[0].slice(3), ...nodes.slice(1)];
}

function code({ text, info }) {
  const name = info.split(/[\s,{:]/)[0];
  const copy = ["button", { type: "button", class: "copy-code" }, "Copy"];
  return ["figure", { class: "code" }, ["figcaption", {}, ["span", {}, name || "text"], copy], ["pre", { tabindex: "0" }, ["code", {}, ...highlight(text, info)]]];
}

function table({ head, aligns, rows }) {
  const row = (tag, values) => ["tr", {}, ...aligns.map((align, i) => [tag, { class: align }, ...inline(values[i] ?? "")])];
  return ["table", {}, ["thead", {}, row("th", head)], ["tbody", {}, ...rows.map((values) => row("td", values))]];
}

/** A link's address if it may be followed. */
function address(text) {
  return /^(https?:\/\/|mailto:)/i.test(text) ? text : null;
}

const link = (href, children) => ["a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children];

/** Text inside a block, as a list of strings and trees. */
export function inline(text, depth = 0) {
  const out = [];
  const runs = []; // delimiters: {at: index in out, mark, opens, closes}
  const missing = new Set(); // what was looked for and is not in the rest: not looked for again
  const brackets = depth < NESTING && text.includes("](") ? pairs(text) : new Map();
  let plain = "";
  const push = (node) => {
    if (plain) out.push(plain);
    plain = "";
    if (node) out.push(node);
  };
  const find = (mark, from) => {
    if (missing.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) missing.add(mark);
    return at;
  };
  for (let i = 0; i < text.length; ) {
    const c = text[i];
    const next = text[i + 1];
    if (c === "\\" && (next === "(" || next === "[")) {
      const end = find(next === "(" ? "\\)" : "\\]", i + 2);
      if (end > 0) {
        push(math(text.slice(i + 2, end), next === "["));
        i = end + 2;
        continue;
      }
    }
    if (c === "\\" && next && /[!-/:-@[-`{-~]/.test(next)) {
      plain += next;
      i += 2;
    } else if (c === "\n" || (c === "\\" && next === "\n")) {
      const hard = c === "\\" || plain.endsWith("  ");
      plain = plain.trimEnd();
      push(hard ? ["br", {}] : null);
      if (!hard) plain = "\n";
      i += c === "\\" ? 2 : 1;
    } else if (c === "`") {
      const run = /`+/y;
      run.lastIndex = i;
      const mark = run.exec(text)[0];
      const end = closing(text, mark, i + mark.length, missing);
      if (end < 0) {
        plain += mark;
        i += mark.length;
      } else {
        const body = text.slice(i + mark.length, end).replace(/\n/g, " ");
        push(["code", {}, body.length > 2 && body.startsWith(" ") && body.endsWith(" ") ? body.slice(1, -1) : body]);
        i = end + mark.length;
      }
    } else if (c === "$") {
      const found = dollars(text, i, find);
      if (found) push(math(found.body, found.display));
      else plain += c;
      i = found ? found.end : i + 1;
    } else if ((c === "[" || (c === "!" && next === "[")) && brackets.has(c === "!" ? i + 1 : i)) {
      const open = c === "!" ? i + 1 : i;
      const { close, end, href } = brackets.get(open);
      const label = text.slice(open + 1, close);
      push(address(href) ? link(href, label ? inline(label, depth + 1) : [href]) : ["span", {}, ...inline(label, depth + 1)]);
      i = end;
    } else if (c === "<") {
      const tag = /<br\s*\/?>|<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
      tag.lastIndex = i;
      const match = tag.exec(text);
      if (match) push(match[1] ? link(match[1], [match[1]]) : ["br", {}]);
      else plain += c;
      i += match ? match[0].length : 1;
    } else if (c === "h" && !/\w/.test(text[i - 1] ?? "") && text.startsWith("http", i)) {
      URL.lastIndex = i;
      let href = URL.exec(text)?.[0].replace(/[.,;:!?'*_~]+$/, "");
      if (href?.endsWith(")") && !href.includes("(")) href = href.replace(/\)+[.,;:!?'*_~]*$/, "");
      if (href) push(link(href, [href]));
      else plain += c;
      i += href ? href.length : 1;
    } else if (c === "*" || c === "_" || (c === "~" && next === "~")) {
      let end = i;
      while (text[end] === c) end++;
      push(null);
      runs.push({ at: out.length, ...flanks(text, i, end, c) });
      out.push(text.slice(i, end));
      i = end;
    } else {
      plain += c;
      i++;
    }
  }
  push(null);
  return emphasize(out, runs);
}

/** Where a run of exactly these backticks is next. */
function closing(text, mark, from, missing) {
  if (missing.has(mark)) return -1;
  for (let at = text.indexOf(mark, from); at >= 0; ) {
    let end = at;
    while (text[end] === "`") end++;
    if (end - at === mark.length) return at;
    at = text.indexOf(mark, end);
  }
  missing.add(mark);
  return -1;
}

/** $...$ or $$...$$ at i. A dollar before a space, or closed before a digit, is money. */
function dollars(text, i, find) {
  const display = text[i + 1] === "$";
  const from = i + (display ? 2 : 1);
  if (!display && /[\s$]/.test(text[from] ?? " ")) return null;
  const end = find(display ? "$$" : "$", from);
  if (end <= from || (!display && (/\s|\\/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? "")))) return null;
  return { body: text.slice(from, end), end: end + (display ? 2 : 1), display };
}

/** All [label](address) of a text: from the index of "[" to where each part ends. */
function pairs(text) {
  const found = new Map();
  const open = [];
  const target = /\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\[^]|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "[") open.push(i);
    else if (text[i] === "]" && open.length) {
      const start = open.pop();
      target.lastIndex = i + 1;
      const match = text[i + 1] === "(" ? target.exec(text) : null;
      if (match) found.set(start, { close: i, end: i + 1 + match[0].length, href: match[1] ?? match[2] });
    }
  }
  return found;
}

/** Whether a run of * _ ~ may open and close emphasis, by the characters around it (CommonMark's rules). */
function flanks(text, start, end, mark) {
  const before = text[start - 1] ?? " ";
  const after = text[end] ?? " ";
  const space = /\s/;
  const sign = /[\p{P}\p{S}]/u;
  const left = !space.test(after) && (!sign.test(after) || space.test(before) || sign.test(before));
  const right = !space.test(before) && (!sign.test(before) || space.test(after) || sign.test(after));
  if (mark === "*" && /\d/.test(before) && /\d/.test(after)) return { mark, opens: false, closes: false }; // 2*3*4
  if (mark !== "_") return { mark, opens: left, closes: right };
  return { mark, opens: left && (!right || sign.test(before)), closes: right && (!left || sign.test(after)) };
}

/** Pairs delimiter runs and nests what is between them. Runs wait on one stack a mark, so each is looked at once or twice. */
function emphasize(out, runs) {
  const waiting = { "*": [], _: [], "~": [] };
  const wraps = []; // [from, to, tag], inner before outer
  for (const run of runs) {
    run.count = out[run.at].length;
    const stack = waiting[run.mark];
    while (run.closes && run.count && stack.length && stack.at(-1).at < run.at) {
      const opener = stack.at(-1);
      const size = run.mark === "~" ? 2 : Math.min(2, run.count, opener.count);
      if (size > run.count || size > opener.count) break;
      wraps.push([opener, run, run.mark === "~" ? "del" : size === 2 ? "strong" : "em"]);
      opener.count -= size;
      run.count -= size;
      for (const other of Object.values(waiting)) while (other.length && other.at(-1).at > opener.at) other.pop();
      if (!opener.count) stack.pop();
    }
    if (run.opens && run.count && stack.length < 50) stack.push(run);
  }
  // what each run leaves: the marks not used, then closing tags, then opening tags (or the other way about)
  const opening = new Map();
  const closed = new Map();
  for (const wrap of wraps) {
    (opening.get(wrap[0].at) ?? opening.set(wrap[0].at, []).get(wrap[0].at)).unshift(wrap);
    (closed.get(wrap[1].at) ?? closed.set(wrap[1].at, []).get(wrap[1].at)).push(wrap);
  }
  const levels = [[]];
  const counts = new Map(runs.map((run) => [run.at, run.count]));
  out.forEach((node, at) => {
    if (!counts.has(at)) return levels.at(-1).push(node);
    for (const [, , tag] of closed.get(at) ?? []) {
      const children = levels.pop();
      levels.at(-1).push([tag, {}, ...children]);
    }
    if (counts.get(at)) levels.at(-1).push(node.slice(0, counts.get(at)));
    for (let n = (opening.get(at) ?? []).length; n > 0; n--) levels.push([]);
  });
  return levels[0];
}
