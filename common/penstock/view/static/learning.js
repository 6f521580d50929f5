// Is it learning, and what holds it up: the curves of one run, or of several over each other.

import { addressOf, go } from "./address.js";
import { ask } from "./data.js";
import { el, figures } from "./dom.js";
import { setsOf } from "./evaluations.js";
import { accuracyOf, fixed, number, percent, seconds, wilson } from "./format.js";
import { keys, PHASES } from "./phases.js";
import { banded, chart, plain, points, series } from "./plot.js";

export const isLive = true;

const REWARD = "reward_mean",
  SPREAD = "statistics/reward_std";
const STEP = "seconds/step",
  GENERATION = "generation_seconds";
const COMPUTED = ["seconds/forward_backward", "seconds/optimizer"];
const WINDOW = 5;
const SMALL = [
  {
    title: "Staleness",
    unit: "versions",
    names: [
      ["mean", "staleness_mean"],
      ["max", "staleness_max"],
    ],
  },
  { title: "KL from the sampler", unit: "nats", names: [["behaviour", "statistics/behaviour_kl"]] },
  { title: "KL from the teacher", unit: "nats", names: [["teacher", "statistics/teacher_kl"]], signed: true },
  { title: "KL from the reference", unit: "nats", names: [["reference", "statistics/reference_kl"]] },
  { title: "Effective sample size", unit: "share", names: [["ratio", "statistics/effective_sample_size_ratio"]] },
  { title: "Entropy", unit: "nats", names: [["entropy", "statistics/entropy"]] },
  { title: "Length", unit: "tokens", names: [["generated", "statistics/length_generated"]] },
  { title: "Groups without a signal", unit: "share", names: [["no signal", "statistics/no_signal_ratio"]] },
  { title: "Failed rewards", unit: "share", names: [["failed", "statistics/failed_reward_ratio"]] },
  { title: "Truncated", unit: "share", names: [["truncated", "statistics/truncated_ratio"]] },
  { title: "Clipped tokens", unit: "share", names: [["clipped", "statistics/clipped_ratio"]] },
  { title: "Gradient norm", unit: "", names: [["norm", "statistics/grad_norm"]] },
  { title: "Loss", unit: "", names: [["loss", "statistics/loss"]], signed: true },
];
const NAMES = [
  REWARD,
  SPREAD,
  STEP,
  GENERATION,
  ...COMPUTED,
  ...PHASES.map(([phase]) => `seconds/${phase}`),
  ...SMALL.flatMap((each) => each.names.map(([, name]) => name)),
];

export async function show(state) {
  const range = { first: state.first, last: state.last };
  const runs = await Promise.all(
    state.runs.map(async (key) => {
      const [about, curves, evals] = await Promise.all([
        ask("runs", key),
        ask("runs", key, "curves", { name: NAMES, ...range }),
        ask("runs", key, "evaluations"),
      ]);
      return { key, about, curves, evals };
    }),
  );
  if (!runs.some((run) => run.about.num_steps || run.evals.length)) {
    return [
      el("h1", {}, "No step yet"),
      el("p", { class: "quiet" }, `${runs[0].about.state}: ${runs[0].about.reason}`),
    ];
  }
  const title = runs.length === 1 ? runs[0].key : `${runs.length} runs`;
  return [
    el("h1", {}, title),
    ...runs.flatMap((run) => [summary(run, runs.length > 1), stopped(run)].filter(Boolean)),
    el("div", { class: "charts" }, rewards(runs), ...waits(runs), ...small(runs)),
    el(
      "p",
      { class: "quiet note" },
      "A click on a curve opens the step. Bands: of the reward, one standard deviation of its " +
        "completions; elsewhere the lowest and highest of the steps that a point stands for; of the accuracy, its 95 % interval.",
    ),
  ];
}

const last = (curve) => curve?.y.at(-1);

function summary({ key, about, curves }, named) {
  const dropped = Object.entries(about.dropped)
    .map(([reason, count]) => `${count} ${reason}`)
    .join(", ");
  const { first_evaluation: before, last_evaluation: after } = about;
  return figures(
    [
      named ? ["run", key] : null,
      ["state", about.state, about.reason],
      ["steps", number(about.num_steps)],
      ["reward", `${fixed(curves[REWARD].y[0], 2)} \u2192 ${fixed(last(curves[REWARD]), 2)}`],
      after ? ["accuracy", fromTo(before, after, accuracyOf), "of held-out prompts"] : null,
      ...Object.entries(about.sets).map(([name, { first, last }]) => [
        `accuracy ${name}`,
        fromTo(first, last, accuracyOf),
        "of held-out prompts",
      ]),
      after ? ["held-out reward", fromTo(before, after, (line) => fixed(line.reward_mean, 2))] : null,
      ["step time", seconds(last(curves[STEP]))],
      ["tickets trained", number(about.trained)],
      ["dropped", dropped || "0"],
      about.state === "finished" || about.state === "running" ? null : ["why", about.reason],
    ].filter(Boolean),
  );
}

/** Why a run ended before all of its steps, without a failure. */
const stopped = ({ about }) =>
  about.stopped_early ? el("p", { class: "note" }, `Stopped ${about.stopped_early}.`) : null;

const fromTo = (before, after, figure) =>
  before.steps === after.steps ? figure(after) : `${figure(before)} \u2192 ${figure(after)}`;

const openStep = (runs) => (x, point) => {
  const run = runs[point.data.meta ?? 0]?.key ?? runs[0].key;
  go(addressOf({ view: "step", step: Math.max(1, Math.round(x)) }, [run])); // an evaluation may be after 0 steps
};

