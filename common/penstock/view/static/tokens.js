// The tokens of a completion or an episode, coloured by what was recorded of each.

import { addressOf, go, state } from "./address.js";
import { ask } from "./data.js";
import { el, field, figures, shown, table, tag } from "./dom.js";
import { fixed, number, signed } from "./format.js";
import { withoutRuns } from "./step.js";

const PAGE = 2000;
const COLOURS = {
  version: "asserted weight version",
  logprob: "log-probability",
  advantage: "advantage",
  difference: "trainer minus sampler",
  mask: "mask",
  none: "nothing",
};

export async function show(asked) {
  const { run, step, group, completion = 0, offset = 0 } = asked;
  const found = await ask("runs", run, "steps", step, "groups", group, completion, { offset, limit: PAGE });
  const colour = COLOURS[asked.colour] ? asked.colour : "version";
  const at = (place) => addressOf({ ...withoutRuns(state()), offset: place });
  const from = Number(offset),
    to = from + found.ids.length;
  const detail = el("div", { class: "detail", role: "status" }, "Point at a token, or choose the table.");
  return [
    el("h1", {}, `Step ${step}, group ${group}, number ${completion}`),
    el(
      "nav",
      { class: "bar", "aria-label": "Completions" },
      el("a", { href: addressOf({ view: "group", step, group }) }, "all completions of the group"),
      from > 0 ? el("a", { href: at(Math.max(0, from - PAGE)), rel: "prev" }, "earlier tokens") : null,
      to < found.total ? el("a", { href: at(to), rel: "next" }, "later tokens") : null,
    ),
    figures([
      ["tokens", number(found.total)],
      ["advantage", found.advantage === null ? null : fixed(found.advantage, 3)],
      ["trains version", number(found.version)],
      ["shown", found.total > found.ids.length ? `${from}\u2013${to - 1}` : null],
      [
        "largest trainer \u2212 sampler",
        farthest(found),
        "of the log-probabilities: the token on which trainer and sampler agree least",
      ],
    ]),
    asserted(found),
    found.no_text ? el("p", { class: "problem" }, `Ids only: ${found.no_text}`) : null,
    controls(asked, colour),
    legend(found, colour),
    colour === "difference" && found.log_ratios_missing
      ? el("p", { class: "problem" }, `Trainer minus sampler is not recorded: ${found.log_ratios_missing}.`)
      : null,
    detail,
    asked.as === "table" ? tokenTable(found, from) : flow(found, from, colour, asked, detail),
  ].filter(Boolean);
}

/** The largest difference, with a link to its token. */
function farthest(found) {
  if (found.log_ratios_missing) return "not recorded";
  const largest = found.largest_log_ratio;
  if (!largest) return "\u2013";
  const offset = Math.floor(largest.token / PAGE) * PAGE;
  const at = { ...withoutRuns(state()), colour: "difference", offset, token: largest.token };
  return el("a", { href: addressOf(at) }, `${signed(largest.value)} at token ${largest.token}`);
}

function asserted({ asserted: versions, recorded }) {
  const rows = Object.entries(versions).map(([version, digest]) => ({ version, digest, known: recorded[version] }));
  const columns = [
    { title: "version", number: true, cell: (row) => row.version },
    { title: "digest that the engine asserted", cell: (row) => el("code", {}, row.digest) },
    { title: "digest in the ledger", cell: (row) => el("code", {}, row.known || "none") },
    { title: "they are", cell: (row) => (row.digest === row.known ? tag("the same", "good") : tag("differs", "bad")) },
  ];
  return el(
    "details",
    { open: rows.some((row) => row.digest !== row.known) },
    el("summary", {}, `Sampled by version ${rows.map((row) => row.version).join(", ") || "none"}`),
    table("Versions that the engine asserted", columns, rows),
  );
}

function controls(asked, colour) {
  const set = (name) => (event) => {
    const value =
      event.target.type === "checkbox" ? (event.target.checked ? event.target.value : "") : event.target.value;
    go(addressOf({ ...withoutRuns(state()), [name]: value }), { keep: true });
  };
  const box = (name, value, label) =>
    el(
      "label",
      { class: "check" },
      el("input", { type: "checkbox", value, checked: asked[name] === value, on: { change: set(name) } }),
      label,
    );
  return el(
    "div",
    { class: "bar filters" },
    field(
      "Coloured by",
      el(
        "select",
        { name: "colour", on: { change: set("colour") } },
        Object.entries(COLOURS).map(([value, words]) => el("option", { value, selected: value === colour }, words)),
      ),
    ),
    box("ids", "1", "ids"),
    box("as", "table", "as a table"),
  );
}

const PALETTE = 6;
const versionClass = (version, versions) => (version === null ? "context" : `v${versions.indexOf(version) % PALETTE}`);

/** How a token is painted: a class, and a strength from 0 to 1. */
function paint(found, place, colour, versions) {
  const logprob = found.logprobs[place];
  if (logprob === null) return ["context", 0];
  if (colour === "version") return [versionClass(found.versions[place], versions), 1];
  if (colour === "logprob") return ["surprise", Math.min(1, -logprob / 5)];
  if (colour === "mask") return [found.trained[place] ? "trained" : "masked", 1];
  if (colour === "advantage" && found.advantage !== null && found.trained[place]) {
    return [found.advantage < 0 ? "below" : "above", Math.min(1, Math.abs(found.advantage) / 2)];
  }
  const ratio = found.log_ratios[place];
  if (colour === "difference" && ratio !== null) return [ratio < 0 ? "below" : "above", strengthOf(ratio)];
  return [colour === "difference" ? "unknown" : "plain", 0];
}

