"""The functions behind the page and the API of the web demo: one model, and a session for each visitor."""

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path, PurePath

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder, is_in_or_equal

from hf_efficientsam.inference.drawing import color_of
from hf_efficientsam.inference.loading import is_bundled, load_model
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompters import Detector, SalientPrompter, TextPrompter, load_saliency
from hf_efficientsam.inference.prompters.saliency_sources import HeadSaliency, SaliencySource
from hf_efficientsam.inference.uploads import MAX_PIXELS, MAX_POINTS_PER_SIDE, read_objects, read_upload, warnings_of
from hf_efficientsam.model.image_reading_efficientsam import image_to_array, to_pil_image

from .html_fragments import candidates_html, mask_url, objects_html, stage_html, status_html
from .outputs import FORMATS, file_of, python_code
from .scene import Finding
from .session import NothingFound, Session, no_report

MAX_PIXELS_READ = 100_000_000  # of images that the page reduces
SPECKS = 1400  # islands and holes smaller than this part of the image are no part of a found object


class Stopped(ValueError):
    """The visitor wants no answer."""


def as_sentence(error: Exception | str) -> str:
    """The message of an error, or another, with a capital letter."""
    text = str(error)
    return text[:1].upper() + text[1:]


def check_numbers(*values) -> None:
    if not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"points a side and thresholds must be numbers, not {', '.join(map(repr, values))}.")


