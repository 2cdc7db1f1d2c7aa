// Interpolation as torch's `interpolate` computes it (align_corners=False, no antialiasing), and not as browsers do: then
// masks are those of EfficientSamPredictor.

/** For each of `count` outputs over a row of `cells`: `taps` indices of cells, and their weights. */
function neighbours(cells, count, taps, weigh) {
  const indices = new Int32Array(count * taps);
  const weights = new Float32Array(count * taps);
  for (let i = 0; i < count; i++) {
    const place = ((i + 0.5) * cells) / count - 0.5;
    const first = Math.floor(place) - (taps / 2 - 1);
    for (let tap = 0; tap < taps; tap++) {
      indices[i * taps + tap] = Math.min(Math.max(first + tap, 0), cells - 1);
      weights[i * taps + tap] = weigh(Math.abs(place - (first + tap)));
    }
  }
  return { indices, weights };
}

const linear = (x) => 1 - x;
const A = -0.75; // of cubic convolution (Keys 1981), as in torch
const cubic = (x) =>
  x <= 1 ? ((A + 2) * x - (A + 3)) * x * x + 1 : (((x - 5) * x + 8) * x - 4) * A;

/**
 * The encoder's input, [3, rows, columns] float32, of an image's pixels, bytes [height, width, 4].
 * `preprocessing` is the processor's: size [rows, columns], do_rescale, rescale_factor, do_normalize, image_mean, image_std.
 */
export function modelInput({ data, width, height }, preprocessing) {
  const [rows, columns] = preprocessing.size;
  const down = neighbours(height, rows, 2, linear);
  const across = neighbours(width, columns, 2, linear);
  const input = new Float32Array(3 * rows * columns);
  for (let channel = 0; channel < 3; channel++) {
    const factor = preprocessing.do_rescale ? preprocessing.rescale_factor : 1;
    const mean = preprocessing.do_normalize ? preprocessing.image_mean[channel] : 0;
    const std = preprocessing.do_normalize ? preprocessing.image_std[channel] : 1;
    let at = channel * rows * columns;
    for (let y = 0; y < 2 * rows; y += 2) {
      const upper = down.indices[y] * width;
      const lower = down.indices[y + 1] * width;
      for (let x = 0; x < 2 * columns; x += 2) {
        const [left, right] = [across.indices[x], across.indices[x + 1]];
        const pixel = (row, column) => data[4 * (row + column) + channel];
        const above = across.weights[x] * pixel(upper, left) + across.weights[x + 1] * pixel(upper, right);
        const below = across.weights[x] * pixel(lower, left) + across.weights[x + 1] * pixel(lower, right);
        input[at++] = ((down.weights[y] * above + down.weights[y + 1] * below) * factor - mean) / std;
      }
    }
  }
  return input;
}

/** Low-resolution logits [rows, columns] -> the mask [height, width]: 1 on the object, 0 elsewhere. */
export function enlarge(logits, rows, columns, height, width) {
  const across = neighbours(columns, width, 4, cubic);
  const down = neighbours(rows, height, 4, cubic);
  const wide = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let tap = 4 * x; tap < 4 * x + 4; tap++) {
        sum += across.weights[tap] * logits[row * columns + across.indices[tap]];
      }
      wide[row * width + x] = sum;
    }
  }
  const mask = new Uint8Array(height * width);
  for (let y = 0; y < height; y++) {
    const [r0, r1, r2, r3] = down.indices.subarray(4 * y, 4 * y + 4).map((row) => row * width);
    const [w0, w1, w2, w3] = down.weights.subarray(4 * y, 4 * y + 4);
    for (let x = 0; x < width; x++) {
      const logit = w0 * wide[r0 + x] + w1 * wide[r1 + x] + w2 * wide[r2 + x] + w3 * wide[r3 + x];
      mask[y * width + x] = logit > 0 ? 1 : 0;
    }
  }
  return mask;
}
