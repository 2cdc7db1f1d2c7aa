"""What a visitor takes away from a session: files with all objects, and Python that makes the same masks."""

import io
import json
import re
from collections.abc import Callable
from pathlib import PurePath

from hf_efficientsam.inference.results import SegmentationResult

from .session import Session, no_report

FORMATS = {
    "mask": "Mask",
    "cutout": "Cut-out",
    "labels": "Label map",
    "coco": "COCO",
    "rle": "RLE",
}

# How objects are found without clicks: the class, the call, and the expression of mask i.
FOUND_BY = {
    "everything": (
        "EfficientSamMaskGenerator",
        "generator = EfficientSamMaskGenerator(predictor.model, predictor.processor, {options})\n"
        "found = generator.generate(predictor.image)",
        'found[i]["segmentation"]',
    ),
    "salient": ("SalientPrompter", "found = SalientPrompter(predictor, {options})()", "found.masks[i]"),
    "text": ("TextPrompter", "found = TextPrompter(predictor, {options})({question!r})", "found.masks[i]"),
}


def file_of(session: Session, kind: str, report: Callable[[float], None] = no_report) -> tuple[str, bytes]:
    """
    Name and content of a file with all objects; `kind` is one of `FORMATS`, `report` as of `Session.result`.

    Raises:
        ValueError: if there is no object yet.
    """
    result = session.result(report)
    if not len(result):
        raise ValueError("there is nothing to download yet; mark an object first.")
    stem = re.sub(r"[^\w. -]+", "_", PurePath(session.file_name).stem)
    stem = stem.encode()[:200].decode(errors="ignore") or "picture"  # a file's name has up to 255 bytes
    report(0.9)
    content = content_of(session, result, kind)
    report(1)
    return f"{stem}_{kind}.{'json' if kind in ('coco', 'rle') else 'png'}", content


def content_of(session: Session, result: SegmentationResult, kind: str) -> bytes:
    if kind == "coco":
        return json.dumps(result.coco(session.file_name)).encode()
    if kind == "rle":
        objects = [
            {"label": label, "score": round(float(score), 4), "segmentation": rle}
            for label, score, rle in zip(result.labels, result.scores, result.rles(), strict=True)
        ]
        return json.dumps({"image": session.file_name, "objects": objects}).encode()
    drawings = {
        "mask": result.union,
        "cutout": lambda: result.cut_out(session.predictor.image),
        "labels": result.label_map,
    }
    content = io.BytesIO()
    drawings[kind]().save(content, "PNG")
    return content.getvalue()


def python_code(session: Session) -> str:
    """Python that makes the masks of `Session.result` from the image's file, as the list `masks`."""
    done = [one for one in session.objects if one.candidates]
    finding = next((one.finding for one in done if one.finding is not None), None)
    tool, ask, mask_of = FOUND_BY[finding.method] if finding else (None, None, None)
    lines = [f"from hf_efficientsam import {', '.join(sorted({'EfficientSamPredictor', tool} - {None}))}"]
    image = repr(session.file_name)
    if session.reduced_from:
        size = (session.width, session.height)
        lines = [
            "from PIL import Image, ImageOps",
            *lines,
            "",
            f"image = ImageOps.exif_transpose(Image.open({image}))",
        ]
        lines += [f'image = image.convert("RGB").resize({size})  # as the page has reduced it']
        image = "image"
    lines += ["", f"predictor = EfficientSamPredictor.from_pretrained({session.checkpoint!r})".replace("(None)", "()")]
    lines += [f"predictor.set_image({image})", "masks = []  # of each object, bool [height, width]"]
    if finding:
        options = ", ".join(f"{name}={value!r}" for name, value in finding.options.items())
        lines += ["", *ask.format(options=options, question=finding.question).splitlines()]
        places = [one.place for one in done if one.finding is not None]
        lines += [f"masks += [{mask_of} for i in {places}]"]
    for i, one in enumerate(done, start=1):
        if one.finding is None:
            arguments = ", ".join(f"{name}={value}" for name, value in one.prompts().items())
            lines += ["", f"# {i}: {one.name}", f"candidates, scores, _ = predictor.predict({arguments})"]
            lines += [f"masks.append(candidates[{one.chosen}])"]
    return "\n".join(lines) + "\n"