function rewards(runs) {
  const traces = runs.flatMap(({ key, curves, evals }, place) => {
    const curve = curves[REWARD],
      spread = curves[SPREAD];
    const hasSpread = spread.y.length === curve.y.length;
    const deviation = (sign) => curve.y.map((value, index) => value + sign * spread.y[index]);
    const bands = hasSpread ? { low: deviation(-1), high: deviation(1) } : {};
    const name = runs.length > 1 ? `${key} ` : "";
    const sets = setsOf(evals);
    const accuracies = sets.map((set, number) => {
      const done = evals
        .filter((line) => line.set === set && line.accuracy !== null)
        .sort((a, b) => a.steps - b.steps);
      const intervals = done.map((line) => wilson(line.accuracy, line.num_scored));
      return points(
        `${name}accuracy${sets.length > 1 ? ` ${set}` : ""}`,
        done.map((line) => line.steps),
        done.map((line) => line.accuracy),
        intervals.map(([low]) => low),
        intervals.map(([, high]) => high),
        (runs.length > 1 ? place : 1) + number,
      );
    });
    return [
      ...banded(`${name}training reward`, curve, place, bands),
      ...accuracies.filter((trace) => trace.x.length),
    ].map((trace) => ({ ...trace, meta: place }));
  });
  const said = runs
    .map(
      ({ key, curves }) =>
        `${key}: training reward from ${fixed(curves[REWARD].y[0], 2)} to ${fixed(last(curves[REWARD]), 2)}`,
    )
    .join("; ");
  return chart("Reward of training, and accuracy on held-out prompts", said, traces, {
    height: 290,
    wide: true,
    onStep: openStep(runs),
    layout: {
      showlegend: true,
      legend: { orientation: "h", x: 0, y: 1.12, font: { size: 11 } },
      xaxis: { title: { text: "step", standoff: 4 } },
      yaxis: { rangemode: "normal" },
    },
  });
}

function waits(runs) {
  const gaps = runs.flatMap(({ key, curves }, place) => {
    const training = COMPUTED.map((name) => curves[name]);
    if (!curves[STEP].y.length || training.some((each) => each.y.length !== curves[STEP].y.length)) return [];
    const y = gapToIdeal(
      curves[STEP].y,
      curves[GENERATION].y,
      training[0].y.map((each, index) => each + training[1].y[index]),
    );
    return banded(key, { x: curves[STEP].x, y, low: y, high: y }, place);
  });
  const gap = gaps.at(-1)?.y.at(-1);
  const figuresOf = [
    chart("Gap to ideal", `Gap to ideal, last ${number(gap)}`, gaps, {
      last: number(gap),
      layout: { yaxis: { rangemode: "normal" } },
      onStep: openStep(runs),
    }),
  ];
  const { curves } = runs[0];
  const shares = PHASES.map(([phase, words, place]) => ({
    x: curves[STEP].x,
    y: curves[`seconds/${phase}`].y,
    name: words,
    stackgroup: "time",
    mode: "lines",
    line: { width: 0.5, color: series(place) },
    fillcolor: series(place, 0.55),
    hovertemplate: `%{y:.2f} s<extra>${plain(words)}</extra>`,
  }));
  const idle = waiting(curves);
  figuresOf.push(
    chart(`Time of a step${runs.length > 1 ? ` of ${runs[0].key}` : ""}`, idle, shares, {
      layout: { yaxis: { ticksuffix: " s" } },
      onStep: openStep(runs),
    }),
  );
  figuresOf.push(
    el(
      "figure",
      { class: "words" },
      el("figcaption", {}, "Who waits for whom"),
      el("p", {}, idle),
      el(
        "p",
        { class: "legend" },
        keys(PHASES.map(([, words, place]) => [words, place])),
      ),
    ),
  );
  return figuresOf;
}

/** Step time over the longer of generation and training, minus 1, of some steps up to each: one step's work overlaps others'. */
function gapToIdeal(step, generation, training) {
  const width = Math.max(WINDOW, Math.ceil(step.length / 40));
  const sum = (values, end) => values.slice(Math.max(0, end + 1 - width), end + 1).reduce((a, b) => a + b, 0);
  return step.map((_, end) => sum(step, end) / Math.max(sum(generation, end), sum(training, end)) - 1);
}

/** In words, over the last tenth of the curve. */
function waiting(curves) {
  const recent = (name) => {
    const values = curves[name]?.y ?? [];
    const some = values.slice(-Math.max(1, Math.ceil(values.length / 10)));
    return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null;
  };
  const step = recent(STEP);
  if (!step) return "No step has ended.";
  const trainer = (recent("seconds/wait") + (recent("seconds/push_wait") ?? 0)) / step;
  const servers = Math.max(0, 1 - recent(GENERATION) / step);
  const slower = trainer > servers ? "Generation is the bottleneck" : "Training is the bottleneck";
  const balanced = Math.abs(trainer - servers) < 0.05 ? "Both are about equally busy" : slower;
  return `${balanced}: of a step's ${seconds(step)} the trainer waits ${percent(trainer)}, and the servers have no training request for ${percent(servers)}.`;
}

function small(runs) {
  return SMALL.map(({ title, unit, names, signed }) => {
    const traces = runs.flatMap(({ key, curves }, place) =>
      names.flatMap(([label, name], index) =>
        banded(runs.length > 1 ? `${key} ${label}` : label, curves[name], place, { dash: index ? "dot" : "solid" }).map(
          (trace) => ({ ...trace, meta: place }),
        ),
      ),
    );
    if (!traces.some((trace) => trace.y.length)) return null;
    const value = last(runs[0].curves[names[0][1]]);
    return chart(title, `${title}: last ${number(value)} ${unit}`, traces, {
      last: `${number(value)} ${unit}`,
      onStep: openStep(runs),
      layout: signed ? { yaxis: { rangemode: "normal" } } : {},
    });
  }).filter(Boolean);
}
