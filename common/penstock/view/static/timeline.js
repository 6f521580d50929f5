// Swimlanes: what the trainer did, which server made which ticket, and when weights were pushed.

import { addressOf, go } from "./address.js";
import { ask } from "./data.js";
import { el } from "./dom.js";
import { number, seconds } from "./format.js";
import { chart, colour, plain, series } from "./plot.js";

export const isLive = true;

const SPAN = 6;
const PHASES = {
  wait: "waits for a batch",
  commit: "writes the step file",
  take_turn: "takes the GPU",
  update: "computes",
  leave: "leaves the GPU",
  push_wait: "waits for weights",
};

export async function show(asked) {
  let first = asked.first === undefined ? null : Number(asked.first);
  let last = asked.last === undefined ? null : Number(asked.last);
  if (first === null || last === null) {
    const about = await ask("runs", asked.run);
    last = about.last_step ?? 1;
    first = Math.max(1, last - SPAN + 1);
  }
  const found = await ask("runs", asked.run, "timeline", { first, last });
  const at = (from) =>
    addressOf({ view: "timeline", first: Math.max(1, from), last: Math.max(1, from) + (last - first) });
  const nav = el(
    "nav",
    { class: "bar", "aria-label": "Steps" },
    first > 1 ? el("a", { href: at(first - (last - first) - 1), rel: "prev" }, "earlier") : null,
    el("a", { href: at(last + 1), rel: "next" }, "later"),
    el("span", { class: "quiet" }, `steps ${first}\u2013${last}`),
  );
  if (!found.trainer.length)
    return [el("h1", {}, "Timeline"), nav, el("p", { class: "quiet" }, "None of these steps has ended.")];
  const begin = Math.min(...found.trainer.map((bar) => bar.start), ...found.servers.map((bar) => bar.start));
  const { lanes, traces } = bars(found, begin);
  const marks = found.pushes.map((push) => ({
    type: "rect",
    yref: "paper",
    y0: 0,
    y1: 1,
    x0: push.start - begin,
    x1: push.end - begin,
    line: { width: 0 },
    fillcolor: series(1, 0.18),
    layer: "below",
  }));
  const busy = found.servers.length;
  const said = `${found.trainer.length} phases of the trainer, ${busy} groups, ${found.pushes.length} pushes`;
  return [
    el("h1", {}, "Timeline"),
    nav,
    el(
      "div",
      { class: "charts" },
      chart("Trainer and servers", said, traces, {
        height: Math.max(180, 22 * lanes.length + 60),
        wide: true,
        last: `${number(busy)} groups, ${number(found.pushes.length)} pushes`,
        onStep: (_, point) => go(point.customdata.address),
        layout: {
          barmode: "overlay",
          hovermode: "closest",
          shapes: marks,
          margin: { l: 150, r: 8, t: 6, b: 30 },
          xaxis: { ticksuffix: " s" },
          yaxis: {
            type: "category",
            categoryorder: "array",
            categoryarray: [...lanes].reverse(),
            nticks: lanes.length,
            tickfont: { size: 10 },
          },
        },
      }),
    ),
    el(
      "p",
      { class: "quiet note" },
      "Shaded: pushes of weights, drawn from the start of the step that they ran beside. A click opens the step or the group.",
    ),
    found.missing ? el("p", { class: "problem" }, found.missing) : null,
  ].filter(Boolean);
}

/** Bars by lane; groups of a server that overlap get lanes of their own. */
function bars(found, begin) {
  const phases = Object.entries(PHASES).map(([phase, words], place) => {
    const some = found.trainer.filter((bar) => bar.phase === phase);
    return trace(
      words,
      some,
      () => "trainer",
      series(place + 2),
      begin,
      (bar) => ({ words: `step ${bar.step} ${words}`, address: addressOf({ view: "step", step: bar.step }) }),
    );
  });
  const laneOf = new Map(),
    ends = new Map();
  for (const bar of [...found.servers].sort((a, b) => a.start - b.start)) {
    const free = ends.get(bar.server) ?? [];
    ends.set(bar.server, free);
    const found_ = free.findIndex((end) => end <= bar.start);
    const lane = found_ < 0 ? free.length : found_;
    free[lane] = bar.end;
    laneOf.set(bar, `${plain(short(bar.server))}${lane ? ` \u00b7 ${lane + 1}` : ""}`);
  }
  const groups = trace(
    "makes a group",
    found.servers,
    (bar) => laneOf.get(bar),
    series(0),
    begin,
    (bar) => ({
      words: `ticket ${bar.ticket}, step ${bar.step}`,
      address: addressOf({ view: "group", step: bar.step, group: bar.group }),
    }),
  );
  const lanes = [
    "trainer",
    ...[...new Set(laneOf.values())].sort((a, b) => a.localeCompare(b, "en", { numeric: true })),
  ];
  return { lanes, traces: [...phases.filter((each) => each.x.length), groups] };
}

const trace = (name, some, lane, paint, begin, about) => ({
  type: "bar",
  orientation: "h",
  name,
  y: some.map(lane),
  base: some.map((bar) => bar.start - begin),
  x: some.map((bar) => bar.end - bar.start),
  customdata: some.map(about),
  text: some.map((bar) => `${about(bar).words}: ${seconds(bar.end - bar.start)}`),
  textposition: "none",
  marker: { color: paint, line: { color: colour("paper", 0.6), width: 0.5 } },
  hovertemplate: "%{text}<extra></extra>",
});

const short = (server) => (server.length > 22 ? `${server.slice(0, 21)}\u2026` : server);
