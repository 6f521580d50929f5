// One step: its figures, and its groups, those with the most different rewards first.

import { addressOf, go, state } from "./address.js";
import { ask } from "./data.js";
import { el, field, figures, shown, table, tag } from "./dom.js";
import { fixed, number, percent, seconds, signed } from "./format.js";
import { chart, series } from "./plot.js";
import { rangeOf, strip } from "./rewards.js";

const SORTS = {
  std: ["variance", (group) => -(group.std ?? -1)],
  mean: ["reward", (group) => -(group.mean ?? -Infinity)],
  index: ["order of training", (group) => group.index],
  length: ["length", (group) => -group.length_mean],
  failed: ["failures", (group) => -group.num_failed],
  difference: ["trainer minus sampler", (group) => -Math.abs(group.largest_log_ratio?.value ?? 0)],
};
const KINDS = {
  "": "all",
  failed: "with failures",
  flat: "zero variance",
  signal: "with a signal",
  truncated: "truncated",
};

export async function show(asked) {
  const step = Number(asked.step ?? 1);
  const found = await ask("runs", asked.run, "steps", step);
  const { line, record, groups } = found;
  return [
    el("h1", {}, `Step ${step}`, " ", found.unchanged ? tag("weights unchanged", "bad") : null),
    el(
      "nav",
      { class: "bar", "aria-label": "Steps" },
      step > 1 ? el("a", { href: addressOf({ view: "step", step: step - 1 }), rel: "prev" }, "previous step") : null,
      found.last_step > step
        ? el("a", { href: addressOf({ view: "step", step: step + 1 }), rel: "next" }, "next step")
        : null,
      el(
        "a",
        { href: addressOf({ view: "timeline", first: Math.max(1, step - 3), last: step + 2 }) },
        "timeline around it",
      ),
    ),
    Object.keys(line).length
      ? lineOf(line, record)
      : el("p", { class: "quiet" }, "It has no line in steps.jsonl (yet)."),
    Object.keys(line.failures ?? {}).length ? failures(line.failures) : null,
    line.histograms ? histograms(line.histograms) : null,
    found.missing ? el("p", { class: "problem" }, found.missing) : groupsOf(asked, step, groups),
    found.log_ratios_missing
      ? el("p", { class: "quiet note" }, `Trainer minus sampler is not recorded: ${found.log_ratios_missing}.`)
      : null,
  ].filter(Boolean);
}

function lineOf(line, record) {
  const of = line.statistics ?? {};
  return figures([
    ["reward", `${fixed(line.reward_mean, 3)} \u00b1 ${fixed(of.reward_std, 2)}`],
    ["trains version", record ? number(record.version) : null],
    ["staleness", `${fixed(line.staleness_mean, 2)}, max ${line.staleness_max}`],
    ["KL sampler", number(of.behaviour_kl)],
    ["ESS", fixed(of.effective_sample_size_ratio, 3)],
    ["entropy", fixed(of.entropy, 3)],
    ["loss", number(of.loss)],
    ["gradient norm", number(of.grad_norm)],
    ["clipped", percent(of.clipped_ratio)],
    ["learning rate", number(of.learning_rate)],
    ["time", seconds(line.seconds?.step)],
    ["waited", seconds(line.seconds?.wait)],
    ["tokens", number(line.generated_tokens)],
  ]);
}

const failures = (reasons) =>
  el(
    "details",
    {},
    el("summary", {}, "Why rewards failed"),
    el(
      "ul",
      {},
      Object.entries(reasons).map(([reason, count]) => el("li", {}, `${count} \u00d7 `, shown(reason))),
    ),
  );

function histograms(found) {
  const words = { reward: "Rewards", advantage: "Advantages", length: "Sampled tokens", staleness: "Staleness" };
  return el(
    "div",
    { class: "charts low" },
    Object.entries(found).map(([name, { lowest, highest, counts }], place) => {
      const width = (highest - lowest) / counts.length || 1;
      const x = counts.map((_, index) => lowest + width * (index + (counts.length > 1 ? 0.5 : 0)));
      const bars = {
        type: "bar",
        x,
        y: counts,
        width: width * 0.92,
        marker: { color: series(place) },
        hovertemplate: "%{x:.3~g}: %{y}<extra></extra>",
      };
      const range = `${number(lowest)} to ${number(highest)}`;
      return chart(words[name] ?? name, `${words[name] ?? name}, ${range}`, [bars], {
        height: 90,
        last: range,
        layout: { hovermode: "closest", yaxis: { nticks: 3 } },
      });
    }),
  );
}

