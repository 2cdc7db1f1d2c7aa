// Holds the model and the picture, so that the page does not wait for them. What it takes and sends is told by `kind`:
//   open {picture, blob}             -> loading {loaded, total}, starting, encoding, encoded {seconds, backend, ...}
//   ask {picture, points, labels}    -> masks {logits, rows, columns, scores, seconds}; before it all that open may send
//   cutout {picture, logits, ...}    -> cutout {blob}
// or failed {text}. `picture` is the page's number of the picture that a message is about.
import { enlarge, modelInput } from "./resample.js";

const MAX_PIXELS = 24e6;
const RUNTIMES = { // files in ort/
  webgpu: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"],
  wasm: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded"],
};

let backends = null; // that are left to try
let model = null; // ort, encoder, decoder, backend
let description = null; // model.json
let image = null; // pixels; once it is encoded features, and the model that they are of

// One message after the other: onmessage does not wait for the last one.
let queue = Promise.resolve();
onmessage = ({ data }) => {
  const tell = (kind, more) => postMessage({ kind, picture: data.picture, ...more });
  queue = queue.then(() => HANDLERS[data.kind](data, tell)).catch((error) => tell("failed", { text: error.message }));
};

const HANDLERS = {
  async open({ blob }, tell) {
    image = { pixels: await readPixels(blob) };
    await withModel(tell, () => {}); // encodes it
  },

  async ask({ points, labels }, tell) {
    const [rows, columns] = description.preprocessing.size;
    const { width, height } = image.pixels;
    const coordinates = points.flatMap(([x, y]) => [(x * columns) / width, (y * rows) / height]);
    const { pred_masks, iou_scores, seconds } = await withModel(tell, async ({ ort, decoder }) => {
      const start = performance.now();
      const answer = await decoder.run({
        ...image.features,
        input_points: new ort.Tensor("float32", coordinates, [1, 1, points.length, 2]),
        input_labels: new ort.Tensor("int64", labels.map(BigInt), [1, 1, points.length]),
      });
      return { ...answer, seconds: (performance.now() - start) / 1000 };
    });
    const size = pred_masks.dims[3] * pred_masks.dims[4];
    tell("masks", {
      seconds,
      rows: pred_masks.dims[3],
      columns: pred_masks.dims[4],
      scores: [...iou_scores.data],
      logits: [...iou_scores.data].map((_, i) => pred_masks.data.slice(i * size, (i + 1) * size)),
    });
  },

  async cutout({ logits, rows, columns }, tell) {
    const { width, height, data } = image.pixels;
    const mask = enlarge(logits, rows, columns, height, width);
    const cut = new ImageData(new Uint8ClampedArray(data), width, height);
    mask.forEach((value, i) => (cut.data[4 * i + 3] = 255 * value));
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(cut, 0, 0);
    tell("cutout", { blob: await canvas.convertToBlob({ type: "image/png" }) });
  },
};

/** The picture upright, on white where it is transparent, its colours as they are in the file. */
async function readPixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("This file cannot be read as a picture.");
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`${width} x ${height} pixels are too many; up to ${MAX_PIXELS / 1e6} million are taken here.`);
  }
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** What `use` makes of a model that has encoded the picture, by the first backend in which all of this works. */
async function withModel(tell, use) {
  backends ??= (await navigator.gpu?.requestAdapter().catch(() => null)) ? ["webgpu", "wasm"] : ["wasm"];
  for (;;) {
    try {
      model ??= await load(backends[0], tell);
      if (image.encodedBy !== model) await encode(tell);
      return await use(model);
    } catch (error) {
      if (backends.length === 1) throw error;
      console.warn(`${backends[0]} does not work here: ${error.message}`);
      model = null;
      backends.shift();
    }
  }
}

async function encode(tell) {
  tell("encoding");
  const { ort, backend, encoder } = model;
  const shape = [1, 3, ...description.preprocessing.size];
  const input = new ort.Tensor("float32", modelInput(image.pixels, description.preprocessing), shape);
  const start = performance.now();
  Object.assign(image, { features: await encoder.run({ pixel_values: input }), encodedBy: model });
  const threads = ort.env.wasm.numThreads;
  tell("encoded", {
    seconds: (performance.now() - start) / 1000,
    backend: backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} ${threads > 1 ? "threads" : "thread"}`,
    backgroundPoints: description.background_points,
  });
}

async function load(backend, tell) {
  const [script, runtime] = RUNTIMES[backend];
  description = await (await get("model/model.json")).json();
  const files = [`ort/${runtime}.wasm`, "model/encoder.onnx", "model/decoder.onnx"];
  const total = files.reduce((sum, file) => sum + description.bytes[file], 0);
  let loaded = 0;
  const progress = (bytes) => tell("loading", { loaded: (loaded += bytes), total });
  const [wasm, ...graphs] = await Promise.all(files.map((file) => download(file, progress)));

  tell("starting");
  const ort = await import(`./ort/${script}`);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.wasmPaths = { mjs: new URL(`ort/${runtime}.mjs`, location.href).href };
  const sessions = [];
  for (const graph of graphs) {
    sessions.push(await ort.InferenceSession.create(graph, { executionProviders: [backend], logSeverityLevel: 3 }));
  }
  return { ort, backend, encoder: sessions[0], decoder: sessions[1] };
}

async function get(file) {
  const answer = await fetch(file);
  if (!answer.ok) throw new Error(`${file} could not be loaded (${answer.status}).`);
  return answer;
}

/** A file's content; `progress` is called with the number of bytes of each part that arrives. */
async function download(file, progress) {
  const reader = (await get(file)).body.getReader();
  const parts = [];
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    progress(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