/** By its root: the colours of 0.01, 0.1 and 1 can be told apart, and mean the same on all pages. */
const strengthOf = (ratio) => Math.min(1, Math.sqrt(Math.abs(ratio)));

const versionsOf = (found) =>
  Object.keys(found.asserted)
    .map(Number)
    .sort((a, b) => a - b);

function legend(found, colour) {
  const key = (name, strength, words) =>
    el(
      "span",
      { class: "key" },
      el("i", { class: `token ${name}`, style: { "--strength": strength } }, "\u00a0\u00a0"),
      words,
    );
  const versions = versionsOf(found);
  const keys = {
    version: versions.map((version) => key(versionClass(version, versions), 1, `version ${version}`)),
    logprob: [
      key("surprise", 0.02, "probability 1"),
      key("surprise", 0.46, "0.1"),
      key("surprise", 0.92, "0.01"),
      key("surprise", 1, "less"),
    ],
    advantage:
      found.advantage === null
        ? [el("span", {}, "it has no advantage")]
        : [key("below", 1, "\u22122 and less"), key("plain", 0, "0, or masked"), key("above", 1, "2 and more")],
    difference: [
      ...[-1, -0.1, -0.01].map((ratio) => key("below", strengthOf(ratio), `${signed(ratio, 2)}${ratio === -1 ? " and less" : ""}`)),
      key("above", 0, "0"),
      ...[0.01, 0.1, 1].map((ratio) => key("above", strengthOf(ratio), `${signed(ratio, 2)}${ratio === 1 ? " and more" : ""}`)),
      key("unknown", 0, "not computed"),
    ],
    mask: [key("trained", 1, "trained"), key("masked", 1, "masked")],
    none: [],
  };
  return el("p", { class: "legend" }, keys[colour], key("context", 0, "not sampled"));
}

function flow(found, from, colour, { ids: shownIds, token: wanted }, detail) {
  const withIds = shownIds === "1";
  const special = new Set(found.special),
    versions = versionsOf(found);
  const starts = new Map(found.segments.map((segment) => [segment.start, segment]));
  const parts = [];
  found.ids.forEach((id, place) => {
    const segment = starts.get(from + place);
    if (segment) parts.push(el("span", { class: "segment" }, origin(segment, found.segments)));
    const [name, strength] = paint(found, place, colour, versions);
    const text = found.pieces ? found.pieces[place] : String(id);
    parts.push(
      el(
        "span",
        {
          class: `token ${name}${special.has(place) ? " special" : ""}${String(from + place) === wanted ? " wanted" : ""}`,
          style: { "--strength": strength },
          "data-place": place,
        },
        text ? shown(text.replace(/\n$/, ""), { lineEnds: true }) : "\u25cc",
        text?.endsWith("\n") ? el("span", { class: "hidden-character" }, "\\n") : null,
        withIds && found.pieces ? el("sub", {}, String(id)) : null,
        text?.endsWith("\n") ? "\n" : null,
      ),
    );
    if (!found.pieces) parts.push(" ");
  });
  const point = (event) => {
    const place = event.target.closest?.("[data-place]")?.dataset.place;
    if (place !== undefined) detail.replaceChildren(...details(found, from, Number(place)));
  };
  return el("div", { class: "tokens text", on: { mouseover: point, click: point } }, parts);
}

function origin({ kind, role, parent, number: place }, segments) {
  const continues = parent !== null && parent !== place - 1 ? `, continues part ${parent}` : "";
  return segments.length > 2
    ? `${place}: ${role || kind}${kind === "sampled" ? " (sampled)" : kind === "auxiliary" ? " (auxiliary, not trained)" : ""}${continues}`
    : kind;
}

function details(found, from, place) {
  const logprob = found.logprobs[place];
  const parts = [
    ["token", String(from + place)],
    ["id", String(found.ids[place])],
    ["text", found.pieces ? JSON.stringify(found.pieces[place]) : "\u2013"],
    ["log-probability", logprob === null ? "not sampled" : `${fixed(logprob, 4)} (${number(Math.exp(logprob))})`],
    ["trainer \u2212 sampler", ratioOf(found, place)],
    [
      "version",
      found.versions[place] === null
        ? "\u2013"
        : `${found.versions[place]} (${found.asserted[found.versions[place]].slice(0, 8)})`,
    ],
    ["trained", found.trained[place] ? "yes" : "no"],
  ];
  return parts.map(([name, value]) => el("span", {}, el("b", {}, name), " ", shown(value)));
}

function ratioOf(found, place) {
  if (found.log_ratios_missing) return "not recorded";
  const ratio = found.log_ratios[place];
  return ratio === null ? "not computed" : signed(ratio);
}

function tokenTable(found, from) {
  const special = new Set(found.special);
  const rows = found.ids.map((_, place) => place);
  const columns = [
    { title: "token", number: true, cell: (place) => String(from + place) },
    { title: "id", number: true, cell: (place) => String(found.ids[place]) },
    {
      title: "text",
      cell: (place) => [
        el("code", {}, found.pieces ? shown(found.pieces[place], { lineEnds: true }) : ""),
        special.has(place) ? tag("special", "dull") : null,
      ],
    },
    { title: "log-probability", number: true, cell: (place) => fixed(found.logprobs[place], 4) },
    {
      title: "trainer \u2212 sampler",
      number: true,
      cell: (place) => signed(found.log_ratios[place]),
      hint: "difference of the log-probabilities",
    },
    { title: "version", number: true, cell: (place) => number(found.versions[place]) },
    { title: "trained", cell: (place) => (found.trained[place] ? "yes" : "no") },
  ];
  return table("Tokens", columns, rows);
}