function fits(group, { kind, text, min, max, longer, shorter }) {
  const inRange = (value, low, high) =>
    (low ? value !== null && value >= Number(low) : true) && (high ? value !== null && value <= Number(high) : true);
  const kinds = {
    failed: group.num_failed > 0,
    flat: group.is_flat,
    signal: !group.is_flat && !group.is_failed,
    truncated: group.num_truncated > 0,
  };
  return (
    (!kind || kinds[kind]) &&
    inRange(group.mean, min, max) &&
    inRange(group.length_max, longer, null) &&
    inRange(group.length_min, null, shorter) &&
    (!text || `${group.prompt}\n${group.answer}`.toLowerCase().includes(text.toLowerCase()))
  );
}

function groupsOf(asked, step, groups) {
  const order = SORTS[asked.sort] ?? SORTS.std;
  const some = groups
    .filter((group) => fits(group, asked))
    .sort((a, b) => order[1](a) - order[1](b) || a.index - b.index);
  const range = rangeOf(groups.map((group) => group.rewards));
  const columns = [
    {
      title: "group",
      number: true,
      cell: (group) => el("a", { href: addressOf({ view: "group", step, group: group.index }) }, String(group.index)),
    },
    {
      title: "prompt",
      cell: (group) => el("span", { class: "clip", title: group.prompt }, shown(group.prompt || group.environment)),
    },
    { title: "answer", cell: (group) => el("span", { class: "clip short" }, shown(group.answer)) },
    { title: "rewards", cell: (group) => strip(group.rewards, range) },
    { title: "mean", number: true, cell: (group) => fixed(group.mean, 3) },
    { title: "\u00b1", number: true, cell: (group) => fixed(group.std, 3), hint: "standard deviation" },
    { title: "marks", cell: marks },
    {
      title: "trainer \u2212 sampler",
      number: true,
      cell: (group) => difference(step, group.index, group.largest_log_ratio),
      hint: "of all its tokens, the largest difference of the log-probabilities",
    },
    { title: "length", number: true, cell: (group) => `${group.length_min}\u2013${group.length_max}` },
    { title: "version", number: true, cell: versions },
    { title: "stale", number: true, cell: (group) => number(group.staleness) },
    {
      title: "ticket",
      number: true,
      cell: (group) => el("a", { href: addressOf({ view: "tickets", ticket: group.ticket }) }, String(group.ticket)),
    },
    {
      title: "made in",
      number: true,
      cell: (group) => seconds(group.ended_at - group.started_at),
      hint: "from request to answer",
    },
  ];
  return el(
    "section",
    {},
    el("h2", {}, "Groups"),
    filters(asked, some.length, groups.length),
    table(`Groups of step ${step}`, columns, some, {
      rowClass: (group) => (group.is_failed ? "failed" : group.is_flat ? "flat" : null),
    }),
  );
}

/** The largest difference of a completion, with a link to its tokens. */
export function difference(step, group, largest, words = "") {
  if (!largest) return "\u2013";
  const href = addressOf({ view: "tokens", step, group, completion: largest.completion, colour: "difference" });
  const title = "of its tokens, the largest difference of the log-probabilities";
  return el("a", { href, title }, words, signed(largest.value, 3));
}

export const marks = (group) => [
  group.is_failed ? tag("failed", "bad") : null,
  group.num_failed && !group.is_failed ? tag(`${group.num_failed} failed`, "bad") : null,
  group.is_flat ? tag("zero variance", "dull") : null,
  group.num_truncated ? tag(`${group.num_truncated} truncated`, "warn") : null,
  group.attempt ? tag(`attempt ${group.attempt}`, "dull") : null,
];

const versions = ({ oldest_version: oldest, newest_version: newest }) =>
  oldest === null ? "\u2013" : oldest === newest ? String(oldest) : `${oldest}\u2013${newest}`;

function filters(asked, number_, total) {
  const set = (name) => (event) =>
    go(addressOf({ ...withoutRuns(state()), [name]: event.target.value }), { keep: true });
  const input = (name, type, label) =>
    field(label, el("input", { type, step: "any", value: asked[name], name, on: { change: set(name) } }));
  const select = (name, label, choices) =>
    field(
      label,
      el(
        "select",
        { name, on: { change: set(name) } },
        Object.entries(choices).map(([value, words]) =>
          el("option", { value, selected: (asked[name] ?? "") === value }, words),
        ),
      ),
    );
  return el(
    "div",
    { class: "bar filters" },
    select(
      "sort",
      "Sorted by",
      Object.fromEntries(Object.entries(SORTS).map(([name, [words]]) => [name === "std" ? "" : name, words])),
    ),
    select("kind", "Groups", KINDS),
    input("text", "search", "Text"),
    input("min", "number", "Mean from"),
    input("max", "number", "to"),
    input("longer", "number", "Longest from"),
    input("shorter", "number", "Shortest to"),
    el("output", { class: "quiet" }, `${number_} of ${total}`),
  );
}

export const withoutRuns = ({ runs, run, ...values }) => values;
