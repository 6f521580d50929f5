// Questions to the server that this page came from, and to no other. The token stays in this tab.

const TOKEN = "penstock-token";

export class Refused extends Error {}

let pending = new AbortController();

/** Forget what was asked for a view that nobody looks at any more. */
export function forget() {
  pending.abort();
  pending = new AbortController();
}

/** The answer to a question: `ask("runs", "demo", "curves", {name: [...]})`. Refused if a token is needed. */
export async function ask(...words) {
  const options = typeof words.at(-1) === "object" ? words.pop() : {};
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(options)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "") query.append(name, each);
    }
  }
  const path = ["v1/view", ...words.map((word) => encodeURIComponent(word))].join("/");
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(`${path}?${query}`, { headers, signal: pending.signal });
  if (answer.status === 401) throw new Refused("token");
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.detail ?? `the server answered ${answer.status}`);
  return body;
}

export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);
