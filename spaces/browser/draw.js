// Draws a mask and its prompts over the picture, and a candidate's thumbnail.
import { enlarge } from "./resample.js";

const [RED, GREEN, BLUE] = [0, 140, 255];
const FILL = 115; // of 255
const THUMBNAIL = 160; // pixels of the longest side
const COLORS = ["#d61428", "#009e3c"]; // of points on the background and on the object

/** `found`: logits, rows, columns; or null. `prompts` in pixels of the picture, which is `width` x `height`. */
export function drawOverlay(canvas, found, prompts, width, height) {
  const ratio = devicePixelRatio;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  if (!canvas.width || !canvas.height) return;
  const context = canvas.getContext("2d");
  if (found) drawMask(context, found, Math.round(1.5 * ratio));
  const [x, y] = [canvas.width / width, canvas.height / height];
  for (const prompt of prompts) {
    if (prompt.box) {
      const [left, top, right, bottom] = prompt.box;
      for (const [color, line] of [["#0008", 4], ["white", 2]]) {
        Object.assign(context, { strokeStyle: color, lineWidth: line * ratio });
        context.strokeRect(left * x, top * y, (right - left) * x, (bottom - top) * y);
      }
    } else {
      context.beginPath();
      context.arc((prompt.x + 0.5) * x, (prompt.y + 0.5) * y, 6 * ratio, 0, 2 * Math.PI);
      Object.assign(context, { fillStyle: COLORS[prompt.label], strokeStyle: "white", lineWidth: 2 * ratio });
      context.fill();
      context.stroke();
    }
  }
}

function drawMask(context, { logits, rows, columns }, line) {
  const { width, height } = context.canvas;
  const mask = enlarge(logits, rows, columns, height, width);
  const pixels = context.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = y * width + x;
      if (!mask[i]) continue;
      const inside =
        mask[i - Math.min(x, line)] && mask[i + Math.min(width - 1 - x, line)] &&
        mask[i - Math.min(y, line) * width] && mask[i + Math.min(height - 1 - y, line) * width];
      pixels.data.set([RED, GREEN, BLUE, inside ? FILL : 255], 4 * i);
    }
  }
  context.putImageData(pixels, 0, 0);
}

/** A canvas with the picture, an `<img>`, dark where the mask is not. */
export function thumbnail(picture, { logits, rows, columns }) {
  const scale = THUMBNAIL / Math.max(picture.naturalWidth, picture.naturalHeight);
  const width = Math.max(1, Math.round(picture.naturalWidth * scale));
  const height = Math.max(1, Math.round(picture.naturalHeight * scale));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  enlarge(logits, rows, columns, height, width).forEach((value, i) => {
    if (!value) for (let channel = 0; channel < 3; channel++) pixels.data[4 * i + channel] *= 0.2;
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}
