// The picture: tells the server where it is clicked (share of width and height) or where a box is drawn.
// Parts of the page are patched in place when an answer comes, which takes away whatever is shown here until then.
const SMALLEST_BOX = 6; // screen pixels; a pointer that moves less has clicked
let start = null; // of a drag: share and screen position
let cursor = [0.5, 0.5]; // of the keyboard

const part = (name) => element.querySelector("." + name);
const clamp = (value) => Math.min(Math.max(value, 0), 0.9999);

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
  show("pulse", where);
  trigger("point", { x: where[0], y: where[1], background });
}

element.addEventListener("contextmenu", (event) => {
  if (event.target.closest(".stage")) event.preventDefault();
});

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".stage")) return;
  start = { at: place(event), x: event.clientX, y: event.clientY };
  if (event.pointerType === "mouse") part("stage").setPointerCapture(event.pointerId);
});

element.addEventListener("pointermove", (event) => {
  if (!start || event.pointerType !== "mouse" || event.buttons !== 1) return;
  show("band", start.at, place(event));
});

element.addEventListener("pointercancel", () => {
  start = null; // the page is being scrolled
});

element.addEventListener("pointerup", (event) => {
  if (!start) return;
  const [from, to] = [start.at, place(event)];
  const [width, height] = [Math.abs(event.clientX - start.x), Math.abs(event.clientY - start.y)];
  start = null;
  if (event.pointerType === "mouse" && event.button === 0 && Math.max(width, height) > SMALLEST_BOX) {
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
