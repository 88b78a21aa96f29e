// TeX to MathML, which browsers lay out themselves: no fonts to load, no layout code, and text that can be copied and read aloud.
//
// The part of TeX that models write: fractions, roots, scripts, limits, accents, delimiters, alphabets, matrices, cases, aligned
// equations. It is read by recursive descent into a tree for dom.js. Nothing throws on bad input: an unknown command is shown by
// its name, what is not closed ends with the text, and nesting beyond DEPTH or a text beyond LENGTH is shown as it is written.
// Not done: macros (\def, \newcommand), tikz, chemistry, line breaking, equation counters.

const LENGTH = 20000;
const DEPTH = 60;

const table = (text) => Object.fromEntries(text.trim().split(/\s+/).map((pair) => pair.split("=")).map(([k, v]) => [k, v || "="]));

const LETTERS = table(`alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ lambda=λ mu=μ nu=ν
xi=ξ pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ omega=ω ell=ℓ hbar=ℏ imath=ı jmath=ȷ wp=℘ partial=∂`);
const UPRIGHT = table(`Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω infty=∞ emptyset=∅ varnothing=∅ nabla=∇ Re=ℜ Im=ℑ
aleph=ℵ top=⊤ bot=⊥ angle=∠ triangle=△ square=□ Box=□ blacksquare=■ checkmark=✓ degree=° dagger=† ddagger=‡ hslash=ℏ ldots=… dots=… dotsc=… dotso=…
cdots=⋯ dotsb=⋯ dotsm=⋯ vdots=⋮ ddots=⋱ prime=′ clubsuit=♣ diamondsuit=♢ heartsuit=♡ spadesuit=♠ S=§ pounds=£ euro=€ _=_ $=$ %=% #=# &=&`);
const OPERATORS = table(`pm=± mp=∓ times=× div=÷ cdot=⋅ ast=∗ star=⋆ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ odot=⊙ cap=∩ cup=∪ setminus=∖ wedge=∧ land=∧
vee=∨ lor=∨ neg=¬ lnot=¬ forall=∀ exists=∃ nexists=∄ le=≤ leq=≤ leqslant=⩽ ge=≥ geq=≥ geqslant=⩾ ne=≠ neq=≠ ll=≪ gg=≫ approx=≈ sim=∼ simeq=≃ cong=≅ equiv=≡
propto=∝ prec=≺ succ=≻ preceq=⪯ succeq=⪰ in=∈ notin=∉ ni=∋ subset=⊂ supset=⊃ subseteq=⊆ supseteq=⊇ subsetneq=⊊ mid=∣ nmid=∤ parallel=∥ perp=⊥ vdash=⊢ models=⊨
to=→ rightarrow=→ leftarrow=← gets=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔ implies=⟹ impliedby=⟸ iff=⟺ mapsto=↦ longrightarrow=⟶ longleftarrow=⟵
Longrightarrow=⟹ longmapsto=⟼ hookrightarrow=↪ uparrow=↑ downarrow=↓ updownarrow=↕ Uparrow=⇑ Downarrow=⇓ nearrow=↗ searrow=↘ rightharpoonup=⇀ rightleftharpoons=⇌
therefore=∴ because=∵ colon=: coloneqq=≔ triangleq=≜ doteq=≐ asymp=≍ lhd=⊲ rhd=⊳ bowtie=⋈ uplus=⊎ sqcup=⊔ sqcap=⊓ amalg=⨿ diamond=⋄ backslash=\\ vert=| Vert=‖ |=‖`);
const LARGE = table("sum=∑ prod=∏ coprod=∐ bigcup=⋃ bigcap=⋂ bigoplus=⨁ bigotimes=⨂ bigvee=⋁ bigwedge=⋀ bigsqcup=⨆");
const INTEGRALS = table("int=∫ iint=∬ iiint=∭ oint=∮");
const FUNCTIONS = new Set(`sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp dim ker deg arg hom erf sgn tr rank diag`.split(" "));
const LIMITS = new Set("lim limsup liminf max min sup inf argmax argmin det gcd lcm Pr injlim projlim".split(" "));
const FENCES = table("lbrace={ rbrace=} langle=⟨ rangle=⟩ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ lvert=| rvert=| lVert=‖ rVert=‖ lbrack=[ rbrack=] lgroup=⟮ rgroup=⟯ {={ }=}");
const ACCENTS = table("hat=^ widehat=^ bar=¯ overline=¯ vec=→ overrightarrow=→ overleftarrow=← tilde=~ widetilde=~ dot=˙ ddot=¨ dddot=⃛ check=ˇ breve=˘ acute=´ grave=` mathring=˚ overbrace=⏞");
const UNDER = table("underline=_ underbrace=⏟");
const SPACES = { ",": 0.167, ":": 0.222, ">": 0.222, ";": 0.278, "!": -0.167, " ": 0.25, quad: 1, qquad: 2, enspace: 0.5, thinspace: 0.167, medspace: 0.222, thickspace: 0.278, negthinspace: -0.167 };
const SIZES = { big: 1.2, Big: 1.8, bigg: 2.4, Bigg: 3 };
const IGNORED = new Set("limits nolimits displaylimits nonumber notag hline allowbreak nobreak relax centering strut mathstrut".split(" "));
const ALPHABET = { mathbf: "bold", textbf: "bold", bf: "bold", boldsymbol: "slanted", bm: "slanted", mathbb: "double", Bbb: "double", mathcal: "script", mathscr: "script", cal: "script" };
Object.assign(ALPHABET, { mathfrak: "fraktur", mathsf: "sans", textsf: "sans", mathtt: "mono", mathrm: "normal", rm: "normal", mathup: "normal", mathit: "italic" });
const TEXT = new Set("text textrm textit textnormal mbox hbox emph textup texttt".split(" "));
const SIGNS = new Set("−+±∓");
const CLOSES = new Set(")]}⟩⌋⌉|‖!");
const FENCED = { pmatrix: "()", bmatrix: "[]", Bmatrix: "{}", vmatrix: "||", Vmatrix: "‖‖", cases: "{.", dcases: "{.", rcases: ".}" };

