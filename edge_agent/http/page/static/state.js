// The state of the agent: cloud, link, budgets, exits, and what was saved.
import { bytes, element, find, percent } from "./dom.js";
import { saved } from "./photo.js";

// Samples of one counter of the Prometheus text, as [labels, value].
function samples(text, name) {
  return text.split("\n").filter((line) => line.startsWith(name)).map((line) => {
    const labels = Object.fromEntries([...line.matchAll(/(\w+)="([^"]*)"/g)].map((found) => found.slice(1)));
    return [labels, Number(line.slice(line.lastIndexOf(" ")))];
  });
}

function routes(metrics) {
  const found = {};
  for (const [labels, count] of samples(metrics, "isthmus_edge_requests_total")) {
    if (count) found[labels.route] = (found[labels.route] ?? 0) + count;
  }
  return Object.entries(found).map(([route, count]) => `${route} ${count}`).join(", ") || "none yet";
}

function facts(status, metrics) {
  const found = [], { bundle, link, language } = status;
  for (const cloud of status.clouds ?? []) {
    found.push(["Cloud", `${cloud.address}: ${cloud.state}${cloud.problem ? `, ${cloud.problem}` : ""}`]);
  }
  if (bundle) {
    if (!status.clouds?.length) found.push(["Cloud", "none is configured"]);
    if (link?.rtt_s != null) found.push(["Link", `round trip ${(1000 * link.rtt_s).toFixed(1)} ms, ${bytes(link.bytes_per_s ?? 0)}/s`]);
    found.push(["Bundle", `${bundle.name}, taps ${Object.keys(bundle.taps).join(", ")}`]);
    found.push(["Goal", `${status.objective}, profile ${status.profile}`]);
    const exits = status.exit_confidences.map((each) => (each == null ? "never" : `from ${percent(each)}`)).join(", ");
    found.push(["Exits", `${exits || "none"}${status.certificates_void?.length ? `; certificates void: ${status.certificates_void}` : ""}`]);
    for (const budget of status.budgets) {
      found.push(["Budget", `${budget.amount}: ${budget.left.toPrecision(3)} of ${budget.limit} left in ${budget.period_s} s`]);
    }
    found.push(["Photos", routes(metrics)]);
    if (saved.photos) {
      const less = 1 - saved.sent / saved.whole;
      const compared = `${percent(Math.abs(less))} ${less < 0 ? "more" : "less"}`;
      found.push(["Sent by page", `${bytes(saved.sent)}, ${compared} than ${bytes(saved.whole)} as JPEG`]);
    }
  }
  if (language) {
    found.push(["Model", [language.model, language.cloud_model && `cloud: ${language.cloud_model}`].filter(Boolean).join("; ")]);
    found.push(["Router", language.router ?? language.router_problem ?? "none"]);
  }
  return found;
}

export async function showState() {
  const [reply, metrics] = await Promise.all([fetch("/v1/status"), fetch("/metrics")]);
  const status = reply.ok ? await reply.json() : {}, text = await metrics.text();
  find("facts").replaceChildren(
    ...facts(status, text).flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
  );
  find("cloud").textContent = status.cloud ? `cloud: ${status.cloud}` : "on this device alone";
  return status;
}
