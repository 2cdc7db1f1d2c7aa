// The picture's pointer and keyboard: where it is pointed at, clicked, or a box is drawn. Places are shares of its width and
// height.
const SMALLEST_BOX = 6; // screen pixels; a pointer that moves less has clicked

const clamp = (value) => Math.min(Math.max(value, 0), 1);

/** Calls hover(place or null), point(place, background), box(from, to). `tool` says what a click or tap marks. */
export function watchStage(stage, tool, { hover, point, box }) {
  const [band, cross] = ["#band", "#cross"].map((name) => stage.querySelector(name));
  let start = null; // of a box or click: place and screen position
  let cursor = [0.5, 0.5]; // of the keyboard

  function place(event) {
    const frame = stage.getBoundingClientRect();
    return [clamp((event.clientX - frame.left) / frame.width), clamp((event.clientY - frame.top) / frame.height)];
  }

  function show(mark, [x, y], [x2, y2] = [x, y]) {
    const [left, top, width, height] = [Math.min(x, x2), Math.min(y, y2), Math.abs(x2 - x), Math.abs(y2 - y)];
    Object.assign(mark.style, { display: "block", left: `${100 * left}%`, top: `${100 * top}%` });
    Object.assign(mark.style, { width: `${100 * width}%`, height: `${100 * height}%` });
  }

  const hide = (mark) => (mark.style.display = "none");
  const draws = (event) => (event.pointerType === "mouse" ? event.buttons === 1 : tool() === "box");

  stage.addEventListener("contextmenu", (event) => event.preventDefault());

  stage.addEventListener("pointerdown", (event) => {
    hide(cross);
    start = { at: place(event), x: event.clientX, y: event.clientY };
    if (draws(event)) stage.setPointerCapture(event.pointerId);
  });

  stage.addEventListener("pointermove", (event) => {
    if (start && draws(event)) show(band, start.at, place(event));
    else if (event.pointerType === "mouse" && !start) hover(place(event));
  });

  stage.addEventListener("pointerleave", () => hover(null));

  stage.addEventListener("pointercancel", () => {
    start = null; // the page is being scrolled
    hide(band);
  });

  stage.addEventListener("pointerup", (event) => {
    if (!start) return;
    const { at, x, y } = start;
    const drawn = band.style.display === "block";
    start = null;
    hide(band);
    if (drawn && Math.max(Math.abs(event.clientX - x), Math.abs(event.clientY - y)) > SMALLEST_BOX) {
      box(at, place(event));
    } else if (tool() !== "box") {
      point(place(event), event.button === 2 || event.shiftKey || tool() === "background");
    }
  });

  stage.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const step = event.shiftKey ? 0.005 : 0.03;
      cursor = cursor.map((value, axis) => clamp(value + step * moves[event.key][axis]));
    } else if (event.key === "Enter" || event.key === "b") {
      point(cursor, event.key === "b");
    } else {
      return;
    }
    event.preventDefault();
    show(cross, cursor);
  });
}