// where each alphabet's A, a and 0 lie; letters that Unicode had before are elsewhere
const OFFSETS = { bold: [0x1d400, 0x1d41a, 0x1d7ce], slanted: [0x1d468, 0x1d482, 0x1d7ce], script: [0x1d49c, 0x1d4b6], fraktur: [0x1d504, 0x1d51e] };
Object.assign(OFFSETS, { double: [0x1d538, 0x1d552, 0x1d7d8], sans: [0x1d5a0, 0x1d5ba, 0x1d7e2], mono: [0x1d670, 0x1d68a, 0x1d7f6] });
const ELSEWHERE = { script: table("B=ℬ E=ℰ F=ℱ H=ℋ I=ℐ L=ℒ M=ℳ R=ℛ e=ℯ g=ℊ o=ℴ"), fraktur: table("C=ℭ H=ℌ I=ℑ R=ℜ Z=ℨ"), double: table("C=ℂ H=ℍ N=ℕ P=ℙ Q=ℚ R=ℝ Z=ℤ") };

function inAlphabet(letter, alphabet) {
  if (ELSEWHERE[alphabet]?.[letter]) return ELSEWHERE[alphabet][letter];
  const [upper, lower, digit] = OFFSETS[alphabet] ?? [];
  const code = letter.codePointAt(0);
  if (upper && letter >= "A" && letter <= "Z") return String.fromCodePoint(upper + code - 65);
  if (lower && letter >= "a" && letter <= "z") return String.fromCodePoint(lower + code - 97);
  if (digit && letter >= "0" && letter <= "9") return String.fromCodePoint(digit + code - 48);
  if (letter >= "α" && letter <= "ω" && (alphabet === "bold" || alphabet === "slanted"))
    return String.fromCodePoint((alphabet === "bold" ? 0x1d6c2 : 0x1d736) + code - 0x3b1);
  return letter;
}

const space = (em) => ["mspace", { width: `${em}em` }];
const group = (nodes) => (nodes.length === 1 ? nodes[0] : ["mrow", {}, ...nodes]);
const fence = (text, form) => (text === "." ? null : ["mo", { stretchy: "true", form, fence: "true", symmetric: "true" }, text]);

class TooDeep extends Error {}

class Parser {
  constructor(source) {
    this.tokens = source.match(/\\[a-zA-Z]+|\\[^]|\s+|[^]/gu) ?? [];
    this.at = 0;
    this.depth = 0;
    this.alphabet = null;
  }

  peek() {
    while (this.at < this.tokens.length && /^\s/.test(this.tokens[this.at])) this.at++;
    return this.tokens[this.at];
  }

  take() {
    const token = this.peek();
    this.at++;
    return token;
  }

