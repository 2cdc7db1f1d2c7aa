"""How good promptable masks are: the protocol of the paper's zero-shot tables (arXiv 2312.00863), and SAM's clicks."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_efficientsam.inference.image_files import describe_error
from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.coco import Sample, decode_rles

from .clicks import MAX_CLICKS, clicks_to_reach, error_rounds, random_clicks
from .metrics import (
    MeanIoU,
    boundary_iou,
    calibration_error,
    filled_box,
    inscribed_ellipse,
    mask_iou,
    mean_by_size,
)
from .predictors import ImagePredictor, Predictor, PreparedImage, prepare_image

ANSWERS = (
    "Masks are compared at the image's own size and the mean is over masks. 'confident': of the candidates the one "
    "with the highest predicted IoU; 'best': the one with the highest true IoU; 'single': the one mask that the model "
    "gives without candidates. 'calibration_error': mean absolute difference of predicted and true IoU of the "
    "'confident' ones. 'boundary_iou': boundary IoU (arXiv 2103.16562) of the 'confident' ones. 'clicks': how many "
    "clicks on errors (see --clicks error) until the 'confident' mask has so much IoU, 20 where it has not after 20 "
    "('failed': their ratio)."
)
PROTOCOLS = {
    "random": (
        "Every mask is asked for by its tight ground-truth box, or by clicks that are uniformly random inside it, all "
        "on the object. " + ANSWERS
    ),
    "error": (
        "Every mask is asked for by its tight ground-truth box, or by clicks one after the other. The first is the "
        "mask's pixel farthest from its boundary. Each next one is the pixel farthest from the boundary of what the "
        "most confident candidate before misses (a click on the object) or has too much (a click beside it), "
        "whichever is deeper; no pixel is clicked twice, and where nothing is wrong the click is on the object. A "
        "model without background points is clicked on what it misses alone. The logits of that candidate are given "
        "with the clicks to a model that takes mask prompts. " + ANSWERS
    ),
}
BASELINES = {"filled_box": filled_box, "ellipse": inscribed_ellipse}
# Beside the answers' IoUs, of the most confident candidate: what the model says of it, its boundary IoU, and how many
# clicks it needs.
PREDICTED_IOU, BOUNDARY, CLICKS = MEASURES = "predicted_iou", "boundary", "clicks"
CLICK_TARGETS = {"85": 0.85, "90": 0.9}
PIXELS_AT_ONCE = 2**23  # of masks at image size; bounds the memory of large images with many masks


def num_clicks(prompt: str) -> int:
    """0 for `"box"`, K for `"clickK"`; anything else is a ValueError."""
    match = re.fullmatch(r"box|click([1-9]\d*)", prompt)
    if match is None:
        raise ValueError(f"The prompt {prompt!r} is unknown; use box, or click1, click3, ... for so many clicks.")
    return int(match[1] or 0)


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Item:
    """An image to evaluate: its place in the data, its sample without the image, and that as each model takes it."""

    place: tuple[int, int]
    sample: Any
    inputs: list[PreparedImage]


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be read: its place in the data, and one sentence about it."""

    place: tuple[int, int]
    reason: str


