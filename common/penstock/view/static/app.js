// The page: which runs, which view, and the one content that the address asks for.

import { addressOf, follow, go, state } from "./address.js";
import { ask, forget, keepToken, Refused } from "./data.js";
import { el, field } from "./dom.js";
import * as evaluations from "./evaluations.js";
import * as group from "./group.js";
import * as learning from "./learning.js";
import { drawIn } from "./plot.js";
import * as search from "./search.js";
import * as step from "./step.js";
import * as steps from "./steps.js";
import * as tickets from "./tickets.js";
import * as timeline from "./timeline.js";
import * as tokens from "./tokens.js";

const REFRESH_MS = 10_000;
const VIEWS = { learning, steps, step, group, tokens, evaluations, search, timeline, tickets };
const TABS = [
  ["learning", "Learning"],
  ["steps", "Steps"],
  ["evaluations", "Evaluations"],
  ["search", "Completions"],
  ["timeline", "Timeline"],
  ["tickets", "Tickets"],
];
const PARENTS = { step: "steps", group: "steps", tokens: "steps" };

const main = document.getElementById("main");
const said = document.getElementById("said");
let known = [];
let shownFor = 0;

/** Show what the address says; an answer that comes after the reader has gone on is dropped. */
async function render({ quietly = false } = {}) {
  const mine = ++shownFor;
  if (!quietly) forget();
  const asked = state();
  const view = VIEWS[asked.view] ?? learning;
  main.setAttribute("aria-busy", "true");
  try {
    known = await ask("runs");
    const keys = known.map((each) => each.key);
    const runs = asked.runs.filter((run) => keys.includes(run));
    if (!runs.length) runs.push(keys[0]);
    showRuns(runs);
    showTabs(asked, runs);
    const content = await view.show({ ...asked, runs, run: runs[0] });
    if (mine !== shownFor) return;
    main.replaceChildren(...[content].flat());
    drawIn(main);
    if (!quietly) main.querySelector(".wanted")?.scrollIntoView({ block: "center" });
    document.title = `${asked.view} \u00b7 ${runs.join(", ")} \u00b7 Penstock`;
    said.textContent = "";
  } catch (error) {
    if (error.name === "AbortError" || mine !== shownFor) return;
    if (error instanceof Refused) main.replaceChildren(login());
    else if (quietly) said.textContent = `not up to date: ${error.message}`;
    else main.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message));
  } finally {
    if (mine === shownFor) main.removeAttribute("aria-busy");
  }
}

function showRuns(chosen) {
  document.getElementById("runs").replaceChildren(
    ...known.map((run) => {
      const place = chosen.indexOf(run.key);
      const box = el("input", { type: "checkbox", checked: place >= 0, on: { change: () => choose(run.key, chosen) } });
      return el(
        "label",
        { class: "run", title: `${run.folder}: ${run.reason}` },
        box,
        el("span", { class: `dot ${place >= 0 ? `series-${place % 6}` : "none"}`, "aria-hidden": "true" }),
        el("span", {}, run.key),
        el("span", { class: `state ${run.state}` }, run.state),
      );
    }),
  );
}

function choose(key, chosen) {
  const runs = chosen.includes(key) ? chosen.filter((run) => run !== key) : [...chosen, key];
  const { view } = state();
  go(addressOf({ view: PARENTS[view] ? null : view }, runs));
}

function showTabs(asked, runs) {
  const present = PARENTS[asked.view] ?? asked.view;
  document
    .getElementById("tabs")
    .replaceChildren(
      ...TABS.map(([name, title]) =>
        el("a", { href: addressOf({ view: name }, runs), "aria-current": name === present ? "page" : null }, title),
      ),
    );
}

function login() {
  const input = el("input", { type: "password", name: "token", autocomplete: "off", required: true });
  const submit = (event) => {
    event.preventDefault();
    keepToken(input.value);
    render();
  };
  return el(
    "form",
    { class: "login", on: { submit } },
    el("p", {}, "This run is behind a token: the value of PENSTOCK_TOKEN where it is served."),
    field("Token", input),
    el("button", {}, "Show"),
  );
}

setInterval(() => {
  const runs = known.some((run) => run.state === "running");
  const busy = document.activeElement?.closest?.("main form, main table");
  if (runs && !document.hidden && !busy && (VIEWS[state().view] ?? learning).isLive) render({ quietly: true });
}, REFRESH_MS);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => render());
follow(render);
