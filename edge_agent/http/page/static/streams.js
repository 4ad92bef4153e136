// What the cameras of `edge-agent watch` see. The next picture is asked for when the last has come.
import { bytes, element, find, row } from "./dom.js";

const PERIOD_MS = 500;
const OUTCOMES = ["answered", "reused", "filtered", "dropped", "late", "failed"];

function panel(camera) {
  const made = element("article"), title = element("h3", camera), image = element("img");
  const route = element("p"), why = element("p", "", "quiet"), table = element("table"), body = element("tbody");
  image.alt = `${camera}: no frame is answered yet`;
  image.hidden = true;
  table.append(element("caption", `Frames of ${camera}`), body);
  made.append(title, image, route, why, table);
  find("cameras").append(made);
  return { image, route, why, body, frame: null };
}

async function showPicture(parts, camera, last) {
  const reply = await fetch(`/v1/streams/${camera}/picture`, { cache: "no-store" });
  if (!reply.ok) return;
  const old = parts.image.src;
  parts.image.src = URL.createObjectURL(await reply.blob());
  if (old) URL.revokeObjectURL(old);
  parts.image.hidden = false;
  const found = Object.values(last.answers).map((each) => each.label ?? `${each.detections?.length ?? 0} found`);
  parts.image.alt = `${camera}, frame ${last.frame}: ${found.join(", ")}`;
  parts.frame = last.frame;
}

async function show(parts, stream) {
  const { camera, last } = stream;
  const rows = OUTCOMES.filter((name) => stream[name]).map((name) => row([name, String(stream[name])]));
  rows.push(row(["uploads", String(stream.uploads)]), row(["sent", bytes(stream.bytes_up)]));
  parts.body.replaceChildren(...rows);
  if (!last || last.frame === parts.frame) return;
  parts.route.textContent = `Frame ${last.frame}: ${last.route}${last.rate == null ? "" : `, rate ${last.rate}`}, ${bytes(last.bytes_up)}, ${Math.round(last.age_ms)} ms${last.degraded ? ", degraded" : ""}`;
  parts.why.textContent = `Why: ${last.why}`;
  await showPicture(parts, camera, last);
}

export function startStreams(cameras) {
  const parts = Object.fromEntries(cameras.map((camera) => [camera, panel(camera)]));
  async function refresh() {
    try {
      if (!document.hidden) {
        const { streams } = await (await fetch("/v1/streams")).json();
        await Promise.all(streams.map((each) => show(parts[each.camera], each)));
      }
      find("streams-message").textContent = "";
    } catch {
      find("streams-message").textContent = "the cameras' agent does not answer";
    }
    setTimeout(refresh, PERIOD_MS);
  }
  find("streams").hidden = false;
  refresh();
}
