"""The API of the web demo for programs (`gradio_client`)."""

from collections.abc import Callable
from functools import wraps

import gradio as gr

from .service import Demo, as_sentence

# All events that run the model share one queue: two at a time, first come, first served.
COMPUTES = {"concurrency_id": "model", "concurrency_limit": 2}


def build_api(demo: Demo) -> None:
    """Calls without sessions: an image and prompts in, a COCO dataset out."""

    def with_errors(answer: Callable) -> Callable:
        @wraps(answer)  # its parameters have their names in the API
        def answer_or_error(*values):
            try:
                return answer(*values)
            except ValueError as error:
                raise gr.Error(as_sentence(error), print_exception=False) from None

        return answer_or_error

    with gr.Row(visible=False):
        image, text = gr.Image(type="filepath", label="image"), gr.Textbox(None, label="text")
        points, labels, boxes = (gr.JSON(label=label) for label in ("points", "labels", "boxes"))
        points_per_side = gr.Number(12, label="points_per_side")
        pred_iou, stability = (gr.Number(one) for one in demo.everything_thresholds)
        saliency, confidence = gr.Number(0.5, label="threshold"), gr.Number(0.2, label="threshold")
        found, button = gr.JSON(label="COCO dataset"), gr.Button()
    for answer, inputs in (
        (demo.segment, [points, labels, boxes]),
        (demo.everything, [points_per_side, pred_iou, stability]),
        (demo.salient, [saliency]),
        (demo.text, [text, confidence]),
    ):
        options = {"api_name": answer.__name__, "preprocess": False, **COMPUTES}
        button.click(with_errors(answer), [image, *inputs], found, **options)
