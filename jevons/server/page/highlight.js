// Code highlighting: one tokenizer for all languages. A language is a few lists (comments, quotes, keywords), from which one
// sticky regular expression is made at first use. No grammar: names are told apart by what is around them. Good enough to
// read by, small, and linear in the code's length, as it runs on every frame while a reply streams.

const words = (text) => new Set(text.split(" "));

const C_FLOW = "if else for while do switch case default break continue return goto";
const C_TYPES = "void int long short char float double bool unsigned signed const static struct enum union sizeof";
const OOP = "class new this super public private protected static final abstract extends implements interface import package try catch finally throw throws instanceof";

const LANGUAGES = {
  python: {
    line: "#", quotes: ["'''", '"""', "'", '"'], prefix: "[rRbBfFuU]{0,2}", meta: "@[\\w.]+",
    keywords: "and as assert async await break class continue def del elif else except finally for from global if import in is lambda match case nonlocal not or pass raise return try while with yield",
    constants: "True False None self cls",
  },
  javascript: {
    line: "//", block: true, quotes: ["'", '"', "`"],
    keywords: "async await break case catch class const continue debugger default delete do else export extends finally for from function if import in instanceof let new of return static super switch throw try typeof var void while with yield interface type enum implements private public protected readonly namespace declare as keyof satisfies abstract",
    constants: "true false null undefined NaN Infinity this",
  },
  c: {
    line: "//", block: true, quotes: ["'", '"'], meta: "#\\s*(?:include|define|ifdef|ifndef|if|else|elif|endif|pragma|undef)\\b[^\\n]*",
    keywords: `${C_FLOW} ${C_TYPES} ${OOP} auto typedef extern inline volatile template typename namespace using virtual override constexpr operator friend delete noexcept decltype concept requires co_await co_return co_yield foreach string var async await get set lock readonly boolean byte`,
    constants: "true false null nullptr NULL this",
  },
  go: {
    line: "//", block: true, quotes: ["'", '"', "`"],
    keywords: `${C_FLOW} chan const defer fallthrough func go import interface map package range select struct type var string int int32 int64 uint byte rune bool float64 error any`,
    constants: "true false nil iota",
  },
  rust: {
    line: "//", block: true, quotes: ['"'], meta: "#!?\\[[^\\]\\n]{0,200}\\]|\\b\\w+!",
    keywords: "as async await break const continue crate dyn else enum extern fn for if impl in let loop match mod move mut pub ref return static struct super trait type unsafe use where while i8 i16 i32 i64 u8 u16 u32 u64 usize isize f32 f64 bool char str String Vec Option Result Box",
    constants: "true false self Self None Some Ok Err",
  },
  swift: {
    line: "//", block: true, quotes: ['"""', '"', "'"],
    keywords: `${C_FLOW} ${OOP} func fun let var val when guard in is as where extension protocol init deinit self override open data object sealed companion suspend struct enum lateinit inout mutating async await`,
    constants: "true false nil null it",
  },
  ruby: {
    line: "#", quotes: ["'", '"'], meta: "[@:]\\w+",
    keywords: "begin break case class def do else elsif end ensure for if in module next redo rescue retry return then unless until when while yield require attr_accessor attr_reader lambda proc puts",
    constants: "true false nil self",
  },
  bash: {
    line: "#", quotes: ["'", '"'], meta: "\\$(?:\\w+|\\{[^}\\n]{0,200}\\}|[#?@*!$-])|(?<=\\s)--?[\\w-]+",
    keywords: "if then else elif fi for while until do done case esac in function return local export set unset source alias exit cd echo sudo",
    constants: "true false",
  },
  sql: {
    line: "--", block: true, quotes: ["'", '"'], fold: true,
    keywords: "select from where and or not in is as join left right inner outer full cross on group by order having limit offset insert into values update set delete create table index view drop alter add primary key foreign references unique default constraint case when then else end union all distinct exists between like with recursive over partition asc desc begin commit rollback int integer text varchar real boolean date timestamp",
    constants: "null true false",
  },
  lua: {
    line: "--", quotes: ["'", '"'],
    keywords: "and break do else elseif end for function goto if in local not or repeat return then until while",
    constants: "true false nil self",
  },
  haskell: {
    line: "--", quotes: ['"'],
    keywords: "case class data deriving do else if import in infixl infixr instance let module newtype of then type where",
    constants: "True False Nothing Just Left Right",
  },
  r: {
    line: "#", quotes: ["'", '"'], keywords: "if else for while repeat function return next break in library", constants: "TRUE FALSE NULL NA Inf NaN",
  },
  php: {
    line: "//", block: true, quotes: ["'", '"'], meta: "\\$\\w+|<\\?php|\\?>",
    keywords: `${C_FLOW} ${OOP} function echo foreach as use namespace array fn match trait const require include elseif`, constants: "true false null",
  },
  json: { line: "//", quotes: ['"'], key: '"(?:\\\\.|[^"\\\\\\n])*"(?=\\s*:)', constants: "true false null", keywords: "" },
  yaml: { line: "#", quotes: ["'", '"'], key: "^[ \\t-]{0,40}[\\w./-]{1,80}(?=:(?:\\s|$))", constants: "true false null yes no on off", keywords: "" },
  toml: { line: "#", quotes: ['"""', "'", '"'], key: "^[ \\t]*[\\w.-]{1,80}(?=[ \\t]*=)", meta: "^[ \\t]*\\[[^\\n]*\\]", constants: "true false", keywords: "" },
  css: { block: true, quotes: ["'", '"'], key: "[\\w-]{1,40}(?=[ \\t]*:[^;{}]{0,200};)", meta: "@[\\w-]+|[.#][A-Za-z][\\w-]*|#[0-9a-fA-F]{3,8}\\b", keywords: "", constants: "" },
  html: { markup: true, quotes: ["'", '"'], keywords: "", constants: "" },
  diff: { diff: true },
};

