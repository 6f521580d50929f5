// Elements from data. Whatever a model or a dataset wrote becomes text nodes, here and nowhere else: no markup is parsed.

const HIDDEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/u; // characters that move, hide or turn others
const HIDDEN_OR_NOT = /([\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Zl}\p{Zp}])/u;

/** An element. properties: attributes; `on`: listeners; `style`: set one by one, which a strict policy allows. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** A text with its hidden characters as marks: a turned or an empty text is seen as what it is. Line ends stay. */
export function shown(text, { lineEnds = false } = {}) {
  return text
    .split(HIDDEN_OR_NOT)
    .filter(Boolean)
    .map((part) => {
      if (!HIDDEN.test(part) || part.length > 2) return part;
      if (part === "\n") return lineEnds ? [mark("\\n"), "\n"] : "\n";
      if (part === "\t") return [mark("\\t"), "\t"];
      return mark(`U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
    });
}

const mark = (text) => el("span", { class: "hidden-character" }, text);

/** A table. columns: {title, cell(row), number, sort}. caption: for readers of the screen. */
export function table(caption, columns, rows, { attributes = {}, rowClass = () => null } = {}) {
  const cell = (column, row) => el("td", { class: column.number ? "number" : null }, column.cell(row));
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el(
      "table",
      attributes,
      el("caption", { class: "unseen" }, caption),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          columns.map((column) =>
            el("th", { scope: "col", class: column.number ? "number" : null, title: column.hint }, column.title),
          ),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            { class: rowClass(row) },
            columns.map((each) => cell(each, row)),
          ),
        ),
      ),
    ),
  );
}

/** Pairs of a name and a value, in a row that wraps. */
export function figures(pairs) {
  return el(
    "dl",
    { class: "figures" },
    pairs
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([name, value, hint]) => el("div", { title: hint }, el("dt", {}, name), el("dd", {}, value))),
  );
}

export const tag = (text, kind) => el("span", { class: `tag ${kind}` }, text);

let numFields = 0;

/** A labelled field of a form. */
export function field(label, input) {
  input.id = `field-${++numFields}`;
  return el("span", { class: "field" }, el("label", { for: input.id }, label), input);
}

/** Text as it is, in a box that scrolls if it is long, also with the keyboard. */
export const box = (...children) => el("pre", { class: "text", tabindex: "0" }, ...children);
