// Completions of training, found by text, reward, failure and length: those kept for people, or all of the step files.

import { addressOf, go, state } from "./address.js";
import { ask } from "./data.js";
import { box, el, field, shown, tag } from "./dom.js";
import { fixed, number, seconds } from "./format.js";
import { withoutRuns } from "./step.js";

const PAGE = 40;
const FIELDS = [
  ["text", "Text", "search"],
  ["reward_min", "Reward from", "number"],
  ["reward_max", "to", "number"],
  ["length_min", "Tokens from", "number"],
  ["length_max", "to", "number"],
  ["step_min", "Steps from", "number"],
  ["step_max", "to", "number"],
];
const CHOICES = {
  where: [
    ["", "samples.jsonl"],
    ["steps", "all step files"],
  ],
  failed: [
    ["", "any"],
    ["true", "failed"],
    ["false", "scored"],
  ],
  truncated: [
    ["", "any"],
    ["true", "truncated"],
    ["false", "complete"],
  ],
};

export async function show(asked) {
  const wanted = Object.fromEntries(
    [...FIELDS.map(([name]) => name), ...Object.keys(CHOICES)].map((name) => [name, asked[name]]),
  );
  const list = el("ol", { class: "found" });
  const foot = el("p", { class: "bar" });
  const all = wanted.where === "steps";
  delete wanted.where;
  if (all) await through(asked.run, wanted, null, list, foot);
  else await more(asked.run, wanted, null, list, foot);
  return [
    el("h1", {}, "Completions"),
    el(
      "p",
      { class: "quiet note" },
      all
        ? "Of the step files that are there, the newest first: all completions, their texts decoded while you wait."
        : "Of samples.jsonl, the newest first: some of each step, for people. Step files hold all of them.",
    ),
    form(asked),
    list,
    foot,
  ];
}

async function more(run, wanted, end, list, foot) {
  const found = await ask("runs", run, "samples", { ...wanted, end, limit: PAGE });
  list.append(...found.lines.map((line) => card(line, ...place(line))));
  foot.replaceChildren(
    el(
      "output",
      { class: "quiet" },
      list.childElementCount ? `${list.childElementCount} shown` : found.next === null ? "None fits." : "None yet.",
    ),
    ...(found.next === null
      ? []
      : [el("button", { on: { click: () => more(run, wanted, found.next, list, foot) } }, "Look further back")]),
  );
}

/** Look through all step files, an answer after the other, until a page is full; a pause after each is for training. */
async function through(run, wanted, from, list, foot) {
  const began = performance.now(),
    before = list.childElementCount;
  let at = from,
    stopped = false;
  const look = async () => {
    const asked = performance.now();
    const start = at ? { at_step: at.step, at_group: at.group } : {};
    const found = await ask("runs", run, "completions", { ...wanted, ...start, limit: PAGE });
    list.append(...found.lines.map((line) => card(line, ...place(line))));
    at = found.next;
    const isFull = list.childElementCount - before >= PAGE;
    const isOver = at === null || isFull || stopped;
    const words =
      `${number(list.childElementCount)} found; ${number(found.num_done)} of ${number(found.num_steps)} steps ` +
      `in ${seconds((performance.now() - began) / 1000)}` +
      (found.num_gone ? `; step files are gone (checkpoint.keep_step_bytes)` : "") +
      (found.no_text ? `; ids only: ${found.no_text}` : "");
    const further = () => through(run, wanted, at, list, foot);
    const stop = () => (stopped = true);
    const buttons = isOver
      ? [at && el("button", { on: { click: further } }, "Look further back")]
      : [el("button", { on: { click: stop } }, "Stop")];
    foot.replaceChildren(el("output", { class: "quiet" }, words), ...buttons.filter(Boolean));
    return isOver ? null : performance.now() - asked;
  };
  const follow = async (pause) => {
    while (pause !== null) {
      await new Promise((ready) => setTimeout(ready, pause));
      if (!foot.isConnected) return; // the reader has gone on
      pause = await look();
    }
  };
  const pause = await look();
  follow(pause).catch((error) => {
    if (error.name !== "AbortError") foot.replaceChildren(el("span", { class: "problem" }, error.message));
  });
}

const place = (line) => [
  addressOf({ view: "group", step: line.step, ticket: line.ticket }),
  `step ${line.step}, ticket ${line.ticket}, number ${line.index}`,
];

/** A completion as the run kept it for people, with a link to where it belongs. */
export function card(line, address, words) {
  return el(
    "li",
    {},
    el(
      "p",
      { class: "head" },
      el("a", { href: address }, words),
      el("b", {}, line.reward === null ? tag("failed", "bad") : `reward ${number(line.reward)}`),
      line.advantage === null ? null : el("span", {}, `advantage ${fixed(line.advantage, 2)}`),
      el("span", {}, `${number(line.num_tokens)} tokens`),
      line.truncated ? tag("truncated", "warn") : null,
      el("span", {}, `version ${number(line.version)}`),
    ),
    line.failure ? el("p", { class: "problem" }, shown(line.failure)) : null,
    box(el("span", { class: "quiet" }, shown(line.prompt))),
    box(shown(line.completion)),
    line.answer ? el("p", { class: "quiet" }, "answer: ", shown(line.answer)) : null,
  );
}

function form(asked) {
  const inputs = FIELDS.map(([name, label, type]) =>
    field(label, el("input", { type, step: "any", min: name.startsWith("step_") ? "1" : null, name, value: asked[name] })),
  );
  const selects = Object.entries(CHOICES).map(([name, choices]) =>
    field(
      { where: "Look in", failed: "Reward", truncated: "End" }[name],
      el(
        "select",
        { name },
        choices.map(([value, words]) => el("option", { value, selected: (asked[name] ?? "") === value }, words)),
      ),
    ),
  );
  const submit = (event) => {
    event.preventDefault();
    go(addressOf({ ...withoutRuns(state()), ...Object.fromEntries(new FormData(event.target)) }));
  };
  return el("form", { class: "bar filters", on: { submit } }, inputs, selects, el("button", {}, "Find"));
}
