"""The page of the web demo, its API, and the server for both."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from hf_efficientsam.inference.uploads import MAX_FILE_BYTES, MAX_POINTS_PER_SIDE

from .html_fragments import chips_html, thumbnail_html
from .service import Demo, as_sentence
from .session import FORMATS, Session

HERE = Path(__file__).parent
EXAMPLES = [HERE / "examples" / name for name in ("elephant.jpg", "bus.jpg", "clock.jpg")]
MAX_WAITING = 32  # requests in the queue; gradio refuses more with a sentence
MAX_SESSIONS = 50  # the least recently used ones are dropped
SECONDS_OF_FILES, SECONDS_OF_SESSIONS = 15 * 60, 60 * 60  # how long they are kept

# All events that run the model share one queue: two at a time, first come, first served.
COMPUTES = {"concurrency_id": "model", "concurrency_limit": 2}
# No click is lost while another one is processed.
PRIVATE = {**COMPUTES, "api_visibility": "private", "trigger_mode": "multiple", "show_progress": "hidden"}

# The visitor's own fonts: gradio loads others from Google.
THEME = gr.themes.Soft(
    primary_hue="blue",
    secondary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
INTRODUCTION = "Cut objects out of a picture: click on them, draw a box, or let the model look for itself."
BUNDLED_NOTE = (
    " This is the model that comes with the package, trained on few images: boxes work best, and single clicks often "
    "miss."
)
CLICKS_MARK = "Clicks on the picture mark the object that is there."
ON_OBJECT, ON_BACKGROUND = "on the object", "on the background"
PICK_JS = """element.addEventListener("click", (event) => {
  const chip = event.target.closest("button");
  if (chip) trigger("pick", { index: Number(chip.dataset.index) });
});"""
DOWNLOAD_HTML = '<a href="${value.file.url}" download="${value.file.orig_name}"></a>'
DOWNLOAD_JS = 'watch("value", () => element.querySelector("a").click());'


class Page:
    """
    Builds the page's layout and connects it with the methods of `demo`.

    Attributes:
        blocks: for gradio to serve.
        panels: the panel without an image, and the one with an image.
        answers: the components that a change of the session updates, in the order of `Demo.view`.
    """

    def __init__(self, demo: Demo):
        self.demo = demo
        with gr.Blocks(
            title="EfficientSAM", analytics_enabled=False, delete_cache=(60, SECONDS_OF_FILES), fill_width=True
        ) as blocks:
            self.session = gr.State(None, time_to_live=SECONDS_OF_SESSIONS)
            gr.Markdown("# EfficientSAM", elem_id="title")
            chooser = self.build_chooser()
            with gr.Row(visible=False, elem_id="desk") as desk:  # style.css places its columns
                with gr.Column(elem_id="modes", elem_classes="card"):
                    self.build_modes()
                with gr.Column(elem_id="work"):
                    self.build_stage()
                with gr.Column(elem_id="tools", elem_classes="card"):
                    self.build_objects()
                    self.build_downloads()
            self.panels = [chooser, desk]
            self.answers = [
                self.stage,
                self.objects,
                self.candidates,
                self.name,
                self.status,
                self.undo,
                self.redo,
                self.code,
            ]
            self.connect_images()
            self.connect_stage()
            self.connect_objects()
            self.connect_finders()
            self.connect_downloads()
            build_api(demo)
        self.blocks = blocks

    # ---------------------------------------------------------------------------------------------- layout

    def build_chooser(self) -> gr.Column:
        with gr.Column() as column:
            hint(INTRODUCTION + ("" if self.demo.checkpoint else BUNDLED_NOTE))
            self.upload = gr.Image(
                label="Your picture", type="filepath", sources=["upload", "clipboard", "webcam"], height=340
            )
            heading("Or one of these photographs")
            chips = chips_html([thumbnail_html(path) for path in EXAMPLES], None, "Example pictures", "pictures")
            self.examples = gr.HTML(chips, js_on_load=PICK_JS, apply_default_css=False, elem_id="examples")
        return column

    def build_stage(self) -> None:
        self.stage = gr.HTML(js_on_load=(HERE / "stage.js").read_text(), apply_default_css=False)
        self.status = gr.HTML(apply_default_css=False, elem_id="status")
        with gr.Row(elem_classes="buttons"):
            self.undo = gr.Button("Undo", size="sm", min_width=60)
            self.redo = gr.Button("Redo", size="sm", min_width=60)
            self.clear = gr.Button("Clear", size="sm", min_width=60)
            self.another = gr.Button("Other picture", size="sm", min_width=105)

    def build_modes(self) -> None:
        self.mode = gr.Textbox("Points", visible=False)
        with gr.Tabs():
            with self.build_mode("Points"):
                takes_background = self.demo.model.config.prompt_encoder_config.background_points
                self.adds = gr.Radio(
                    [ON_OBJECT, ON_BACKGROUND], value=ON_OBJECT, label="A click is a point", visible=takes_background
                )
                hint("The right mouse button or Shift is always the background." if takes_background else "")
            with self.build_mode("Box"):
                hint("Click on two opposite corners, or drag with the mouse.")
            with self.build_mode("Everything"):
                hint(CLICKS_MARK)
                self.everything = [*self.build_everything_sliders(), gr.Button("Find everything", variant="primary")]
            with self.build_mode("Salient"):
                usable = not self.demo.no_saliency
                hint(self.demo.no_saliency or CLICKS_MARK)
                self.salient = [
                    gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Least saliency", interactive=usable),
                    gr.Button("Find what stands out", variant="primary", interactive=usable),
                ]
            with self.build_mode("Text"):
                usable = not self.demo.no_detector
                hint(self.demo.no_detector or CLICKS_MARK)
                self.text = [
                    gr.Textbox(label="What to find", placeholder="a dog, a cat", interactive=usable),
                    gr.Slider(0.05, 0.95, 0.2, step=0.05, label="Least confidence", interactive=usable),
                    gr.Button("Find it", variant="primary", interactive=usable),
                ]

    def build_mode(self, name: str) -> gr.Tab:
        with gr.Tab(name) as tab:
            tab.select(None, None, self.mode, js=f"() => '{name}'")
        return tab

    def build_everything_sliders(self) -> list[gr.Slider]:
        pred_iou, stability = self.demo.everything_thresholds
        return [
            gr.Slider(4, MAX_POINTS_PER_SIDE, 12, step=1, label="Points along each side"),
            gr.Slider(0, 1, pred_iou, step=0.01, label="Least predicted IoU"),
            gr.Slider(0, 1, stability, step=0.01, label="Least stability"),
        ]

    def build_objects(self) -> None:
        heading("Objects")
        self.objects = gr.HTML(js_on_load=PICK_JS, apply_default_css=False, elem_id="objects")
        with gr.Row(elem_classes="buttons"):
            self.new = gr.Button("New object", size="sm", min_width=80)
            self.remove = gr.Button("Remove", size="sm", min_width=80)
        self.name = gr.Textbox(label="Name of the marked object", max_lines=1)
        self.candidates = gr.HTML(js_on_load=PICK_JS, apply_default_css=False, elem_id="candidates")

    def build_downloads(self) -> None:
        heading("Download all objects")
        with gr.Row(elem_classes="buttons"):
            self.saves = {kind: gr.Button(label, size="sm", min_width=60) for kind, label in FORMATS.items()}
        self.file = gr.HTML(
            {"file": {"url": "", "orig_name": ""}, "version": 0},
            html_template=DOWNLOAD_HTML,
            js_on_load=DOWNLOAD_JS,
            visible="hidden",
        )
        with gr.Accordion("Python for this result", open=False):
            self.code = gr.Code(language="python", interactive=False, show_label=False, wrap_lines=True, lines=6)

    # ---------------------------------------------------------------------------------------------- connections

    def connect_images(self) -> None:
        def begin(session: Session) -> list:
            return [session, *show_panels(False, True), *self.demo.view(session)]

        def begin_upload(sent: dict | None) -> list:
            if sent is None:  # the visitor removed the image
                return [gr.skip()] * len(opening["outputs"])
            try:
                return begin(self.demo.open_upload(sent))
            except ValueError as error:
                raise gr.Error(as_sentence(error), print_exception=False) from None

        def begin_example(event: gr.EventData) -> list:
            return begin(self.demo.open(EXAMPLES[event.index], EXAMPLES[event.index].name))

        opening = {
            **PRIVATE,
            "outputs": [self.session, *self.panels, *self.answers],
            "show_progress": "minimal",
            "show_progress_on": self.upload,
        }
        self.upload.change(begin_upload, self.upload, preprocess=False, **opening)
        self.examples.pick(begin_example, None, **opening)
        self.another.click(
            lambda: [None, *show_panels(True, False)],
            outputs=[self.upload, *self.panels],
            api_visibility="private",
        )

    def on(self, event: Callable, change: Callable, inputs: Sequence = (), **options) -> None:
        """On `event` calls `change(session, *inputs)`, and shows the session."""

        def act(session: Session | None, *values) -> list:
            return self.demo.act(session, lambda session: change(session, *values))

        event(act, [self.session, *inputs], self.answers, **{**PRIVATE, **options})

    def connect_stage(self) -> None:
        def on_point(session: Session | None, mode: str, adds: str, event: gr.EventData) -> list:
            def change(session: Session) -> None:
                if mode == "Points":
                    session.add_point(event.x, event.y, int(adds == ON_OBJECT and not event.background))
                elif mode == "Box":
                    session.add_corner(event.x, event.y)
                else:
                    session.select_at(event.x, event.y)

            return self.demo.act(session, change)

        def on_box(session: Session | None, event: gr.EventData) -> list:
            return self.demo.act(session, lambda session: session.set_box(event.x, event.y, event.x2, event.y2))

        self.stage.point(on_point, [self.session, self.mode, self.adds], self.answers, **PRIVATE)
        self.stage.box(on_box, self.session, self.answers, **PRIVATE)

    def connect_objects(self) -> None:
        def pick_object(session: Session | None, event: gr.EventData) -> list:
            return self.demo.act(session, lambda session: session.select(event.index))

        def pick_candidate(session: Session | None, event: gr.EventData) -> list:
            return self.demo.act(session, lambda session: session.choose(event.index))

        self.objects.pick(pick_object, self.session, self.answers, **PRIVATE)
        self.candidates.pick(pick_candidate, self.session, self.answers, **PRIVATE)
        for button, change in {
            self.undo: Session.undo,
            self.redo: Session.redo,
            self.clear: Session.clear,
            self.new: lambda session: session.select(len(session.objects)),
            self.remove: Session.remove,
        }.items():
            self.on(button.click, change)
        self.on(self.name.submit, Session.rename, [self.name])
        self.on(self.name.blur, Session.rename, [self.name])

    def connect_finders(self) -> None:
        options = {"show_progress": "minimal", "show_progress_on": self.status}
        for parts, find in (
            (self.everything, self.demo.find_everything),
            (self.salient, self.demo.find_salient),
            (self.text, self.demo.find_text),
        ):
            *settings, button = parts
            self.on(button.click, find, settings, **options)
        self.on(self.text[0].submit, self.demo.find_text, self.text[:-1], **options)

    def connect_downloads(self) -> None:
        for kind, button in self.saves.items():
            button.click(lambda session, kind=kind: self.demo.save(session, kind), self.session, self.file, **PRIVATE)


def heading(text: str) -> None:
    gr.HTML(f"<h2>{text}</h2>", apply_default_css=False)


def hint(text: str) -> None:
    gr.HTML(f'<p class="hint">{text}</p>', apply_default_css=False, visible=bool(text))


def show_panels(*visible: bool) -> list:
    return [gr.update(visible=one) for one in visible]


def build_api(demo: Demo) -> None:
    """The API for programs (`gradio_client`), without sessions: an image and prompts in, a COCO dataset out."""

    def with_errors(answer: Callable) -> Callable:
        def answer_or_error(*values):
            try:
                return answer(*values)
            except ValueError as error:
                raise gr.Error(as_sentence(error), print_exception=False) from None

        return answer_or_error

    with gr.Row(visible=False):
        image = gr.Image(type="filepath", label="image")
        points, labels, boxes = gr.JSON(label="points"), gr.JSON(label="labels"), gr.JSON(label="boxes")
        points_per_side, text = gr.Number(12, label="points_per_side"), gr.Textbox(label="text")
        pred_iou, stability = (gr.Number(one) for one in demo.everything_thresholds)
        threshold = gr.Number(0.5)
        found, button = gr.JSON(label="COCO dataset"), gr.Button()
    for name, answer, inputs in (
        ("segment", demo.segment, [points, labels, boxes]),
        ("everything", partial(demo.find, demo.find_everything), [points_per_side, pred_iou, stability]),
        ("salient", partial(demo.find, demo.find_salient), [threshold]),
        ("text", partial(demo.find, demo.find_text), [text, threshold]),
    ):
        button.click(with_errors(answer), [image, *inputs], found, api_name=name, preprocess=False, **COMPUTES)


@contextmanager
def settings_for_gradio(folder: str) -> Iterator[None]:
    """Gradio keeps files in `folder`, sends no statistics, and ends by SIGTERM as by Ctrl+C; then all is as before."""
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are removed then, too
    before = dict(os.environ)
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def launch_demo(demo: Demo, host: str = "127.0.0.1", port: int | None = None, share: bool = False) -> None:
    """Serves the page until it is stopped; a public link is made only if `share` asks for it."""
    with TemporaryDirectory(prefix="efficientsam_") as folder, settings_for_gradio(folder):
        blocks = Page(demo).blocks.queue(max_size=MAX_WAITING)
        options = {"theme": THEME, "css": (HERE / "style.css").read_text(), "footer_links": ["api", "settings"]}
        limits = {"max_file_size": MAX_FILE_BYTES, "state_session_capacity": MAX_SESSIONS, "run_history": False}
        try:
            # ssr_mode needs node
            blocks.launch(server_name=host, server_port=port, share=share, ssr_mode=False, **options, **limits)
        except OSError:
            place = host if port is None else f"port {port} of {host}"
            raise ValueError(f"{place} cannot be had; choose another --port or --host.") from None
