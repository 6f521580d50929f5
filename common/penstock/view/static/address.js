// The state of the page is its address, so that a link shows to others what it shows here.

/** What the address says: runs, the view, and whatever the view keeps there. */
export function state() {
  const query = new URLSearchParams(location.search);
  return { ...Object.fromEntries(query), runs: query.getAll("run"), view: query.get("view") ?? "learning" };
}

/** The address of a state: the present runs, and these values; those that are empty are left out. */
export function addressOf(values, runs = state().runs) {
  const query = new URLSearchParams();
  for (const run of runs) query.append("run", run);
  for (const [name, value] of Object.entries(values)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  return `?${query}`;
}

let render = () => {};

/** Call `listener` at each change of the address, and now. */
export function follow(listener) {
  render = listener;
  addEventListener("popstate", listener);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='?']");
    if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    go(link.getAttribute("href"));
  });
  listener();
}

/** Show another state. keep: replace the present one, as for a field that is being typed into. */
export function go(address, { keep = false } = {}) {
  history[keep ? "replaceState" : "pushState"](null, "", address);
  render();
}
