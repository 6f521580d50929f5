// A group: its completions next to each other, each marked where it first differs from one of them.

import { addressOf } from "./address.js";
import { ask } from "./data.js";
import { box, el, figures, shown, table, tag } from "./dom.js";
import { fixed, number } from "./format.js";
import { rangeOf, strip } from "./rewards.js";
import { difference, marks } from "./step.js";

export async function show(asked) {
  const step = Number(asked.step ?? 1);
  const index = asked.group === undefined ? await placeOf(asked, step) : Number(asked.group);
  const found = await ask("runs", asked.run, "steps", step, "groups", index, { base: asked.base });
  const { summary, prompt, completions } = found;
  const order = [...completions].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity) || a.index - b.index);
  const at = (group) => addressOf({ view: "group", step, group });
  return [
    el("h1", {}, `Step ${step}, group ${index} `, ...marks(summary).filter(Boolean)),
    el(
      "nav",
      { class: "bar", "aria-label": "Groups" },
      el("a", { href: addressOf({ view: "step", step }) }, `all groups of step ${step}`),
      index > 0 ? el("a", { href: at(index - 1), rel: "prev" }, "previous group") : null,
      index + 1 < found.num_groups ? el("a", { href: at(index + 1), rel: "next" }, "next group") : null,
      el("a", { href: addressOf({ view: "tickets", ticket: summary.ticket }) }, `ticket ${summary.ticket}`),
    ),
    figures([
      ["mean", fixed(summary.mean, 3)],
      ["\u00b1", fixed(summary.std, 3)],
      ["answer", shown(prompt.answer)],
      ["temperature", number(prompt.temperature)],
      ["server", summary.server],
      ["issued with version", number(prompt.issued_version)],
      ["rewards of", prompt.functions.join(", ") || null],
    ]),
    el(
      "details",
      { open: prompt.text.length < 600 },
      el("summary", {}, prompt.num_tokens ? `Prompt, ${number(prompt.num_tokens)} tokens` : "Prompt"),
      el("pre", { class: "text" }, shown(prompt.text || summary.environment)),
      prompt.metadata ? el("pre", { class: "text quiet" }, shown(prompt.metadata)) : null,
    ),
    el(
      "section",
      {},
      el("h2", {}, "Completions"),
      el(
        "p",
        { class: "quiet note" },
        "Highest reward first. What a completion has in common with number ",
        String(found.base),
        " is grey; the first token that differs is marked. ",
        found.no_text ? `Shown as ids: ${found.no_text}.` : "",
        found.has_advantages ? "" : " Files do not tell the advantages of this run.",
      ),
      el(
        "ol",
        { class: "beside" },
        order.map((each) => card(each, step, index, found.largest_log_ratios[each.index])),
      ),
    ),
    await overTime(asked.run, summary.ticket),
  ];
}

async function placeOf({ run, ticket }, step) {
  const { groups } = await ask("runs", run, "steps", step);
  const found = groups.find((group) => group.ticket === Number(ticket));
  if (!found) throw new Error(`The step file of step ${step} holds no group of ticket ${ticket}.`);
  return found.index;
}

function card(each, step, group, largest) {
  const values = Object.entries(each.values)
    .map(([name, value]) => `${name} ${value === null ? "failed" : number(value)}`)
    .join(", ");
  return el(
    "li",
    { class: each.is_base ? "base" : null },
    el(
      "p",
      { class: "head" },
      el("a", { href: addressOf({ view: "tokens", step, group, completion: each.index }) }, `number ${each.index}`),
      el("b", { title: values }, each.reward === null ? tag("failed", "bad") : `reward ${number(each.reward)}`),
      each.shaped_reward === each.reward ? null : el("span", {}, `shaped ${number(each.shaped_reward)}`),
      each.advantage === null ? null : el("span", {}, `advantage ${fixed(each.advantage, 2)}`),
      el("span", {}, `${number(each.num_tokens)} tokens`),
      largest ? difference(step, group, largest, "trainer \u2212 sampler ") : null,
      el("span", {}, each.end),
      el("span", {}, `version ${each.versions.join(", ") || "\u2013"}`),
      each.is_base
        ? el("span", { class: "quiet" }, "compared with")
        : el("a", { href: addressOf({ view: "group", step, group, base: each.index }) }, "compare with this"),
    ),
    each.failure ? el("p", { class: "problem" }, shown(each.failure)) : null,
    box(
      el("span", { class: "same" }, shown(each.before, { lineEnds: true })),
      each.at ? el("mark", {}, shown(each.at, { lineEnds: true })) : null,
      shown(each.behind, { lineEnds: true }),
      each.num_left_out ? el("span", { class: "quiet" }, ` \u2026 ${number(each.num_left_out)} more tokens`) : null,
    ),
  );
}

/** What became of the same prompt in other epochs. */
export async function overTime(run, ticket) {
  const { draws } = await ask("runs", run, "tickets", ticket);
  const range = rangeOf(draws.map((draw) => draw.summary?.rewards ?? []));
  const columns = [
    { title: "epoch", number: true, cell: (draw) => number(draw.epoch) },
    {
      title: "ticket",
      number: true,
      cell: (draw) => el("a", { href: addressOf({ view: "tickets", ticket: draw.ticket }) }, String(draw.ticket)),
    },
    { title: "end", cell: (draw) => [draw.end, draw.reason ? `: ${draw.reason}` : ""].join("") },
    {
      title: "group",
      cell: (draw) =>
        draw.summary
          ? el(
              "a",
              { href: addressOf({ view: "group", step: draw.step, group: draw.summary.index }) },
              `step ${draw.step}, group ${draw.summary.index}`,
            )
          : el("span", { class: "quiet" }, draw.missing),
    },
    { title: "sampled by version", number: true, cell: (draw) => number(draw.summary?.oldest_version) },
    { title: "rewards", cell: (draw) => (draw.summary ? strip(draw.summary.rewards, range) : "") },
    { title: "mean", number: true, cell: (draw) => fixed(draw.summary?.mean, 3) },
    { title: "length", number: true, cell: (draw) => fixed(draw.summary?.length_mean, 1) },
  ];
  return el(
    "section",
    {},
    el("h2", {}, "This prompt over time"),
    table("Draws of the same prompt", columns, draws, {
      rowClass: (draw) => (draw.ticket === ticket ? "present" : null),
    }),
  );
}
