"""The page of the web demo, and the server for it and its API."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

from hf_efficientsam.inference.uploads import MAX_FILE_BYTES, MAX_POINTS_PER_SIDE

from .api import COMPUTES, build_api
from .html_fragments import by_hand, chips_html, problem_html, thumbnail_html
from .outputs import FORMATS
from .service import Demo
from .session import Session

HERE = Path(__file__).parent
EXAMPLES = [HERE / "examples" / name for name in ("elephant.jpg", "bus.jpg", "clock.jpg")]
MAX_WAITING = 32  # requests in the queue; gradio refuses more with a sentence
MAX_SESSIONS = 50  # the least recently used ones are dropped
SECONDS_OF_FILES, SECONDS_OF_SESSIONS = 15 * 60, 60 * 60  # how long they are kept

# No click is lost while another one is processed.
PRIVATE = {**COMPUTES, "api_visibility": "private", "trigger_mode": "multiple", "show_progress": "hidden"}

PROGRESS = gr.Progress()  # gradio gives one of its own to functions that have this default

# The visitor's own fonts: gradio loads others from Google.
THEME = gr.themes.Soft(
    primary_hue="blue",
    secondary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
INTRODUCTION = (
    f"Cut objects out of a picture: {by_hand('click on', 'tap')} them, draw a box, or let the model look for itself."
)
BUNDLED_NOTE = (
    " This is the model that comes with the package, trained on few images: boxes work best, and single clicks often "
    "miss."
)
CLICKS_MARK = by_hand("Clicks", "Taps") + " on the picture select the object that is there."
ON_OBJECT, ON_BACKGROUND = "on the object", "on the background"
PICK_JS = """element.addEventListener("click", (event) => {
  const chip = event.target.closest("button");
  if (chip) trigger("pick", { index: Number(chip.dataset.index) });
});"""
NAMED_JS = """(session, name) => [
  session, name, Number(document.querySelector("#objects [aria-pressed=true]")?.dataset.index ?? -1)]"""
DOWNLOAD_HTML = '<a href="${value.file.url}" download="${value.file.orig_name}"></a>'
DOWNLOAD_JS = 'watch("value", () => element.querySelector("a").click());'
PREVIEW_JS = """watch("value", () => document.querySelector(".stage").dispatchEvent(
  new CustomEvent("preview", { bubbles: true, detail: props.value })));"""


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
                self.code,
                self.undo,
                self.redo,
                self.clear,
                self.new,
                self.remove,
                *self.saves.values(),
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
            self.problem = gr.HTML(apply_default_css=False, elem_id="problem")
            heading("Or one of these photographs")
            chips = chips_html([thumbnail_html(path) for path in EXAMPLES], None, "Example pictures", "pictures")
            self.examples = gr.HTML(chips, js_on_load=PICK_JS, apply_default_css=False, elem_id="examples")
        return column

    def build_stage(self) -> None:
        self.stage = gr.HTML(js_on_load=(HERE / "stage.js").read_text(), apply_default_css=False)
        self.preview = gr.HTML({"url": ""}, html_template="", js_on_load=PREVIEW_JS, visible="hidden")
        self.progress = gr.HTML("&nbsp;", apply_default_css=False, elem_id="progress")
        self.stop = gr.Button("Stop", size="sm", interactive=False, elem_id="stop")
        self.status = gr.HTML(apply_default_css=False, elem_id="status")
        with gr.Row(elem_classes="buttons"):
            self.undo, self.redo, self.clear = (
                gr.Button(label, size="sm", min_width=50, interactive=False) for label in ("Undo", "Redo", "Clear")
            )
            self.another = gr.Button("Other picture", size="sm", min_width=105)

    def build_modes(self) -> None:
        self.mode = gr.Textbox("Points", visible=False)
        self.finders = []
        with gr.Tabs():
            with self.build_mode("Points"):
                takes_background = self.demo.model.config.prompt_encoder_config.background_points
                click = by_hand("A click", "A tap")
                hint(f"{click} marks an object. More points correct its mask.")
                self.adds = gr.Radio(
                    [ON_OBJECT, ON_BACKGROUND],
                    value=ON_OBJECT,
                    label="The next point is",
                    visible=takes_background,
                    elem_id="adds",
                )
                if takes_background:
                    hint('<span class="mouse">The right mouse button or Shift is always the background.</span>')
            with self.build_mode("Box"):
                hint(
                    by_hand("Click on two opposite corners, or drag", "Tap two opposite corners, or drag a finger")
                    + "."
                )
                hint("Every box is a new object. Points correct its mask.")
            with self.build_mode("Everything"):
                hint(CLICKS_MARK)
                pred_iou, stability = self.demo.everything_thresholds
                self.build_finder(
                    "Find everything",
                    self.demo.find_everything,
                    gr.Slider(4, MAX_POINTS_PER_SIDE, 12, step=1, label="How closely to look"),
                    gr.Slider(0, 1, pred_iou, step=0.01, label="How sure the model must be"),
                    gr.Slider(0, 1, stability, step=0.01, label="How sharp the outlines must be"),
                )
            if not self.demo.no_saliency:
                with self.build_mode("Main objects"):
                    hint(CLICKS_MARK)
                    threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="How much they must stand out")
                    self.build_finder("Find what stands out", self.demo.find_salient, threshold)
            if not self.demo.no_detector:
                with self.build_mode("Text"):
                    hint(CLICKS_MARK)
                    text = gr.Textbox(label="What to find", placeholder="a dog, a cat", max_lines=1)
                    threshold = gr.Slider(0.05, 0.95, 0.2, step=0.05, label="How sure the detector must be")
                    self.build_finder("Find it", self.demo.find_text, text, threshold)

    def build_mode(self, name: str) -> gr.Tab:
        with gr.Tab(name) as tab:
            tab.select(None, None, self.mode, js=f"() => document.querySelector('#desk').dataset.mode = '{name}'")
        return tab

    def build_finder(self, label: str, find: Callable, *settings) -> None:
        """`settings` are the inputs of `find` after the session."""
        self.finders.append((gr.Button(label, variant="primary", elem_classes="slow"), find, settings))

    def build_objects(self) -> None:
        heading("Objects")
        self.objects = gr.HTML(js_on_load=PICK_JS, apply_default_css=False, elem_id="objects")
        with gr.Row(elem_classes="buttons"):
            self.new = gr.Button("New object", size="sm", min_width=80)
            self.remove = gr.Button("Remove", size="sm", min_width=80)
        self.name = gr.Textbox(label="Name of the selected object", max_lines=1)
        self.named = gr.Number(visible=False, precision=0)
        self.candidates = gr.HTML(js_on_load=PICK_JS, apply_default_css=False, elem_id="candidates")

    def build_downloads(self) -> None:
        heading("Download all objects")
        with gr.Row(elem_classes="buttons"):
            self.saves = {
                kind: gr.Button(label, size="sm", min_width=60, elem_classes="slow") for kind, label in FORMATS.items()
            }
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
        def begin(open_image: Callable[[], Session]) -> list:
            """Shows the image, or what is wrong with it and an empty place for another."""
            try:
                session = open_image()
            except ValueError as error:
                return [None, None, problem_html(str(error)), *[gr.skip()] * len([*self.panels, *self.answers])]
            return [session, gr.skip(), "", *show_panels(False, True), *self.demo.view(session)]

        def begin_upload(sent: dict | None) -> list:
            if sent is None:  # the visitor removed the image
                return [gr.skip()] * len(opening["outputs"])
            return begin(lambda: self.demo.open_upload(sent, reduce=True))

        def begin_example(event: gr.EventData) -> list:
            path = EXAMPLES[event.index]
            return begin(lambda: self.demo.open(path, path.name))

        opening = {
            **PRIVATE,
            "outputs": [self.session, self.upload, self.problem, *self.panels, *self.answers],
            "trigger_mode": "once",
            "show_progress": "full",
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

        def on_hover(session: Session | None, event: gr.EventData) -> dict:
            return self.demo.preview(session, event.x, event.y)

        self.stage.hover(on_hover, self.session, self.preview, **PRIVATE)
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
        self.name.submit(None, js="() => document.activeElement.blur()")  # which sends the name, once
        # A click that ends the naming may be answered first: the name says whose it is.
        self.on(self.name.blur, Session.rename, [self.name, self.named], js=NAMED_JS)

    def connect_slow(self, event: Callable, work: Callable, inputs: Sequence, outputs) -> None:
        """
        On `event` calls `work` and shows how far it is. Meanwhile what else takes long is disabled, and can be
        stopped; a second event is ignored.
        """
        slow = [self.stop, self.another, *(button for button, *_ in self.finders), *self.saves.values()]
        updates = ", ".join(f"{{__type__: 'update', interactive: {str(one is self.stop).lower()}}}" for one in slow)
        event(None, None, slow, js=f"() => [{updates}]", api_visibility="private")
        options = PRIVATE | {"trigger_mode": "once", "show_progress": "full", "show_progress_on": self.progress}
        done = event(work, [self.session, *inputs], outputs, **options)

        def rest(session: Session | None) -> list:
            can_save = False
            if session is not None:
                session.stopping.clear()
                can_save = any(one.candidates for one in session.objects)
            states = [False, True, *[True] * len(self.finders), *[can_save] * len(self.saves)]
            return [gr.update(interactive=state) for state in states]

        for follow in (done.success, done.failure):  # gradio's `then` does not follow an error
            follow(rest, self.session, slow, queue=False, api_visibility="private", show_progress="hidden")

    def connect_finders(self) -> None:
        for button, find, settings in self.finders:

            def work(session: Session | None, progress=PROGRESS, *values, find=find, label=button.value) -> list:
                def change(session: Session) -> None:
                    find(session, *values, report=self.demo.reporter(session, progress, label))

                return self.demo.act(session, change)

            self.connect_slow(button.click, work, settings, self.answers)
            if isinstance(settings[0], gr.Textbox):
                self.connect_slow(settings[0].submit, work, settings, self.answers)
        self.stop.click(lambda session: session.stopping.set(), self.session, queue=False, api_visibility="private")

    def connect_downloads(self) -> None:
        for kind, button in self.saves.items():

            def work(session: Session | None, progress=PROGRESS, *, kind=kind) -> dict:
                return self.demo.save(session, kind, progress)

            self.connect_slow(button.click, work, [], self.file)


def heading(text: str) -> None:
    gr.HTML(f"<h2>{text}</h2>", apply_default_css=False)


def hint(text: str) -> None:
    gr.HTML(f'<p class="hint">{text}</p>', apply_default_css=False, visible=bool(text))


def show_panels(*visible: bool) -> list:
    return [gr.update(visible=one) for one in visible]


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
            _, address, public = blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                ssr_mode=False,  # it needs node
                prevent_thread_lock=True,
                quiet=True,
                **options,
                **limits,
            )
        except OSError:
            place = host if port is None else f"port {port} of {host}"
            raise ValueError(f"{place} cannot be had; choose another --port or --host.") from None
        print(f"The page is at {address} until Ctrl+C.", flush=True)
        print(f"Its public link is {public}." if public else "With --share it has a public link, too.", flush=True)
        blocks.block_thread()