class Demo:
    """
    One model for all visitors, each of whom has a `Session`.

    Args:
        model: directory or Hub name of the checkpoint; by default the bundled one.
        detector: directory or Hub name of a zero-shot object detector, for text; without one the mode is disabled.
        saliency: a name that `load_saliency` takes; by default the checkpoint's own head, without which the mode is
            disabled.
        max_pixels: larger images are reduced on the page, and refused by the API, where prompts are in their pixels.
        device, dtype: of the model, as of `load_model`.

    Attributes:
        no_detector, no_saliency: why a mode is disabled; empty if it is not.
        everything_thresholds: initial values of `pred_iou_thresh` and `stability_score_thresh`: the checkpoint's.

    Raises:
        ValueError: a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        detector: str | None = None,
        saliency: str | None = None,
        max_pixels: int = MAX_PIXELS,
        device: str = "auto",
        dtype: str = "float32",
    ):
        self.checkpoint = None if is_bundled(model) else model
        self.detector, self.saliency, self.max_pixels = detector, saliency, max_pixels
        self.model, self.processor = load_model(model, dtype, device, max_pixels)
        thresholds = self.model.config.mask_generation
        self.everything_thresholds = thresholds["pred_iou_thresh"], thresholds["stability_score_thresh"]
        self.detector_model = Detector(detector, self.model.device) if detector else None
        self.no_detector = "" if detector else "This needs a detector; start the page with --detector NAME."
        self.saliency_source, self.no_saliency = self._load_saliency()
        self.versions = count(1)

    def _load_saliency(self) -> tuple[SaliencySource | None, str]:
        """The source of saliency maps, or the reason why there is none."""
        try:
            return load_saliency(self.saliency, EfficientSamPredictor(self.model, self.processor)), ""
        except ValueError:
            if self.saliency is not None:
                raise
            return None, "This checkpoint has no head for it; start the page with --saliency NAME."

    def open(self, path: str, name: str, reduce: bool = False) -> Session:
        """
        Args:
            path: the image's file.
            name: the visitor's name for it.
            reduce: images of more than `max_pixels` are reduced to so many.

        Raises:
            ValueError: one sentence about what is wrong with the file.
        """
        name, reduced_from = PurePath(name).name, None
        image = read_upload(Path(path), name, max(self.max_pixels, MAX_PIXELS_READ) if reduce else self.max_pixels)
        if (scale := (self.max_pixels / (image.width * image.height)) ** 0.5) < 1:
            reduced_from = image.size
            image = to_pil_image(image_to_array(image)).resize([max(1, int(scale * side)) for side in image.size])
        predictor = EfficientSamPredictor(self.model, self.processor)
        return Session(predictor, self.checkpoint, name, image, reduced_from)

    def open_upload(self, upload: dict | None, reduce: bool = False) -> Session:
        """
        Args:
            upload: a file as gradio's page and clients send it.
            reduce: as of `open`.

        Raises:
            ValueError: as `open`; or there is none; or its path is not in the folder of uploads, which gradio does not
                check for every kind of input.
        """
        if not upload:
            raise ValueError("there is no picture; choose one.")
        if not isinstance(upload, dict) or not is_in_or_equal(str(upload.get("path")), get_upload_folder()):
            raise ValueError("the picture must be uploaded first.")
        return self.open(upload["path"], upload.get("orig_name") or Path(upload["path"]).name, reduce)

    # ---------------------------------------------------------------------------------------------- finding

    # `report` is called with the ratio done (0 to 1); what it raises ends the search.

    def find_everything(
        self,
        session: Session,
        points_per_side: float,
        pred_iou_thresh: float,
        stability_score_thresh: float,
        report: Callable[[float], None] = no_report,
    ) -> None:
        check_numbers(points_per_side, pred_iou_thresh, stability_score_thresh)
        if not points_per_side <= MAX_POINTS_PER_SIDE:
            raise ValueError(f"this page lays up to {MAX_POINTS_PER_SIDE} points along each side.")
        session.find_everything(
            report,
            points_per_side=int(points_per_side),
            pred_iou_thresh=pred_iou_thresh,
            stability_score_thresh=stability_score_thresh,
            min_mask_region_area=session.height * session.width // SPECKS,
        )

    def find_salient(self, session: Session, threshold: float, report: Callable = no_report) -> None:
        check_numbers(threshold)
        if self.no_saliency:
            raise ValueError(self.no_saliency)
        options = (
            {"threshold": threshold} if self.saliency is None else {"saliency": self.saliency, "threshold": threshold}
        )
        source = self.saliency_source
        if isinstance(source, HeadSaliency):  # on the embedding that this visitor's predictor has
            source = HeadSaliency(session.predictor, source.head)
        prompter = SalientPrompter(session.predictor, source, threshold=threshold)
        session.find(Finding("salient", options), prompter, report=report)

    def find_text(self, session: Session, text: str, threshold: float, report: Callable = no_report) -> None:
        check_numbers(threshold)
        if self.no_detector:
            raise ValueError(self.no_detector)
        options = {"detector": self.detector, "threshold": threshold}
        prompter = TextPrompter(session.predictor, self.detector_model, threshold=threshold)
        session.find(Finding("text", options, text), prompter, text, report=report)

    # ---------------------------------------------------------------------------------------------- the page

    def view(self, session: Session, problem: str = "") -> list:
        """The values of the components that a change of the session updates, in the order of `Page.answers`."""
        enabled = (
            session.past,  # undo
            session.future,  # redo
            session.objects or session.scene.corner,  # clear
            session.current or session.scene.corner,  # new
            session.current,  # remove
            *len(FORMATS) * [any(one.candidates for one in session.objects)],
        )
        return [
            stage_html(session, next(self.versions)),
            objects_html(session),
            candidates_html(session),
            gr.update(value=session.current.name if session.current else "", interactive=session.current is not None),
            status_html(session, problem or as_sentence(session.notice), is_error=bool(problem)),
            python_code(session) if session.objects else "",
            *(gr.update(interactive=bool(one)) for one in enabled),
        ]

    def act(self, session: Session | None, change: Callable[[Session], None]) -> list:
        """Changes a session and shows it. Wrong input changes nothing and is shown as one sentence."""
        if session is None:
            raise gr.Error("The picture is no longer there; choose it again.", print_exception=False)
        with session.lock:
            session.notice, problem = "", ""
            try:
                change(session)
            except Stopped as stopped:
                session.notice = str(stopped)
            except ValueError as error:
                problem = as_sentence(error)
                gr.Warning(problem)
            return self.view(session, problem)

    def reporter(self, session: Session, progress: gr.Progress, text: str) -> Callable[[float], None]:
        """What shows the visitor how far something is, and raises `Stopped` when the visitor wants that."""

        def report(ratio: float) -> None:
            if session.stopping.is_set():
                raise Stopped("stopped; nothing was changed.")
            progress(ratio, desc=text)

        return report

    def save(self, session: Session | None, kind: str, progress: gr.Progress) -> dict:
        """A download for the page, as a temporary file that gradio removes after `SECONDS_OF_FILES`."""
        if session is None:
            raise gr.Error("Choose a picture first.", print_exception=False)
        try:
            with session.lock:
                report = self.reporter(session, progress, f"Making the download: {FORMATS[kind]}")
                name, content = file_of(session, kind, report)
            path = save_bytes_to_cache(content, name, get_upload_folder())
        except Stopped as stopped:
            gr.Info(as_sentence(stopped))
            return gr.skip()
        except ValueError as error:
            raise gr.Error(as_sentence(error), print_exception=False) from None
        except OSError as error:  # its file name is of this computer
            raise gr.Error(f"{name} cannot be made: {error.strerror}.", print_exception=False) from None
        file = gr.FileData(path=path, orig_name=name)
        return {"file": file.model_dump(), "version": next(self.versions)}

    def preview(self, session: Session | None, x: float, y: float) -> dict:
        """
        The mask that a click would give, as `url`; empty where there is none, or while something else is computed:
        a preview must never keep a click waiting.
        """
        url = ""
        if session is not None and session.lock.acquire(blocking=False):
            try:
                mask, index = session.preview(x, y)
                url = mask_url(mask, color_of(index))
            finally:
                session.lock.release()
        return {"url": url, "version": next(self.versions)}

    # ---------------------------------------------------------------------------------------------- the API

    def segment(
        self, image: dict, points: list | None = None, labels: list | None = None, boxes: list | None = None
    ) -> dict:
        """
        The objects that points and boxes show, grouped as by `efficientsam segment`, as a COCO dataset.

        Args:
            image: the image's file.
            points: [[x, y], ...] in pixels of the upright image.
            labels: for each point 1 (on the object, the default) or 0 (on the background).
            boxes: [[x1, y1, x2, y2], ...] in pixels, one for each object.
        """
        asked = {"points": points, "labels": labels, "boxes": boxes}
        objects = read_objects({key: value for key, value in asked.items() if value is not None})
        session = self.open_upload(image)
        result = session.predictor.segment(
            points=[one["points"] for one in objects],
            labels=[one["labels"] for one in objects],
            boxes=[one["box"] for one in objects],
        )
        for sentence in warnings_of(objects, session.width, session.height):
            gr.Warning(as_sentence(sentence))
        return result.coco(session.file_name)

    def everything(
        self, image: dict, points_per_side: float, pred_iou_thresh: float, stability_score_thresh: float
    ) -> dict:
        """
        All objects, as a COCO dataset. Specks and holes in masks smaller than a 1400th of the image are removed.

        Args:
            image: the image's file.
            points_per_side: points along each side of the grid over the image.
            pred_iou_thresh: least predicted IoU of a mask, 0 to 1.
            stability_score_thresh: least stability of a mask, 0 to 1.
        """
        return self._find(self.find_everything, image, points_per_side, pred_iou_thresh, stability_score_thresh)

    def salient(self, image: dict, threshold: float) -> dict:
        """
        The objects that stand out, as a COCO dataset.

        Args:
            image: the image's file.
            threshold: least saliency, 0 to 1.
        """
        return self._find(self.find_salient, image, threshold)

    def text(self, image: dict, text: str, threshold: float) -> dict:
        """
        The objects that words name, as a COCO dataset.

        Args:
            image: the image's file.
            text: names, with commas between them.
            threshold: least confidence of the detector, 0 to 1.
        """
        return self._find(self.find_text, image, text, threshold)

    def _find(self, method: Callable, image: dict, *options) -> dict:
        session = self.open_upload(image)
        with suppress(NothingFound):
            method(session, *options)
        return session.result().coco(session.file_name)