  /** Nodes up to a token that `ends`, which is left where it is. */
  row(ends = () => false) {
    if (++this.depth > DEPTH) throw new TooDeep();
    const alphabet = this.alphabet; // \bf and the like hold to the end of their group
    const nodes = [];
    for (let token = this.peek(); token !== undefined && !ends(token); token = this.peek()) {
      if (token === "}" || token === "&" || token === "\\end" || token === "\\right") {
        if (this.depth > 1) break; // not ours: whoever opened it takes it
        this.at++;
        continue;
      }
      const node = this.scripted();
      if (!node) continue;
      const before = nodes.at(-1);
      if (node.name && before && before[0] !== "mo" && before[0] !== "mspace") nodes.push(space(0.167));
      if (node[0] === "mo" && SIGNS.has(node[2]) && (!before || (before[0] === "mo" && !CLOSES.has(before[2])))) node[1].form = "prefix"; // = -2
      nodes.push(node.node ?? node);
      if (node.name && !/^([([^_)\].,;&}]|\\left|\\\\|\\[,;:! ]|undefined)/.test(String(this.peek()))) nodes.push(space(0.167));
    }
    this.alphabet = alphabet;
    this.depth--;
    return nodes;
  }

  /** What a command is given: a group, or one letter, digit or command. */
  argument() {
    const token = this.peek();
    if (token === "{") return group(this.braced());
    if (token === undefined || token === "}" || token === "&") return ["mrow", {}];
    if (++this.depth > DEPTH) throw new TooDeep();
    this.at++;
    const node = /^\d$/.test(token) ? ["mn", {}, token] : this.primary(token);
    this.depth--;
    return node?.node ?? node ?? ["mrow", {}];
  }

  braced() {
    this.take();
    const nodes = this.row((t) => t === "}");
    this.take();
    return nodes;
  }

  /** The text of a group as it is written, spaces too. */
  raw() {
    if (this.peek() !== "{") return this.take() ?? "";
    this.at++;
    let depth = 1;
    let text = "";
    for (; this.at < this.tokens.length; this.at++) {
      const token = this.tokens[this.at];
      depth += (token === "{") - (token === "}");
      if (depth === 0) break;
      text += token;
    }
    this.at++;
    return text;
  }

  option() {
    if (this.peek() !== "[") return null;
    this.take();
    const nodes = this.row((t) => t === "]");
    this.take();
    return group(nodes);
  }

  /** A node with the scripts that follow it. */
  scripted() {
    const first = this.take();
    const base = /^[\^_']$/.test(first) ? (this.at--, ["mrow", {}]) : this.primary(first);
    if (!base) return null;
    let below = null;
    let above = [];
    for (let token = this.peek(); ; token = this.peek()) {
      if (token === "_") this.take(), (below = this.argument());
      else if (token === "^") this.take(), above.push(this.argument());
      else if (token === "'") this.take(), above.push(["mo", { lspace: "0", rspace: "0" }, "′"]);
      else if (token === "\\limits" || token === "\\nolimits") this.take();
      else break;
    }
    const node = base.node ?? base;
    if (!below && !above.length) return base;
    above = above.length ? group(above) : null;
    const [one, two, both] = base.limits ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    const scripts = below && above ? [both, {}, node, below, above] : below ? [one, {}, node, below] : [two, {}, node, above];
    return base.name ? { node: scripts, name: true } : scripts;
  }

  primary(token) {
    if (token === "{") return this.at--, group(this.braced());
    if (/\d/.test(token)) return this.number(token);
    if (token.startsWith("\\") && token.length > 1) return this.command(token.slice(1));
    if (/\p{L}/u.test(token)) return this.letter(token);
    if (token === "-") return ["mo", {}, "−"];
    if (token === "*") return ["mo", {}, "∗"];
    if (token === "~") return space(0.25);
    if (token === "%" || token === "\\") return ["mi", {}, token];
    if ("()[]|".includes(token)) return ["mo", { stretchy: "false", ...(token === "|" && { lspace: "0", rspace: "0" }) }, token];
    if (token === "/") return ["mo", { lspace: "0", rspace: "0" }, "/"];
    return ["mo", {}, token];
  }

  number(token) {
    while (/^\d$/.test(this.tokens[this.at] ?? "") || (/^[.,]$/.test(this.tokens[this.at] ?? "") && /^\d$/.test(this.tokens[this.at + 1] ?? "") && this.joins()))
      token += this.tokens[this.at++];
    return ["mn", {}, [...token].map((digit) => inAlphabet(digit, this.alphabet)).join("")];
  }

  /** Whether a comma groups thousands (1,024), not separates numbers (1,2). */
  joins() {
    if (this.tokens[this.at] === ".") return true;
    const next = this.tokens.slice(this.at + 1, this.at + 5).map((t) => /^\d$/.test(t));
    return next[0] && next[1] && next[2] && !next[3];
  }

  letter(letter) {
    if (this.alphabet === "normal") return ["mi", { mathvariant: "normal" }, letter];
    return ["mi", {}, inAlphabet(letter, this.alphabet)];
  }

  inside(alphabet, read) {
    const before = this.alphabet;
    this.alphabet = alphabet;
    const node = read();
    this.alphabet = before;
    return node;
  }

  command(name) {
    if (Object.hasOwn(LETTERS, name)) return this.letter(LETTERS[name]);
    if (Object.hasOwn(UPRIGHT, name)) return ["mi", { mathvariant: "normal" }, inAlphabet(UPRIGHT[name], this.alphabet)];
    if (Object.hasOwn(OPERATORS, name)) return ["mo", name === "vert" || name === "Vert" || name === "|" ? { stretchy: "false" } : {}, OPERATORS[name]];
    if (Object.hasOwn(LARGE, name)) return { node: ["mo", { movablelimits: "true", largeop: "true" }, LARGE[name]], limits: true };
    if (Object.hasOwn(INTEGRALS, name)) return ["mo", { largeop: "true" }, INTEGRALS[name]];
    if (FUNCTIONS.has(name)) return { node: ["mi", {}, name], name: true };
    if (LIMITS.has(name)) return { node: ["mo", { movablelimits: "true", lspace: "0", rspace: "0" }, name.replace(/^(lim|arg)(?=[sim])/, "$1\u2009")], limits: true, name: true };
    if (Object.hasOwn(FENCES, name)) return ["mo", { stretchy: "false" }, FENCES[name]];
    if (Object.hasOwn(SPACES, name)) return space(SPACES[name]);
    if (Object.hasOwn(ACCENTS, name)) return this.accent("mover", ACCENTS[name], name);
    if (Object.hasOwn(UNDER, name)) return this.accent("munder", UNDER[name], name);
    if (Object.hasOwn(ALPHABET, name)) {
      if (this.peek() === "{") return this.inside(ALPHABET[name], () => this.argument());
      if (name.length > 3) return this.inside(ALPHABET[name], () => this.argument());
      this.alphabet = ALPHABET[name];
      return null;
    }
    if (TEXT.has(name)) return ["mtext", {}, this.raw().replace(/\\([$%&#_{}])/g, "$1").replace(/\\[a-z]+|\$/g, "").replace(/^ | $/g, "\u00a0")];
    const size = /^(big|Big|bigg|Bigg)[lmr]?$/.exec(name);
    if (size) return ["mo", { stretchy: "true", symmetric: "true", minsize: `${SIZES[size[1]]}em`, maxsize: `${SIZES[size[1]]}em` }, this.delimiter()];
    return this.structure(name);
  }

  structure(name) {
    switch (name) {
      case "frac": case "dfrac": case "tfrac": case "cfrac": {
        const parts = ["mfrac", {}, this.argument(), this.argument()];
        return name === "frac" ? parts : ["mstyle", { displaystyle: String(name !== "tfrac") }, parts];
      }
      case "binom": case "dbinom": case "tbinom":
        return ["mrow", {}, fence("(", "prefix"), ["mfrac", { linethickness: "0" }, this.argument(), this.argument()], fence(")", "postfix")];
      case "sqrt": {
        const degree = this.option();
        return degree ? ["mroot", {}, this.argument(), degree] : ["msqrt", {}, this.argument()];
      }
      case "left": {
        const left = this.delimiter();
        const nodes = this.row((t) => t === "\\right");
        const right = this.peek() === "\\right" ? (this.take(), this.delimiter()) : ".";
        return ["mrow", {}, fence(left, "prefix"), ...nodes, fence(right, "postfix")];
      }
      case "middle": return ["mo", { stretchy: "true", symmetric: "true" }, this.delimiter()];
      case "operatorname": {
        const limits = this.peek() === "*" && Boolean(this.take());
        return { node: [limits ? "mo" : "mi", limits ? { lspace: "0", rspace: "0" } : {}, this.raw().replace(/\\[,;: ]/g, "\u2009").replace(/\\[a-z]+|[{}]/g, "")], name: true, limits };
      }
      case "overset": case "stackrel": { const top = this.argument(); return ["mover", {}, this.argument(), top]; }
      case "underset": { const low = this.argument(); return { node: ["munder", {}, this.argument(), low], limits: true }; }
      case "xrightarrow": case "xleftarrow": {
        const below = this.option();
        const arrow = ["mo", { stretchy: "true" }, name === "xrightarrow" ? "→" : "←"];
        return below ? ["munderover", {}, arrow, below, this.argument()] : ["mover", {}, arrow, this.argument()];
      }
      case "not": { const node = this.argument(); return [node[0], node[1] ?? {}, `${typeof node.at(-1) === "string" ? node.at(-1) : ""}\u0338`]; }
      case "boxed": case "fbox": return ["mrow", { class: "boxed" }, this.argument()];
      case "phantom": return ["mphantom", {}, this.argument()];
      case "substack": return this.cells((t) => t === "}", this.take());
      case "pmod": return ["mrow", {}, space(0.5), ["mo", { stretchy: "false" }, "("], ["mi", {}, "mod"], space(0.25), this.argument(), ["mo", { stretchy: "false" }, ")"]];
      case "bmod": case "mod": return ["mrow", {}, space(0.25), ["mi", {}, "mod"], space(0.25)];
      case "displaystyle": case "textstyle": return ["mstyle", { displaystyle: String(name === "displaystyle") }, ...this.row((t) => t === "\\\\")];
      case "color": case "textcolor": {
        const color = this.raw();
        return ["mstyle", /^(#[\da-f]{3,6}|[a-z]+)$/i.test(color) ? { mathcolor: color } : {}, this.argument()];
      }
      case "tag": return ["mrow", {}, space(2), ["mtext", {}, `(${this.raw()})`]];
      case "begin": return this.environment(this.raw());
      case "label": this.raw(); return null;
      case "cancel": case "mathop": case "mathbin": case "mathrel": case "mathord": case "ensuremath": case "smash": return this.argument();
      case "\\": return ["mspace", { linebreak: "newline", width: "1em" }];
    }
    return IGNORED.has(name) ? null : ["mtext", { class: "unknown" }, `\\${name}`];
  }

  delimiter() {
    const token = this.take() ?? ".";
    if (!token.startsWith("\\")) return token === "<" ? "⟨" : token === ">" ? "⟩" : token;
    const name = token.slice(1);
    return FENCES[name] ?? OPERATORS[name] ?? ".";
  }

  accent(tag, mark, name) {
    const wide = name.length > 5 || /^(bar|vec)$/.test(name) === false && name.startsWith("over");
    const node = [tag, tag === "mover" ? { accent: "true" } : { accentunder: "true" }, this.argument(), ["mo", { stretchy: String(wide) }, mark]];
    return name.endsWith("brace") ? { node, limits: true } : node;
  }

  environment(full) {
    const name = full.replace(/\*$/, "");
    let columns = "";
    if (name === "array" || name === "alignedat" || name === "alignat") columns = this.raw().replace(/[^lcr]/g, "");
    if (/^(aligned|align|alignat|alignedat|split|eqnarray)$/.test(name)) columns = "rl".repeat(12);
    if (/cases$/.test(name)) columns = "ll";
    const display = /^(align|gather|split|equation|eqnarray|dcases|multline)/.test(name);
    const body = this.cells((t) => t === "\\end", columns, display && { displaystyle: "true", class: columns ? "aligned" : null });
    if (this.peek() === "\\end") this.take(), this.raw();
    if (!Object.hasOwn(FENCED, name)) return body;
    const [left, right] = [...FENCED[name]];
    return ["mrow", {}, fence(left, "prefix"), body, fence(right, "postfix")];
  }

  cells(ends, columns, attributes) {
    const rows = [[]];
    for (let token = this.peek(); token !== undefined && !ends(token); token = this.peek()) {
      const column = rows.at(-1).length;
      rows.at(-1).push(["mtd", /[lr]/.test(columns?.[column] ?? "") ? { class: columns[column] } : {}, ...this.row((t) => t === "&" || t === "\\\\" || ends(t))]);
      const end = this.peek();
      if (end === "&") this.take();
      else if (end === "\\\\") {
        this.take();
        if (this.peek() === "[") this.option();
        rows.push([]);
      } else if (end !== undefined && !ends(end)) this.take(); // a stray } or \right: dropped, or this would not end
    }
    if (ends("}")) this.take();
    return ["mtable", attributes || {}, ...rows.filter((cells) => cells.length).map((cells) => ["mtr", {}, ...cells])];
  }
}

/** The tree of a formula; `display` for one on its own line. The source goes along, so that copying and reading aloud have it. */
export function math(source, display = false) {
  const tex = source.trim();
  if (tex.length > LENGTH) return ["code", {}, tex];
  let nodes;
  try {
    nodes = new Parser(tex.replace(/(?<!\\)%[^\n]*/g, "")).row();
  } catch (error) {
    if (!(error instanceof TooDeep)) throw error;
    return ["code", {}, tex];
  }
  return ["math", { display: display ? "block" : "inline", title: tex }, ["semantics", {}, ["mrow", {}, ...nodes], ["annotation", { encoding: "application/x-tex" }, tex]]];
}
