// What the trainer does, in words, and its colour, wherever a page shows it: [phase, words, place of the colour].

import { el } from "./dom.js";

export const PHASES = [
  ["wait", "waits for a batch", 2],
  ["update", "computes", 3],
  ["push_wait", "waits for weights", 4],
  ["commit", "writes the step file", 5],
];

/** Those of a trainer that takes turns with the engines. */
export const TURNS = [
  ["take_turn", "takes the GPU", 0],
  ["leave", "leaves the GPU", 0],
];

/** Words with the dot of their colour: [words, place of the colour]. */
export const keys = (pairs) =>
  pairs.map(([words, place]) => el("span", { class: "key" }, el("i", { class: `dot series-${place}` }), words));
