// The chat: streamed answers, coloured by the arm that made each part.
import { bytes, element, find, problem, say } from "./dom.js";

const ARMS = ["auto", "edge", "cloud", "verify", "handoff", "cascade"];
const ROUTED = ["auto", "cascade"]; // which have a quality
const MAX_TOKENS = 256; // of an answer; greedy, as in the terminal
const messages = [];
let running = null;

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

// Spans count tokens; a piece of text is one token, but for letters of several.
function colour(pieces, spans) {
  const total = spans.reduce((sum, span) => sum + span.tokens, 0), ends = [];
  spans.reduce((sum, span) => { ends.push(sum + span.tokens); return sum + span.tokens; }, 0);
  pieces.forEach((piece, index) => {
    const token = ((index + 0.5) * total) / pieces.length;
    const span = spans[ends.findIndex((end) => token < end)];
    if (span) [piece.className, piece.title] = [span.arm, span.why];
  });
}

function summary(field, tokens, seconds) {
  const parts = [field.arm, `${tokens} pieces in ${seconds.toFixed(1)} s`];
  if (field.bytes_up != null) parts.push(`${bytes(field.bytes_up)} up, ${bytes(field.bytes_down)} down`);
  if (field.rtt_ms != null) parts.push(`round trip ${Math.round(field.rtt_ms)} ms`);
  if (field.degraded) parts.push("DEGRADED");
  return `${parts.join(" · ")} — ${field.why}`;
}

function body() {
  const arm = find("arm").value, quality = find("dial").disabled ? {} : { quality: Number(find("dial").value) };
  return JSON.stringify({ model: arm, messages, stream: true, temperature: 0, max_tokens: MAX_TOKENS, ...(ROUTED.includes(arm) ? quality : {}) });
}

async function read(reply, shown, pieces) {
  let field = null;
  for await (const chunk of events(reply)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices[0]?.delta?.content;
    if (text) {
      pieces.push(element("span", text));
      shown.append(pieces.at(-1));
      find("messages").scrollTop = find("messages").scrollHeight;
    }
    field = chunk.isthmus ?? field;
  }
  return field;
}

async function answer(prompt) {
  messages.push({ role: "user", content: prompt });
  const shown = element("p"), pieces = [], start = performance.now();
  find("messages").append(element("p", prompt, "user"), shown);
  running = new AbortController();
  try {
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers, body: body(), signal: running.signal });
    if (!reply.ok) throw new Error(await problem(reply));
    const field = await read(reply, shown, pieces);
    if (field) {
      const spans = field.spans?.length ? field.spans : [{ arm: field.arm, tokens: 1, why: field.why }];
      colour(pieces, spans);
      shown.append(element("small", summary(field, pieces.length, (performance.now() - start) / 1000)));
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      if (!pieces.length) messages.pop();
      say("chat-message", error.message, true);
    }
  }
  if (pieces.length) messages.push({ role: "assistant", content: pieces.map((each) => each.textContent).join("") });
  running = null;
}

async function send(event) {
  event.preventDefault();
  const prompt = find("prompt").value.trim();
  if (!prompt || running) return;
  find("prompt").value = "";
  say("chat-message", "");
  [find("send").disabled, find("stop").hidden] = [true, false];
  await answer(prompt);
  [find("send").disabled, find("stop").hidden] = [false, true];
  find("prompt").focus();
}

function showDial(best) {
  const dial = find("dial");
  dial.disabled = best == null || !ROUTED.includes(find("arm").value);
  find("quality").textContent = dial.disabled ? "best (as configured)" : `best (${Number(dial.value).toFixed(2)})`;
}

export async function startChat(language) {
  const names = (await (await fetch("/v1/models")).json()).data.map((model) => model.id);
  find("arm").replaceChildren(...ARMS.filter((arm) => names.includes(arm)).map((arm) => element("option", arm)));
  const dial = () => showDial(language.router_quality);
  for (const id of ["arm", "dial"]) find(id).addEventListener("input", dial);
  dial();
  find("ask").addEventListener("submit", send);
  find("stop").addEventListener("click", () => running?.abort());
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) find("ask").requestSubmit(event.preventDefault());
  });
  find("chat").hidden = false;
}
