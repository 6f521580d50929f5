// Rewards as small squares: one for each completion of a group, so that a step's groups are seen at a glance.

import { el } from "./dom.js";
import { number } from "./format.js";

/** The least and the greatest of all rewards that are none's failure. */
export function rangeOf(lists) {
  const values = lists.flat().filter((value) => value !== null);
  return values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
}

/** A square for each reward; a failure is crossed. range: of the darkest and the brightest. */
export function strip(rewards, [lowest, highest]) {
  const said = rewards.map((value) => (value === null ? "failed" : number(value))).join(", ");
  return el(
    "span",
    { class: "strip", role: "img", "aria-label": `rewards: ${said}`, title: said },
    rewards.map((value) => {
      if (value === null) return el("i", { class: "failed" });
      const share = highest > lowest ? (value - lowest) / (highest - lowest) : 0.5;
      return el("i", { style: { "--share": `${Math.round(share * 100)}%` } });
    }),
  );
}
