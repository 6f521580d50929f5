// Evaluations on held-out prompts: their figures, and the same prompts before and after.

import { addressOf, go, state } from "./address.js";
import { ask } from "./data.js";
import { el, field, shown, table, tag } from "./dom.js";
import { accuracyOf, fixed, number, UNKNOWN, wilson } from "./format.js";
import { chart, points } from "./plot.js";
import { withoutRuns } from "./step.js";

export const isLive = true;
const MAIN = "main";

export async function show(asked) {
  const all = await Promise.all(asked.runs.map((run) => ask("runs", run, "evaluations")));
  const every = all[0]
    .map((line, place) => ({ ...line, place }))
    .sort((a, b) => a.steps - b.steps || a.place - b.place);
  const sets = setsOf(every),
    set = sets.includes(asked.set) ? asked.set : sets[0];
  const lines = every.filter((line) => line.set === set);
  if (!lines.length)
    return [
      el("h1", {}, "Evaluations"),
      el("p", { class: "quiet" }, "No evaluation has ended: see data.eval and eval.every_steps."),
    ];
  const traces = all.map((some, place) => {
    const sorted = some.filter((line) => line.set === set && line.accuracy !== null).sort((a, b) => a.steps - b.steps);
    const bounds = sorted.map((line) => wilson(line.accuracy, line.num_scored));
    return points(
      asked.runs[place],
      sorted.map((line) => line.steps),
      sorted.map((line) => line.accuracy),
      bounds.map(([low]) => low),
      bounds.map(([, high]) => high),
      place,
    );
  });
  const columns = [
    { title: "after steps", number: true, cell: (line) => number(line.steps) },
    { title: "accuracy", number: true, cell: accuracyOf, hint: "of the prompts that have a reward" },
    {
      title: "95 % interval",
      number: true,
      cell: interval,
    },
    { title: "held-out reward", number: true, cell: (line) => fixed(line.reward_mean, 3) },
    { title: "prompts", number: true, cell: (line) => number(line.num_prompts) },
    { title: "failed", number: true, cell: (line) => number(line.num_failed) },
    { title: "versions", number: true, cell: (line) => `${line.oldest_version}\u2013${line.newest_version}` },
    {
      title: "why failed",
      cell: (line) =>
        Object.entries(line.failures ?? {}).map(([why, count]) => el("span", {}, `${count} \u00d7 `, shown(why))),
    },
  ];
  const from = asked.from ?? String(lines[0].place),
    to = asked.to ?? String(lines.at(-1).place);
  return [
    el("h1", {}, "Evaluations"),
    sets.length > 1 ? el("div", { class: "bar filters" }, choiceOfSet(sets, set)) : null,
    el(
      "div",
      { class: "charts" },
      chart(
        `Accuracy on held-out prompts${sets.length > 1 ? ` of ${set}` : ""}, 95 % interval`,
        lines.map((line) => `after ${line.steps} steps ${accuracyOf(line)}`).join(", "),
        traces,
        {
          height: 220,
          wide: true,
          layout: {
            showlegend: asked.runs.length > 1,
            legend: { orientation: "h", y: 1.15 },
            yaxis: { rangemode: "tozero" },
          },
        },
      ),
    ),
    table(`Evaluations of ${asked.run}`, columns, lines),
    await beside(asked, lines, from, to),
  ].filter(Boolean);
}

/** The sets of held-out prompts that some evaluations are of, the main one first. */
export const setsOf = (lines) =>
  [...new Set(lines.map((line) => line.set))].sort((a, b) => (b === MAIN) - (a === MAIN) || a.localeCompare(b));

const choiceOfSet = (sets, chosen) =>
  field(
    "Set",
    el(
      "select",
      {
        name: "set",
        on: {
          change: (event) => go(addressOf({ view: "evaluations", set: event.target.value }), { keep: true }),
        },
      },
      sets.map((name) => el("option", { value: name, selected: name === chosen }, name)),
    ),
  );

const interval = ({ accuracy, num_scored: scored }) =>
  accuracy === null
    ? UNKNOWN
    : wilson(accuracy, scored)
        .map((bound) => fixed(bound, 2))
        .join(" \u2013 ");

async function beside({ run }, lines, from, to) {
  const [before, after] = await Promise.all([from, to].map((place) => ask("runs", run, "evaluations", place)));
  const choice = (name, value, label) =>
    field(
      label,
      el(
        "select",
        {
          name,
          on: {
            change: (event) => go(addressOf({ ...withoutRuns(state()), [name]: event.target.value }), { keep: true }),
          },
        },
        lines.map((line) =>
          el("option", { value: line.place, selected: String(line.place) === value }, `${line.steps} steps`),
        ),
      ),
    );
  const places = new Map();
  for (const [name, found] of [
    ["before", before],
    ["after", after],
  ]) {
    for (const sample of found.samples) {
      const key = JSON.stringify([sample.prompt, sample.answer]);
      places.set(key, { prompt: sample.prompt, answer: sample.answer, ...places.get(key), [name]: sample });
    }
  }
  const cell = (sample) =>
    sample
      ? [
          el("pre", { class: "text" }, shown(sample.completion)),
          el(
            "p",
            { class: "quiet" },
            sample.reward === null
              ? [tag("failed", "bad"), " ", shown(sample.failure ?? "")]
              : `reward ${number(sample.reward)}`,
          ),
        ]
      : "\u2013";
  const change = ({ before: one, after: other }) => {
    if (!one || !other || one.reward === other.reward)
      return one?.completion === other?.completion ? tag("the same", "dull") : null;
    return (other.reward ?? -Infinity) > (one.reward ?? -Infinity) ? tag("better", "good") : tag("worse", "bad");
  };
  const columns = [
    { title: "prompt", cell: (row) => el("pre", { class: "text" }, shown(row.prompt)) },
    { title: "answer", cell: (row) => shown(row.answer) },
    { title: `after ${before.steps} steps`, cell: (row) => cell(row.before) },
    { title: `after ${after.steps} steps`, cell: (row) => cell(row.after) },
    { title: "change", cell: change },
  ];
  return el(
    "section",
    {},
    el("h2", {}, "Before and after"),
    el("div", { class: "bar filters" }, choice("from", from, "Before"), choice("to", to, "After")),
    table("Completions of the same prompts before and after", columns, [...places.values()]),
    failures(from === to ? [after] : [before, after]),
  );
}

/** The rows whose reward failed, which are in no figure, and why. */
function failures(evaluations) {
  const rows = evaluations.flatMap((one) => one.failed.map((row) => ({ ...row, steps: one.steps })));
  const failed = evaluations.reduce((sum, one) => sum + one.num_failed, 0);
  if (!failed) return null;
  const columns = [
    { title: "after steps", number: true, cell: (row) => number(row.steps) },
    { title: "why", cell: (row) => shown(row.failure || "not recorded") },
    { title: "prompt", cell: (row) => el("pre", { class: "text" }, shown(row.prompt)) },
    { title: "completion", cell: (row) => el("pre", { class: "text" }, shown(row.completion)) },
    { title: "answer", cell: (row) => shown(row.answer) },
  ];
  return el(
    "section",
    {},
    el("h2", {}, "Rewards that failed"),
    el(
      "p",
      { class: "quiet note" },
      `They are in no figure of these evaluations. ${number(failed)} failed, ${number(rows.length)} are recorded.`,
    ),
    table("Held-out prompts whose reward failed", columns, rows),
  );
}
