// The ledger: why a ticket ended. A ticket that ended as poison has a dead letter: the message that nobody could use.

import { addressOf, go } from "./address.js";
import { ask } from "./data.js";
import { box, el, field, figures, shown, table } from "./dom.js";
import { number } from "./format.js";
import { overTime } from "./group.js";
import { card } from "./search.js";

export const isLive = true;

const PAGE = 100;
const MOST_COMPLETIONS = 20;
const MOST_LETTERS = 20;
const OPEN_CHARACTERS = 600; // of a message that is shown at once
const MEANING = {
  stale: "its group was too old when its batch closed",
  degenerate: "its rewards are all equal and give no gradient",
  reward_failed: "too few of its completions have a reward",
  poison: "no service could use its message, which is a dead letter",
};

export async function show(asked) {
  const offset = Number(asked.offset ?? 0);
  const [found, letters, completions] = await Promise.all([
    ask("runs", asked.run, "tickets", { reason: asked.reason, offset, limit: PAGE }),
    ask("runs", asked.run, "dead_letters", { ticket: asked.ticket, limit: MOST_LETTERS }),
    ask("runs", asked.run, "dropped", { reason: asked.reason, ticket: asked.ticket, limit: MOST_COMPLETIONS }),
  ]);
  const reasons = Object.entries(found.dropped);
  const at = (values) => addressOf({ view: "tickets", reason: asked.reason, ...values });
  return [
    el("h1", {}, "Tickets"),
    figures([
      ["trained", number(found.trained)],
      ...reasons.map(([reason, count]) => [`dropped: ${reason}`, number(count), MEANING[reason]]),
    ]),
    lookup(),
    ...(asked.ticket === undefined ? [] : await one(asked.run, Number(asked.ticket))),
    el(
      "section",
      {},
      el("h2", {}, "Dropped tickets"),
      el(
        "p",
        { class: "bar" },
        el("a", { href: addressOf({ view: "tickets" }), "aria-current": asked.reason ? null : "true" }, "all"),
        Object.keys(MEANING).map((reason) =>
          el(
            "a",
            { href: addressOf({ view: "tickets", reason }), "aria-current": asked.reason === reason ? "true" : null },
            reason.replace("_", " "),
          ),
        ),
      ),
      asked.reason
        ? el("p", { class: "quiet note" }, `${asked.reason}: ${MEANING[asked.reason] ?? ""}.`)
        : null,
      found.total ? drops(found.drops) : el("p", { class: "quiet" }, "None."),
      el(
        "p",
        { class: "bar" },
        offset ? el("a", { href: at({ offset: Math.max(0, offset - PAGE) }) }, "newer") : null,
        offset + PAGE < found.total ? el("a", { href: at({ offset: offset + PAGE }) }, "older") : null,
      ),
    ),
    asked.reason && asked.reason !== "poison" ? null : dead(letters),
    unscored(completions),
  ].filter(Boolean);
}

/** The messages that no service could use. */
function dead(letters) {
  if (!letters.length) return null;
  return el(
    "section",
    {},
    el("h2", {}, "Dead letters"),
    el(
      "p",
      { class: "quiet note" },
      "Of dead.jsonl, the newest first: messages that no service could use. The run keeps the last ones. While the " +
        "queue lives, it has them in full, and can send one again: penstock dead show, penstock dead retry.",
    ),
    el("ol", { class: "found" }, letters.map(letter)),
  );
}

function letter(line) {
  const isTicket = /^\d{1,15}$/.test(line.ticket);
  const named = line.ticket ? ["ticket ", shown(line.ticket)] : "names no ticket";
  return el(
    "li",
    {},
    el(
      "p",
      { class: "head" },
      isTicket ? el("a", { href: addressOf({ view: "tickets", ticket: line.ticket }) }, named) : el("span", {}, named),
      el("span", {}, "from ", shown(line.stage || "no stage")),
      line.attempt ? el("span", {}, "attempt ", shown(line.attempt)) : null,
      el("span", {}, new Date(line.since * 1000).toLocaleString()),
      el("span", {}, `${number(line.num_bytes)} bytes`),
      el("code", {}, shown(line.id)),
    ),
    el("p", { class: "problem" }, shown(line.reason)),
    line.problem && line.problem !== line.reason
      ? el("p", {}, "Of its message: ", shown(line.problem))
      : null,
    line.text
      ? el("details", { open: line.text.length < OPEN_CHARACTERS }, el("summary", {}, "Message"), box(shown(line.text)))
      : null,
  );
}

/** What dropped groups hold without a reward: no step file has them. */
function unscored(lines) {
  if (!lines.length) return null;
  const words = (line) =>
    `ticket ${line.ticket}, number ${line.index}: ${line.dropped.replace("_", " ")}, while step ${line.step} was collected`;
  return el(
    "section",
    {},
    el("h2", {}, "Completions without a reward"),
    el(
      "p",
      { class: "quiet note" },
      "Of dropped.jsonl, the newest first: no step has these groups. The run keeps the last ones.",
    ),
    el(
      "ol",
      { class: "found" },
      lines.map((line) => card(line, addressOf({ view: "tickets", ticket: line.ticket }), words(line))),
    ),
  );
}

const drops = (rows) =>
  table(
    "Dropped tickets, the last one first",
    [
      {
        title: "ticket",
        number: true,
        cell: (row) => el("a", { href: addressOf({ view: "tickets", ticket: row.ticket }) }, String(row.ticket)),
      },
      { title: "reason", cell: (row) => row.reason },
      { title: "completions", number: true, cell: (row) => number(row.num_completions) },
      { title: "why", cell: (row) => why(row) },
    ],
    rows,
  );

const why = (row) => [
  shown(row.why),
  ...Object.entries(row.failures).map(([reason, count]) => el("div", {}, `${count} \u00d7 `, shown(reason))),
];

async function one(run, ticket) {
  const found = await ask("runs", run, "tickets", ticket);
  const ends = {
    trained: () =>
      el("a", { href: addressOf({ view: "group", step: found.step, ticket }) }, `trained in step ${found.step}`),
    dropped: () => [`dropped as ${found.reason}: ${MEANING[found.reason]}. `, why(found)],
    outstanding: () => "not ended: it is outstanding, or was never issued",
  };
  return [
    el("section", {}, el("h2", {}, `Ticket ${ticket}`), el("p", {}, ends[found.end]())),
    await overTime(run, ticket),
  ];
}

function lookup() {
  const input = el("input", { type: "number", min: "0", name: "ticket", required: true });
  const submit = (event) => {
    event.preventDefault();
    go(addressOf({ view: "tickets", ticket: input.value }));
  };
  return el(
    "form",
    { class: "inline bar", on: { submit } },
    field("Ticket", input),
    el("button", {}, "Why did it end"),
  );
}
