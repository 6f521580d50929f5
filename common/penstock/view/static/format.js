// Numbers and times as people read them: few digits, and a dash for what is not known.

export const UNKNOWN = "\u2013";

/** Three significant digits; whole numbers in full. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return UNKNOWN;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

export const fixed = (value, digits) => (value === null || value === undefined ? UNKNOWN : value.toFixed(digits));

/** With its sign, as a difference. */
export function signed(value, digits = 4) {
  if (value === null || value === undefined) return UNKNOWN;
  const shown = Math.abs(value).toFixed(digits);
  return Number(shown) === 0 ? shown : `${value < 0 ? "\u2212" : "+"}${shown}`;
}

export const percent = (value) => (value === null || value === undefined ? UNKNOWN : `${Math.round(value * 100)} %`);

export function seconds(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (value < 60) return `${number(value)} s`;
  const whole = Math.round(value);
  return whole < 3600 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${number(value / 3600)} h`;
}

/** The accuracy of an evaluation, and of how many prompts it is if the reward of some failed. */
export const accuracyOf = (line) => fixed(line.accuracy, 2) + counted(line);

function counted({ num_scored: scored, num_failed: failed }) {
  if (!failed) return "";
  return scored ? ` (of ${scored}; ${failed} failed)` : ` (all ${failed} failed)`;
}

/** 95 % interval of a share of n, by Wilson: it stays within 0 and 1. */
export function wilson(share, n) {
  if (!n) return [share, share];
  const z2 = 1.96 ** 2;
  const middle = (share + z2 / (2 * n)) / (1 + z2 / n);
  const half = (1.96 / (1 + z2 / n)) * Math.sqrt((share * (1 - share)) / n + z2 / (4 * n * n));
  return [Math.min(share, middle - half), Math.max(share, middle + half)];
}
