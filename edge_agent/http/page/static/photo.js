// A photo from a file, the clipboard or the webcam -> its labels or boxes, which way it went and why.
import { bytes, element, find, percent, problem, row, say } from "./dom.js";

const WAYS = {
  exit: "answered on this device", split: "answered by the cloud from features",
  offload: "answered by the cloud from the whole image", fallback: "answered on this device in place of the cloud",
};
const COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080"];
const JPEG_QUALITY = 0.75;
let latest = 0; // photo; answers to earlier ones are not shown
let stream = null;
export const saved = { photos: 0, sent: 0, whole: 0 };

async function picture(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    return null; // HEIC and TIFF in most browsers; the agent reads them all the same
  }
}

const toJpeg = (canvas, quality) => new Promise((done) => canvas.toBlob(done, "image/jpeg", quality));

function canvasOf(bitmap) {
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas;
}

function draw(bitmap, boxes) {
  const canvas = find("picture"), pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = bitmap ? [bitmap.width, bitmap.height] : [640, 120];
  if (!bitmap) {
    pen.font = "20px sans-serif";
    pen.fillStyle = getComputedStyle(canvas).color;
    pen.fillText("This browser cannot show photos of this format.", 20, 65);
    return;
  }
  pen.drawImage(bitmap, 0, 0);
  const unit = Math.max(bitmap.width, bitmap.height) / 400;
  pen.lineWidth = 2 * unit;
  pen.font = `600 ${12 * unit}px sans-serif`;
  for (const { label, index, score, box: [left, top, right, bottom] } of boxes) {
    const words = `${label} ${percent(score)}`, above = Math.max(top, 16 * unit);
    pen.strokeStyle = pen.fillStyle = COLORS[index % COLORS.length];
    pen.strokeRect(left, top, right - left, bottom - top);
    pen.fillRect(left, above - 16 * unit, pen.measureText(words).width + 8 * unit, 16 * unit);
    pen.fillStyle = "#fff";
    pen.fillText(words, left + 4 * unit, above - 4 * unit);
  }
}

function labelsOf(answer, names) {
  const list = [];
  for (const [task, found] of Object.entries(answer.answers ?? {})) {
    if (found.detections) continue;
    const labels = names[task] ?? [];
    const order = [...(found.probabilities ?? [])].map((share, index) => [share, index]).sort((a, b) => b[0] - a[0]);
    list.push(...order.slice(0, 5).map(([share, index]) => [labels[index] ?? String(index), share]));
  }
  return list;
}

function showLabels(answer, names, boxes) {
  const shown = boxes.length ? boxes.map((each) => [each.label, each.score]) : labelsOf(answer, names);
  find("label").textContent = answer.label ?? (boxes.length ? `${boxes.length} found` : "nothing found");
  find("labels").replaceChildren(...shown.slice(0, 20).map(([label, share]) => {
    const item = element("li"), bar = element("span", "", "bar"), part = element("i");
    part.style.width = `${100 * share}%`;
    bar.append(part);
    item.append(element("span", label), bar, element("span", percent(share)));
    return item;
  }));
}

function showWays(answer, whole) {
  const ways = answer.candidates ?? [];
  const image = ways.find((each) => /image|jpeg|whole/i.test(each.name));
  const rows = [row([`this answer: ${answer.route}`, bytes(answer.bytes_up + answer.bytes_down), answer.stage_ms.total.toFixed(1)], true)];
  if (image) rows.push(row([`${image.name}, predicted`, bytes(image.bytes), (1000 * image.seconds).toFixed(1)]));
  if (whole) rows.push(row(["the photo as a JPEG of quality 75", bytes(whole), "–"]));
  find("against").tBodies[0].replaceChildren(...rows);
  find("ways").tBodies[0].replaceChildren(...ways.map((each) => row([
    each.name, `${(1000 * each.seconds).toFixed(1)} ± ${(1000 * each.spread_s).toFixed(1)}`, bytes(each.bytes),
    percent(each.agreement), percent(each.right), each.excluded ?? "",
  ], each.chosen)));
}

function show(answer, names, bitmap, whole) {
  const boxes = Object.values(answer.answers ?? {}).flatMap((each) => each.detections ?? []);
  draw(bitmap, boxes);
  showLabels(answer, names, boxes);
  const shown = [find("label").textContent, ...boxes.map((each) => each.label)].join(", ");
  find("picture").setAttribute("aria-label", `The photo: ${shown}`);
  const at = answer.exit ? ` at ${answer.exit}` : answer.tap ? `, tap ${answer.tap}, rate ${answer.rate}` : "";
  find("route").textContent = `${WAYS[answer.route] ?? answer.route}${at}${answer.degraded ? ", degraded" : ""}`;
  find("why").textContent = `Why: ${answer.why}`;
  showWays(answer, whole);
  find("answer").hidden = false;
}

async function ask(blob, names) {
  const number = ++latest;
  say("photo-message", "answering …");
  const bitmap = await picture(blob);
  const jpeg = bitmap && (await toJpeg(canvasOf(bitmap), JPEG_QUALITY));
  const query = new URLSearchParams({ explain: "1", ...(find("private").checked ? { private: "1" } : {}) });
  try {
    const reply = await fetch(`/v1/infer?${query}`, { method: "POST", body: blob });
    if (number !== latest) return;
    if (!reply.ok) throw new Error(await problem(reply));
    const answer = await reply.json(), whole = jpeg?.size ?? blob.size;
    saved.photos += 1;
    saved.sent += answer.bytes_up;
    saved.whole += whole;
    show(answer, names, bitmap, jpeg?.size);
    say("photo-message", "");
    document.dispatchEvent(new Event("answered"));
  } catch (error) {
    if (number === latest) say("photo-message", error.message, true);
  }
}

async function openCamera() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    find("video").srcObject = stream;
    await find("video").play();
    find("camera").hidden = false;
    find("shoot").focus();
  } catch (error) {
    say("photo-message", `The webcam cannot be used: ${error.message}`, true);
  }
}

function closeCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  find("camera").hidden = true;
  find("webcam").focus();
}

async function shoot(names) {
  const video = find("video"), canvas = element("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  await ask(await toJpeg(canvas, 0.92), names);
}

export function startPhotos(names) {
  const drop = find("drop"), file = find("file");
  const take = (files) => files?.[0] && ask(files[0], names);
  file.addEventListener("change", () => { take(file.files); file.value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  find("webcam").addEventListener("click", openCamera);
  find("close").addEventListener("click", closeCamera);
  find("shoot").addEventListener("click", () => shoot(names));
  find("photo").hidden = false;
}
