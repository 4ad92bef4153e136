// Small pieces that the parts of the page share. Text is always set as text, never as markup.
export const find = (id) => document.getElementById(id);

export function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

export function row(cells, chosen = false) {
  const made = element("tr", "", chosen ? "chosen" : "");
  made.append(...cells.map((cell) => element("td", cell)));
  return made;
}

export function say(id, text, bad = false) {
  find(id).textContent = text;
  find(id).classList.toggle("bad", bad);
}

export const bytes = (count) =>
  count < 1000 ? `${Math.round(count)} B` : count < 1e6 ? `${(count / 1000).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;
export const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(1)} %`);

export async function problem(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the agent answered ${reply.status}`;
  }
}