const ALIASES = {
  py: "python", python3: "python", pycon: "python", js: "javascript", jsx: "javascript", ts: "javascript", tsx: "javascript", typescript: "javascript",
  mjs: "javascript", cpp: "c", "c++": "c", cc: "c", h: "c", hpp: "c", cuda: "c", cu: "c", java: "c", cs: "c", csharp: "c", "c#": "c", "objective-c": "c",
  scala: "swift", kotlin: "swift", kt: "swift", dart: "swift", rs: "rust", golang: "go", rb: "ruby", sh: "bash", shell: "bash", zsh: "bash", console: "bash", dockerfile: "bash",
  postgresql: "sql", mysql: "sql", sqlite: "sql", hs: "haskell", yml: "yaml", ini: "toml", jsonc: "json", json5: "json", jsonl: "json", scss: "css", xml: "html",
  svg: "html", vue: "html", patch: "diff",
};

const escape = (text) => text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");

function pattern(language) {
  const parts = [];
  const add = (name, source) => source && parts.push(`(?<${name}>${source})`);
  const comments = [];
  if (language.block) comments.push("/\\*[^]*?(?:\\*/|$(?![^]))");
  if (language.markup) comments.push("<!--[^]*?(?:-->|$(?![^]))");
  if (language.line) comments.push(`${language.line === "#" ? "(?<![\\w$&])#" : escape(language.line)}[^\\n]*`);
  add("comment", comments.join("|"));
  add("key", language.key);
  if (language.markup) add("keyword", "</?[A-Za-z][\\w:-]*|/?>");
  const strings = language.quotes.map((q) => {
    const quote = escape(q);
    if (q.length === 3) return `${quote}[^]*?(?:${quote}|$(?![^]))`;
    return `${quote}(?:\\\\[^]|[^${quote}\\\\${q === "`" ? "" : "\\n"}])*${quote}?`;
  });
  add("string", language.markup ? `(?<==)(?:${strings.join("|")})` : `${language.prefix ?? ""}(?:${strings.join("|")})`);
  add("meta", language.meta);
  add("number", "\\b0[xXbBoO][\\da-fA-F_]+\\b|(?<![\\w.])\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?\\w{0,3}");
  if (language.markup) add("attribute", "[A-Za-z][\\w:-]{0,40}(?==)");
  add("name", "[A-Za-z_][\\w]*");
  return new RegExp(parts.join("|"), "gm");
}

const compiled = new Map();

export const languageOf = (info) => {
  const name = info.trim().toLowerCase().split(/[\s,{:]/)[0];
  const known = ALIASES[name] ?? name;
  return Object.hasOwn(LANGUAGES, known) ? known : null;
};

/** Code as a list of strings and ["span", {class}, text]; together they are the code again, unchanged. */
export function highlight(code, info) {
  const known = languageOf(info);
  if (!known) return [code];
  const language = LANGUAGES[known];
  if (language.diff) return diff(code);
  if (!compiled.has(known)) compiled.set(known, { regex: pattern(language), keywords: words(language.keywords), constants: words(language.constants) });
  const { regex, keywords, constants } = compiled.get(known);
  const out = [];
  let end = 0;
  for (const match of code.matchAll(regex)) {
    const text = match[0];
    let [kind] = Object.entries(match.groups).find(([, value]) => value !== undefined);
    if (kind === "name") {
      const name = language.fold ? text.toLowerCase() : text;
      if (keywords.has(name)) kind = "keyword";
      else if (constants.has(name)) kind = "constant";
      else if (/^\s*\(/.test(code.slice(match.index + text.length, match.index + text.length + 4))) kind = "call";
      else continue;
    }
    if (match.index > end) out.push(code.slice(end, match.index));
    out.push(["span", { class: `hl-${kind}` }, text]);
    end = match.index + text.length;
  }
  if (end < code.length) out.push(code.slice(end));
  return out;
}

function diff(code) {
  const kinds = { "+": "string", "-": "deleted", "@": "meta" };
  return code.split(/(?<=\n)/).map((line) => (kinds[line[0]] ? ["span", { class: `hl-${kinds[line[0]]}` }, line] : line));
}
