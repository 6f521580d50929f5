// The table of steps, the newest first, a page at a time.

import { addressOf, go } from "./address.js";
import { ask } from "./data.js";
import { el, field, table } from "./dom.js";
import { fixed, number, percent, seconds } from "./format.js";

export const isLive = true;

const PAGE = 100;
const COLUMNS = [
  ["reward", "reward_mean", (value) => fixed(value, 3)],
  ["\u00b1", "statistics/reward_std", (value) => fixed(value, 2), "standard deviation over the step's completions"],
  [
    "no signal",
    "statistics/no_signal_ratio",
    percent,
    "groups whose rewards are all equal, or fewer than two of which are valid",
  ],
  ["failed", "statistics/failed_reward_ratio", percent, "rewards that failed"],
  ["truncated", "statistics/truncated_ratio", percent],
  ["length", "statistics/length_generated", (value) => fixed(value, 1), "sampled tokens of a completion"],
  ["stale", "staleness_mean", (value) => fixed(value, 2), "mean staleness, in versions"],
  ["max", "staleness_max", number, "largest staleness, in versions"],
  ["KL", "statistics/behaviour_kl", number, "from the sampler, in nats"],
  ["ESS", "statistics/effective_sample_size_ratio", (value) => fixed(value, 3), "effective sample size, as a share"],
  ["entropy", "statistics/entropy", (value) => fixed(value, 3)],
  ["loss", "statistics/loss", number],
  ["gradient", "statistics/grad_norm", number],
  ["time", "seconds/step", seconds],
  ["waits", "seconds/wait", seconds, "for a batch"],
];

export async function show({ run, before }) {
  const names = COLUMNS.map(([, name]) => name);
  const { total, rows } = await ask("runs", run, "steps", { name: names, before, limit: PAGE });
  if (!total) return [el("h1", {}, "Steps"), el("p", { class: "quiet" }, "No step has ended yet.")];
  const columns = [
    {
      title: "step",
      number: true,
      cell: (row) => el("a", { href: addressOf({ view: "step", step: row.step }) }, String(row.step)),
    },
    ...COLUMNS.map(([title, name, format, hint]) => ({ title, hint, number: true, cell: (row) => format(row[name]) })),
  ];
  const oldest = rows.at(-1)?.step;
  return [
    el("h1", {}, "Steps"),
    el(
      "div",
      { class: "bar" },
      jump(),
      el("span", { class: "quiet" }, `${number(total)} steps`),
      before ? el("a", { href: addressOf({ view: "steps" }) }, "newest") : null,
      oldest > 1 && rows.length === PAGE
        ? el("a", { href: addressOf({ view: "steps", before: oldest }) }, "older")
        : null,
    ),
    table(`Steps of ${run}, the newest first`, columns, rows),
  ];
}

function jump() {
  const input = el("input", { type: "number", min: "1", name: "step", required: true });
  const submit = (event) => {
    event.preventDefault();
    go(addressOf({ view: "step", step: input.value }));
  };
  return el("form", { class: "inline", on: { submit } }, field("Go to step", input), el("button", {}, "Show"));
}
