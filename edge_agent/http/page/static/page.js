// Starts the parts of the page that the agent can serve.
import { startChat } from "./chat.js";
import { find } from "./dom.js";
import { startPhotos } from "./photo.js";
import { showState } from "./state.js";
import { startStreams } from "./streams.js";

const PERIOD_MS = 5000;

async function refresh() {
  try {
    if (!document.hidden) await showState();
  } catch {
    find("cloud").textContent = "the agent does not answer";
  }
}

try {
  const status = await showState();
  if (status.streams) startStreams(status.streams);
  if (status.bundle) startPhotos(status.bundle.tasks);
  if (status.language) await startChat(status.language);
} catch {
  find("cloud").textContent = "the agent does not answer";
}
setInterval(refresh, PERIOD_MS);
document.addEventListener("answered", refresh);
