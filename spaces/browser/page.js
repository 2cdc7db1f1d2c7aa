// The page: which picture, which prompts, what is shown. The model is in worker.js.
import { drawOverlay, thumbnail } from "./draw.js";
import { watchStage } from "./stage.js";

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const part = (name) => document.getElementById(name);
const [stage, picture, overlay, status, progress] = ["stage", "picture", "overlay", "status", "progress"].map(part);

let number = 0; // of the picture; what the worker says of an earlier one is ignored
let name = ""; // of its file
let encoded = null; // what the worker said of it
let steps = [[]]; // the prompts now, and after each step before, for undo
let hovered = null; // a point under the mouse, as long as there are no prompts
let asked = null; // the prompts that the worker is at
let found = null; // its last answer, to the prompts found.prompts; found.chosen is the candidate that is shown
let clock = null; // counts the seconds of encoding

// ------------------------------------------------------------------------------------------------ the picture

function open(blob, fileName) {
  if (!blob) return;
  number += 1;
  name = fileName.replace(/\.\w+$/, "");
  [encoded, steps, hovered, asked, found] = [null, [[]], null, null, null];
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(blob);
  picture.alt = fileName;
  worker.postMessage({ kind: "open", picture: number, blob });
  part("problem").textContent = "";
  say("Reading the picture");
  choosing(false);
  show();
}

function choosing(isChoosing) {
  part("chooser").hidden = !isChoosing;
  part("desk").hidden = isChoosing;
}

function openFile(file) {
  open(file, file?.name ?? "");
}

const input = document.querySelector("#file input");
input.addEventListener("change", () => {
  openFile(input.files[0]);
  input.value = ""; // the same file may be chosen again
});
part("examples").addEventListener("click", async (event) => {
  const example = event.target.closest("button")?.querySelector("img");
  if (example) open(await (await fetch(example.src)).blob(), example.src.split("/").pop());
});
part("other").addEventListener("click", () => choosing(true));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  openFile(event.dataTransfer.files[0]);
});

// ------------------------------------------------------------------------------------------------ the worker

function say(text, { share = null, isError = false, isDone = false } = {}) {
  clearInterval(clock);
  status.textContent = text;
  status.classList.toggle("error", isError);
  progress.hidden = isDone || isError;
  stage.setAttribute("aria-busy", !progress.hidden);
  if (share === null) progress.removeAttribute("value");
  else progress.value = share;
}

const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 0)}\u00a0s`;
const megabytes = (bytes) => Math.round(bytes / 1e6);

const HANDLERS = {
  loading({ loaded, total }) {
    say(`Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB`, { share: loaded / total });
  },
  starting() {
    say("Starting the model");
  },
  encoding() {
    const start = performance.now();
    say("Encoding the picture");
    clock = setInterval(() => {
      status.textContent = `Encoding the picture: ${Math.round((performance.now() - start) / 1000)} s`;
    }, 1000);
  },
  async encoded(answer) {
    await picture.decode().catch(() => {}); // a small picture is encoded before the page has its size
    if (answer.picture !== number) return;
    encoded = answer;
    document.querySelector("[value=background]").disabled = !answer.backgroundPoints;
    show();
    ask();
  },
  masks(answer) {
    found = { ...answer, prompts: asked, chosen: answer.scores.indexOf(Math.max(...answer.scores)) };
    asked = null;
    show();
    ask();
  },
  cutout({ blob }) {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob) });
    link.download = `${name}_cutout.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  },
  failed({ text }) {
    if (encoded) {
      asked = null;
      say(text, { isError: true });
    } else {
      part("problem").textContent = text;
      choosing(true);
    }
  },
};

worker.addEventListener("message", ({ data }) => {
  if (data.picture === number) HANDLERS[data.kind](data);
});
worker.addEventListener("error", () => HANDLERS.failed({ text: "This browser cannot run the page; a newer one may." }));

/** Asks for the masks of the prompts that are now there, unless they are known or an answer is awaited. */
function ask() {
  const prompts = current();
  if (!encoded || asked || prompts === found?.prompts || !prompts.some(showsObject)) return;
  asked = prompts;
  const points = prompts.flatMap(({ box, x, y }) => (box ? [box.slice(0, 2), box.slice(2)] : [[x, y]]));
  const labels = prompts.flatMap(({ box, label }) => (box ? [2, 3] : [label])); // 2 and 3: corners of a box
  worker.postMessage({ kind: "ask", picture: number, points, labels });
}

