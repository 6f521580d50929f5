// Swimlanes: what the trainer did, which server made which ticket, and when weights were pushed.

import { addressOf, go } from "./address.js";
import { ask } from "./data.js";
import { el } from "./dom.js";
import { number, seconds } from "./format.js";
import { keys, PHASES, TURNS } from "./phases.js";
import { chart, colour, plain, series } from "./plot.js";

export const isLive = true;

const SPAN = 6;
const WEIGHTS = 1, // places of colours
  SERVERS = 0;
const NAME_CHARACTERS = 22;

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
  const { lanes, names, traces, legend } = bars(found, begin);
  const marks = found.pushes.map((push) => ({
    type: "rect",
    yref: "paper",
    y0: 0,
    y1: 1,
    x0: push.start - begin,
    x1: push.end - begin,
    line: { width: 0 },
    fillcolor: series(WEIGHTS, 0.14),
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
          annotations: starts(found.trainer, begin),
          margin: { l: 150, r: 8, t: 22, b: 30 },
          xaxis: { ticksuffix: " s" },
          yaxis: {
            type: "category",
            categoryorder: "array",
            categoryarray: [...lanes].reverse(),
            tickmode: "array",
            tickvals: lanes,
            ticktext: names,
            tickfont: { size: 10 },
          },
        },
      }),
    ),
    el("p", { class: "legend" }, keys(legend)),
    el(
      "p",
      { class: "quiet note" },
      "A number is where its step begins: at the end of the one before. Shaded: while weights were pushed. A click opens the step or the group.",
      found.pushes.some((push) => !push.is_measured)
        ? " An earlier release trained these steps, and recorded only how long a push took: it is drawn from the start of its step."
        : "",
    ),
    found.missing ? el("p", { class: "problem" }, found.missing) : null,
  ].filter(Boolean);
}

/** Bars by lane; groups of a server that overlap get lanes of their own. */
function bars(found, begin) {
  const there = [...PHASES, ...TURNS].filter(([phase]) => found.trainer.some((bar) => bar.phase === phase));
  const phases = there.map(([phase, words, place]) =>
    trace(
      words,
      found.trainer.filter((bar) => bar.phase === phase),
      () => "trainer",
      series(place),
      begin,
      (bar) => ({ words: `step ${bar.step} ${words}`, address: addressOf({ view: "step", step: bar.step }) }),
    ),
  );
  const laneOf = new Map(),
    ends = new Map();
  for (const bar of [...found.servers].sort((a, b) => a.start - b.start)) {
    const free = ends.get(bar.server) ?? [];
    ends.set(bar.server, free);
    const found_ = free.findIndex((end) => end <= bar.start);
    const lane = found_ < 0 ? free.length : found_;
    free[lane] = bar.end;
    laneOf.set(bar, `${plain(bar.server)} \u00b7 ${String(lane).padStart(4, "0")}`);
  }
  const groups = trace(
    "makes a group",
    found.servers,
    (bar) => laneOf.get(bar),
    series(SERVERS),
    begin,
    (bar) => ({
      words: `ticket ${bar.ticket}, step ${bar.step}`,
      address: addressOf({ view: "group", step: bar.step, group: bar.group }),
    }),
  );
  const pushes = trace(
    "pushes weights",
    found.pushes,
    () => "weights",
    series(WEIGHTS),
    begin,
    (push) => ({
      words: `${push.version === null ? "push" : `push of version ${push.version}`}, generation paused ${seconds(push.paused_seconds)}`,
      address: addressOf({ view: "step", step: push.step }),
    }),
  );
  const lanes = [
    "trainer",
    ...(found.pushes.length ? ["weights"] : []),
    ...[...new Set(laneOf.values())].sort((a, b) => a.localeCompare(b, "en", { numeric: true })),
  ];
  return {
    lanes,
    names: lanes.map(nameOf),
    traces: [...phases, ...(found.pushes.length ? [pushes] : []), groups],
    legend: [
      ...there.map(([, words, place]) => [words, place]),
      ...(found.pushes.length ? [["weights are pushed", WEIGHTS]] : []),
      ["a server makes a group", SERVERS],
    ],
  };
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

/** Of a server's first lane its name, with both of its ends; the others are those of the same server. */
function nameOf(lane) {
  const [server, number_] = lane.split(" \u00b7 ");
  if (Number(number_)) return "";
  const half = NAME_CHARACTERS / 2;
  return server.length > NAME_CHARACTERS ? `${server.slice(0, half)}\u2026${server.slice(-half)}` : server;
}

/** The number of each step, where it begins. */
function starts(bars, begin) {
  const first = new Map();
  for (const bar of bars) first.set(bar.step, Math.min(bar.start, first.get(bar.step) ?? Infinity));
  return [...first].map(([step, start]) => ({
    x: start - begin,
    y: 1,
    yref: "paper",
    yanchor: "bottom",
    xanchor: "left",
    showarrow: false,
    text: String(step),
    font: { size: 10 },
  }));
}
