// The picture: tells the server where it is clicked (ratios of width and height), where a box is drawn, and over what
// the mouse rests. Parts of the page are patched in place when an answer comes, which takes away whatever is shown here
// until then.
const SMALLEST_BOX = 6; // screen pixels; a pointer that moves less has clicked
const PREVIEW_INTERVAL = 100; // milliseconds from one request to the next
let start = null; // of a drag: ratios and screen position
let cursor = [0.5, 0.5]; // of the keyboard
let hovered = null; // where the mouse is, while a preview is wanted
let asked = null; // where the preview was asked for that has not come yet
let lastAsked = 0;

const part = (name) => element.querySelector("." + name);
const clamp = (value) => Math.min(Math.max(value, 0), 0.9999);
const mode = () => element.closest("#desk").dataset.mode ?? "Points";
const drawsBoxes = (event) => event.pointerType === "mouse" || mode() === "Box";
const firstCorner = () => part("stage").dataset.corner.split(",").filter(Boolean).map(Number);
const wantsPreview = () =>
  mode() === "Points" && !document.querySelector("#adds input:checked")?.value.includes("background");

function place(event) {
  const frame = part("stage").getBoundingClientRect();
  return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
}

function show(name, [x, y], [x2, y2] = [x, y]) {
  const style = part(name).style;
  [style.left, style.top] = [100 * Math.min(x, x2) + "%", 100 * Math.min(y, y2) + "%"];
  [style.width, style.height] = [100 * Math.abs(x2 - x) + "%", 100 * Math.abs(y2 - y) + "%"];
  part(name).classList.add("on");
}

function point(where, background) {
  endPreview();
  show("pulse", where);
  trigger("point", { x: where[0], y: where[1], background });
}

// ---------------------------------------------------------------- preview

function askForPreview() {
  if (!hovered || asked) return;
  const wait = lastAsked + PREVIEW_INTERVAL - performance.now();
  if (wait > 0) return void setTimeout(askForPreview, wait);
  [asked, lastAsked] = [hovered, performance.now()];
  trigger("hover", { x: asked[0], y: asked[1] });
  const mine = asked;
  setTimeout(() => asked === mine && (asked = null), 3000); // an answer that never came
}

function endPreview() {
  hovered = null;
  part("preview")?.classList.remove("on");
}

element.addEventListener("preview", (event) => {
  part("preview").style.backgroundImage = `url(${event.detail.url})`;
  part("preview").classList.toggle("on", Boolean(hovered && event.detail.url));
  const here = asked && hovered && asked.every((value, axis) => value === hovered[axis]);
  asked = null;
  if (!here) askForPreview();
});

element.addEventListener("pointerleave", endPreview);

// ---------------------------------------------------------------- mouse and fingers

element.addEventListener("contextmenu", (event) => {
  if (event.target.closest(".stage")) event.preventDefault();
});

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".stage")) return;
  endPreview();
  start = { at: place(event), x: event.clientX, y: event.clientY };
  if (drawsBoxes(event)) part("stage").setPointerCapture(event.pointerId);
});

element.addEventListener("pointermove", (event) => {
  if (!event.target.closest(".stage")) return endPreview();
  if (start && drawsBoxes(event) && event.buttons === 1) {
    show("band", start.at, place(event));
  } else if (!start && event.pointerType === "mouse") {
    if (firstCorner().length) return show("band", firstCorner(), place(event));
    if (!wantsPreview()) return endPreview();
    hovered = place(event);
    askForPreview();
  }
});

element.addEventListener("pointercancel", () => {
  start = null; // the page is being scrolled
});

element.addEventListener("pointerup", (event) => {
  if (!start) return;
  const [from, to] = [start.at, place(event)];
  const [width, height] = [Math.abs(event.clientX - start.x), Math.abs(event.clientY - start.y)];
  start = null;
  if (drawsBoxes(event) && event.button === 0 && Math.max(width, height) > SMALLEST_BOX) {
    trigger("box", { x: from[0], y: from[1], x2: to[0], y2: to[1] });
  } else {
    point(to, event.button === 2 || event.shiftKey);
  }
});

element.addEventListener("keydown", (event) => {
  if (!event.target.closest(".stage")) return;
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key in moves) {
    const step = event.shiftKey ? 0.005 : 0.03;
    cursor = cursor.map((value, axis) => clamp(value + step * moves[event.key][axis]));
  } else if (event.key === "Enter" || event.key === " " || event.key === "b") {
    point(cursor, event.key === "b");
  } else {
    return;
  }
  event.preventDefault();
  show("cross", cursor);
});

// ---------------------------------------------------------------- buttons whose work takes long

const PRESS_INTERVAL = 150; // milliseconds in which a second press of a button does not count
const lastPressed = new WeakMap();

// gradio takes note of an event, and disables the button, only after it has gathered the inputs: the second press of a
// double click would come sooner and be queued.
element.ownerDocument.addEventListener(
  "click",
  (event) => {
    const button = event.target.closest(".slow");
    if (!button) return;
    if (performance.now() - (lastPressed.get(button) ?? -Infinity) < PRESS_INTERVAL) event.stopImmediatePropagation();
    else lastPressed.set(button, performance.now());
  },
  true,
);