const showsObject = ({ box, label }) => box || label === 1;
const current = () => (steps.at(-1).length ? steps.at(-1) : (hovered ?? steps.at(-1)));

// ------------------------------------------------------------------------------------------------ prompts

function step(prompts) {
  steps.push(prompts);
  show();
  ask();
}

const pixel = ([x, y]) => ({
  x: Math.min(Math.floor(x * picture.naturalWidth), picture.naturalWidth - 1),
  y: Math.min(Math.floor(y * picture.naturalHeight), picture.naturalHeight - 1),
});

const tool = () => document.querySelector("[name=tool]:checked").value;

watchStage(stage, tool, {
  hover(place) {
    if (!encoded || steps.at(-1).length) return;
    hovered = place && [{ ...pixel(place), label: 1 }];
    if (!place) show();
    ask();
  },
  point(place, background) {
    if (!encoded || (background && !encoded.backgroundPoints)) return;
    step([...steps.at(-1), { ...pixel(place), label: background ? 0 : 1 }]);
  },
  box([x, y], [x2, y2]) {
    if (!encoded) return;
    const box = [Math.min(x, x2), Math.min(y, y2), Math.max(x, x2), Math.max(y, y2)].map((share, i) =>
      Math.round(share * (i % 2 ? picture.naturalHeight : picture.naturalWidth)),
    );
    step([...steps.at(-1).filter((prompt) => !prompt.box), { box }]); // in place of an earlier one
  },
});

document.querySelector("fieldset").addEventListener("change", () => {
  stage.dataset.tool = tool();
  part("hint").textContent = hint(steps.at(-1));
});
part("undo").addEventListener("click", () => {
  steps.pop();
  hovered = null;
  show();
  ask();
});
part("clear").addEventListener("click", () => {
  hovered = null;
  step([]);
});
part("candidates").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  found.chosen = [...button.parentElement.children].indexOf(button);
  show();
});
part("cutout").addEventListener("click", () => worker.postMessage({ kind: "cutout", picture: number, ...shown() }));

// ------------------------------------------------------------------------------------------------ what is shown

/** The candidate of the last answer that is shown: logits, rows, columns. */
const shown = () => candidate(found.chosen);
const candidate = (i) => ({ logits: found.logits[i], rows: found.rows, columns: found.columns });

function show() {
  const prompts = steps.at(-1);
  const isFound = Boolean(found) && current().some(showsObject);
  const isAnswered = isFound && found.prompts === prompts;
  drawOverlay(overlay, isFound ? shown() : null, prompts, picture.naturalWidth, picture.naturalHeight);
  part("undo").disabled = steps.length < 2;
  part("clear").disabled = !prompts.length;
  part("cutout").disabled = !isAnswered;
  part("hint").textContent = hint(prompts);
  showCandidates(isAnswered);
  if (!encoded) return;
  const parts = [`${picture.naturalWidth} x ${picture.naturalHeight} pixels`, `encoded in ${seconds(encoded.seconds)}`];
  if (found) parts.push(`mask in ${seconds(found.seconds)}`);
  say([...parts, encoded.backend].join(" · "), { isDone: true });
}

function hint(prompts) {
  if (!encoded) return "The picture can be marked as soon as it is encoded.";
  if (prompts.length && !prompts.some(showsObject)) return "Now mark the object, too.";
  if (tool() === "box") return "Drag from one corner to the other.";
  if (tool() === "background") return "What is marked now is left out of the mask.";
  if (matchMedia("(hover: none)").matches) return "Tap on the object.";
  return "Click on the object, drag a box around it, or mark the background with the right mouse button.";
}

function showCandidates(isAnswered) {
  const group = part("candidates");
  if (!isAnswered) group.replaceChildren();
  else if (group.found !== found || !group.children.length) {
    group.found = found;
    const buttons = found.scores.map((score, i) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      button.append(thumbnail(picture, candidate(i)), `score ${Math.max(0, score).toFixed(2)}`);
      return button;
    });
    group.replaceChildren(...buttons);
  }
  [...group.children].forEach((button, i) => button.setAttribute("aria-pressed", i === found.chosen));
}

picture.addEventListener("load", () => {
  stage.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
  show();
});
new ResizeObserver(show).observe(stage);
