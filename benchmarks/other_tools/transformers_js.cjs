// The call of transformers.js: reads and writes what `ask_tools` of table.py says.
const { AutoProcessor, RawImage, SamModel, env } = require("@huggingface/transformers");
const { readFileSync, writeFileSync } = require("node:fs");

const folder = process.argv[2];
env.allowRemoteModels = false;
env.localModelPath = folder;

async function main() {
  const model = await SamModel.from_pretrained("transformers.js", { dtype: "fp32" });
  const processor = await AutoProcessor.from_pretrained("transformers.js");
  for (const { name, path, boxes } of JSON.parse(readFileSync(`${folder}/prompts.json`))) {
    const input_points = boxes.map(([x1, y1, x2, y2]) => [[x1, y1], [x2, y2]]);
    const input_labels = boxes.map(() => [2, 3]); // corners of a box
    const inputs = await processor(await RawImage.read(path), { input_points, input_labels });
    const { pred_masks, iou_scores } = await model(inputs);
    const { original_sizes, reshaped_input_sizes } = inputs;
    const [masks] = await processor.post_process_masks(pred_masks, original_sizes, reshaped_input_sizes);
    const best = iou_scores.tolist()[0].map((scores, i) => masks[i][scores.indexOf(Math.max(...scores))].data);
    writeFileSync(`${folder}/answers/transformers.js-${name}`, Buffer.concat(best));
  }
}

main();