class ImageBatches(IterableDataset):
    """
    Lists of `Item`s, and in the place of images that cannot be read `BrokenImage`s. They are the same whatever the
    number of processes and workers that they are dealt to.

    Args:
        sources: datasets of samples, or `Sa1bShards`. A sample is a dataclass with an `image`.
        processors: of the models.
        batch_size: images in a batch at most; a batch never has images of two sources or two shards.
        limit: only the first so many images of each source or shard.
        process_index, num_processes: which of how many processes reads.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        processors: Sequence[Any],
        batch_size: int,
        limit: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.processors, self.batch_size = processors, batch_size
        self.units = []  # (source, first image, last), or (source, shard, number of images)
        for source in sources:
            if hasattr(source, "shards"):
                self.units += [(source, shard, limit) for shard in range(len(source.shards))]
            else:
                count = min(len(source), limit or len(source))
                starts = range(0, count, batch_size)
                self.units += [(source, start, min(start + batch_size, count)) for start in starts]
        self.mine = range(process_index, len(self.units), num_processes)

    @property
    def num_images(self) -> int | None:
        """Of this process; None where it reads shards."""
        units = [self.units[i] for i in self.mine]
        known = not any(hasattr(source, "shards") for source, _, _ in units)
        return sum(stop - start for _, start, stop in units) if known else None

    def samples(self, unit: int) -> Iterator[Any]:
        """Samples; in the place of one that cannot be read the error. Shards leave such out themselves."""
        source, start, stop = self.units[unit]
        if hasattr(source, "shards"):
            return islice((sample for _, sample in source.read(start)), stop)
        return (read_sample(source, index) for index in range(start, stop))

    def find(self, place: tuple[int, int]) -> Any:
        """The sample, with its image, that an item was made of."""
        return next(islice(self.samples(place[0]), place[1], None))

    def item(self, place: tuple[int, int], sample: Any) -> Item | BrokenImage:
        if isinstance(sample, Exception):
            return BrokenImage(place, describe_error(sample))
        try:
            inputs = [prepare_image(processor, sample.image) for processor in self.processors]
        except ValueError as error:  # pixels without sense
            return BrokenImage(place, describe_error(error))
        return Item(place, replace(sample, image=None), inputs)

    def __iter__(self) -> Iterator[list[Item | BrokenImage]]:
        worker = get_worker_info()
        for unit in self.mine if worker is None else self.mine[worker.id :: worker.num_workers]:
            items = (self.item((unit, number), sample) for number, sample in enumerate(self.samples(unit)))
            while batch := list(islice(items, self.batch_size)):
                yield batch


def split_broken(found: list) -> tuple[list, list[BrokenImage]]:
    """Everything else, and the images that cannot be read."""
    broken = [one for one in found if isinstance(one, BrokenImage)]
    return [one for one in found if not isinstance(one, BrokenImage)], broken


def read_sample(source: Any, index: int) -> Any:
    """A sample, or the error that it raises."""
    try:
        return source[index]
    except (ValueError, OSError) as error:
        return error


# ------------------------------------------------------------------------------------------ asking


def fixed_prompts(
    masks: torch.Tensor, annotation_ids: Sequence[int], prompts: Sequence[str], clicks: str, seed: int
) -> dict[str, dict[str, torch.Tensor]]:
    """What a model is given for each prompt that does not depend on its answers, for masks [N,H,W]."""
    given = {"box": {"input_boxes": boxes_from_masks(masks).cpu()}} if "box" in prompts else {}
    counts = [num_clicks(prompt) for prompt in prompts]
    if clicks == "random" and max(counts):
        pairs = zip(masks.cpu(), annotation_ids, strict=True)
        points = torch.stack([random_clicks(mask, max(counts), seed, number) for mask, number in pairs])
        given |= {f"click{count}": {"input_points": points[:, :count]} for count in counts if count}
    return given


def answers(predict: ImagePredictor, masks: torch.Tensor, fixed: dict, prompts: Sequence[str]) -> Iterator[tuple]:
    """(prompt, what was given, what `predict` answered) for each of the prompts, for masks [N,H,W]."""
    for prompt, given in fixed.items():
        yield prompt, given, predict(**given)
    if others := [num_clicks(prompt) for prompt in prompts if prompt not in fixed]:
        for count, given, answer in error_rounds(predict, masks, others):
            yield f"click{count}", given, answer


# ------------------------------------------------------------------------------------------ measuring


def candidate_ious(
    candidates: torch.Tensor, iou_scores: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """True IoUs [N] of the most confident and of the best of M candidates [N,M,H,W], for scores [N,M] and target
    [N,H,W]."""
    ious = mask_iou(candidates, target[:, None])
    return ious.gather(1, iou_scores.argmax(1, keepdim=True))[:, 0], ious.amax(1)


def masks_at_once(height: int, width: int, prompts_at_once: int) -> int:
    """How many masks of an image of this size are asked for together, `prompts_at_once` at most."""
    return max(1, min(prompts_at_once, PIXELS_AT_ONCE // (height * width)))


def evaluate_image(
    predictors: dict[str, ImagePredictor],
    sample: Sample,
    prompts: Sequence[str],
    clicks: str = "random",
    seed: int = 0,
    prompts_at_once: int = 64,
    count_clicks: bool = False,
) -> tuple[dict[tuple[str | None, str, str], torch.Tensor], torch.Tensor]:
    """
    IoUs of all masks of an image.

    Args:
        predictors: of each model, by name, or what behaves like an `ImagePredictor`.
        sample: the image's true masks.
        prompts: see `num_clicks`.
        clicks: which of `PROTOCOLS`.
        seed: of the clicks, together with each annotation's id.
        prompts_at_once: masks that are asked for together, at most.
        count_clicks: also count clicks on errors, see `clicks_to_reach`; up to 20 decodings more of each mask.

    Returns:
        {(model, prompt, answer): float [N]}, and (None, "baseline", ...) for each of `BASELINES`, which are answers to
        the box that know nothing of the image. Also (model, prompt, `PREDICTED_IOU`), (model, prompt, `BOUNDARY`),
        (None, baseline, `BOUNDARY`) and (model, target, `CLICKS`). And the masks' areas [N] in pixels.
    """
    step = masks_at_once(*sample.rles[0]["size"], prompts_at_once)
    parts = []
    for start in range(0, len(sample.rles), step):
        part = slice(start, start + step)
        masks = torch.from_numpy(decode_rles(sample.rles[part])).contiguous()
        fixed = fixed_prompts(masks, sample.annotation_ids[part], prompts, clicks, seed)
        ious = {}
        for model, predict in predictors.items():
            for (prompt, answer), values in _evaluate_masks(predict, masks, fixed, prompts).items():
                ious[model, prompt, answer] = values.cpu()
            if count_clicks:
                counts = clicks_to_reach(predict, masks, list(CLICK_TARGETS.values()))
                ious |= {(model, name, CLICKS): one for name, one in zip(CLICK_TARGETS, counts.T, strict=True)}
        boxes = boxes_from_masks(masks)
        for name, guess in BASELINES.items():
            guessed = guess(boxes, *masks.shape[-2:])
            ious[None, "baseline", name] = mask_iou(guessed, masks)
            ious[None, name, BOUNDARY] = boundary_iou(guessed, masks)
        parts.append((ious, masks.sum((1, 2), dtype=torch.int64)))
    ious, areas = zip(*parts, strict=True)
    return {row: torch.cat([part[row] for part in ious]) for row in ious[0]}, torch.cat(areas)


def _evaluate_masks(predict: ImagePredictor, masks: torch.Tensor, fixed: dict, prompts: Sequence[str]) -> dict:
    ious = {}
    for prompt, given, (candidates, scores, _) in answers(predict, masks, fixed, prompts):
        target = masks.to(candidates.device)
        ious[prompt, "confident"], ious[prompt, "best"] = candidate_ious(candidates, scores, target)
        ious[prompt, PREDICTED_IOU] = scores.amax(1).float()
        ious[prompt, BOUNDARY] = boundary_iou(candidates[torch.arange(len(masks)), scores.argmax(1)], target)
        if prompt == "box":
            single, _, _ = predict(multimask_output=False, **given)
            ious[prompt, "single"] = mask_iou(single[:, 0], target)
    return ious


@dataclass(frozen=True)
class Record:
    """What was measured on an image: its place and source, the areas of its masks, and the IoUs of each row."""

    place: tuple[int, int]
    source: str
    areas: list[int]
    ious: dict[tuple[str | None, str, str], list[float]]


def evaluate_images(
    predictors: dict[str, Predictor],
    batches: Iterable[list[Item | BrokenImage]],
    prompts: Sequence[str],
    clicks: str = "random",
    seed: int = 0,
    prompts_at_once: int = 64,
    count_clicks: bool = False,
) -> list[Record | BrokenImage]:
    """What was measured on each image of some batches, whose items have inputs for each model in this order, and the
    images that cannot be read; for the other arguments see `evaluate_image`."""
    records = []
    for batch in batches:
        batch, broken = split_broken(batch)
        records += broken
        encoded = [one.encode([item.inputs[i] for item in batch]) for i, one in enumerate(predictors.values())]
        for number, item in enumerate(batch):
            asked = {name: images[number] for name, images in zip(predictors, encoded, strict=True)}
            ious, areas = evaluate_image(asked, item.sample, prompts, clicks, seed, prompts_at_once, count_clicks)
            lists = {row: values.tolist() for row, values in ious.items()}
            records.append(Record(item.place, item.sample.source, areas.tolist(), lists))
    return records


def measured(records: list[Record], *row: str | None) -> torch.Tensor:
    """The values float32 [N] of a row, of all masks of records in the order given."""
    return torch.tensor([value for record in records for value in record.ious[row]])


def all_areas(records: list[Record]) -> torch.Tensor:
    """int64 [N], in pixels."""
    return torch.tensor([area for record in records for area in record.areas])


def mean_ious(records: list[Record], model: str, prompts: Sequence[str]) -> dict[str, dict[str, dict]]:
    """{prompt: {answer: `MeanIoU.compute()`}} of a model and of the baselines, from records in the order given."""
    results = {prompt: {} for prompt in (*prompts, "baseline")}
    areas = all_areas(records)
    for row in records[0].ious:
        if row[0] in (model, None) and row[2] not in MEASURES:
            mean = MeanIoU()
            mean.update(measured(records, *row), areas)
            results[row[1]][row[2]] = mean.compute()
    return results


def boundary_ious(records: list[Record], model: str, prompts: Sequence[str]) -> dict[str, dict[str, dict]]:
    """{prompt or baseline: `mean_by_size`} of the boundary IoUs of a model's most confident candidates."""
    rows = [(model, prompt, BOUNDARY) for prompt in prompts] + [(None, name, BOUNDARY) for name in BASELINES]
    return {row[1]: mean_by_size(measured(records, *row), all_areas(records)) for row in rows}


def numbers_of_clicks(records: list[Record], model: str) -> dict[str, dict[str, dict]]:
    """{target: `mean_by_size`} of a model's clicks to each of `CLICK_TARGETS`, with the ratio `failed` of masks that
    do not get there in 20, which count as 20."""
    areas, results = all_areas(records), {}
    for target in CLICK_TARGETS:
        clicks = measured(records, model, target, CLICKS)
        failed = mean_by_size(clicks.isinf(), areas)
        means = mean_by_size(clicks.clamp(max=MAX_CLICKS), areas)
        results[target] = {group: one | {"failed": failed[group]["mean"]} for group, one in means.items()}
    return results


def calibration_errors(records: list[Record], model: str, prompts: Sequence[str]) -> dict[str, float]:
    """{prompt: `calibration_error`} of a model's most confident candidates."""
    return {
        prompt: calibration_error(
            measured(records, model, prompt, PREDICTED_IOU), measured(records, model, prompt, "confident")
        )
        for prompt in prompts
    }
