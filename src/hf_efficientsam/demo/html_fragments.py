"""HTML fragments of the page: image, objects, candidate masks and status of a session.

Their classes and attributes are those that stage.js and style.css use.
"""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from hf_efficientsam.inference.drawing import color_of, ink_on

from .session import THUMBNAIL_SIDE, Session

NO_BREAK = "\N{NO-BREAK SPACE}"
SCORE = "How sure the model is, from 0 to 1"


def data_url(image: Image.Image) -> str:
    """An image as a data URL, so that nothing of it is written to disk."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def mask_url(mask: np.ndarray, color: tuple[int, int, int]) -> str:
    """A mask `[h, w]`, bool, as a data URL of a picture that is `color` inside and transparent outside."""
    picture = Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette([0, 0, 0, *color])
    content = io.BytesIO()
    picture.save(content, "PNG", transparency=bytes([0, 140]), bits=1)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def by_hand(with_mouse: str, with_finger: str) -> str:
    """What is said to those who have a mouse, and to those who touch a screen."""
    return f'<span class="mouse">{with_mouse}</span><span class="touch">{with_finger}</span>'


def stage_html(session: Session, version: int) -> str:
    """The image with its objects; a new `version` clears what the browser has drawn over it."""
    found = ", ".join(one.name for one in session.objects) or "no objects yet"
    x, y = session.scene.corner or ("", "")
    corner = f'<i class="corner on" style="left:{100 * x}%;top:{100 * y}%"></i>' if session.scene.corner else ""
    return (
        f'<div class="stage" style="--ratio:{session.width / session.height:.5f}" tabindex="0" role="application" '
        f'data-version="{version}" data-corner="{x},{y}" aria-label="The picture. Click on an object. With the '
        'keyboard: arrow keys move the cross, Enter clicks, B clicks on the background.">'
        f'<img src="{data_url(session.draw())}" alt="{html.escape(session.file_name)}: {html.escape(found)}">'
        f'<i class="preview"></i>{corner}<i class="band"></i><i class="cross"></i><i class="pulse"></i></div>'
    )


def chips_html(chips: list[str], pressed: int | None, label: str, kind: str = "") -> str:
    """A row of buttons with `chips`, HTML, in them. One is marked as `pressed`; `None`: they are not a choice."""
    states = ["" if pressed is None else f' aria-pressed="{str(i == pressed).lower()}"' for i in range(len(chips))]
    buttons = [f'<button type="button" data-index="{i}"{states[i]}>{chip}</button>' for i, chip in enumerate(chips)]
    return f'<div class="chips {kind}" role="group" aria-label="{label}">{"".join(buttons)}</div>'


def objects_html(session: Session) -> str:
    """A button for each object, and one for the next."""
    chips = []
    for i, one in enumerate(session.objects):
        score = f'<small title="{SCORE}">{one.score:.2f}</small>' if one.candidates else ""
        style = f"background:rgb{color_of(i)};color:{ink_on(color_of(i))}"
        chips.append(f'<b style="{style}">{i + 1}</b>{html.escape(one.name)} {score}')
    if session.scene.current < len(session.objects):
        hint = ""
    elif session.scene.corner:
        hint = f"{by_hand('Click', 'Tap')} on the opposite corner of the box."
    else:
        hint = f"{by_hand('Click', 'Tap')} on the {'next object' if chips else 'object that you want'}, or box it."
    return chips_html(chips, session.scene.current, "Objects") + f'<p class="hint">{hint}</p>'


def candidates_html(session: Session) -> str:
    """A button with a thumbnail for each candidate mask of the current object, if it has several."""
    one, thumbnails = session.current, session.thumbnails()
    if len(thumbnails) < 2:
        return ""
    order = sorted(range(len(thumbnails)), key=lambda i: -one.scores[i])
    chips = [""] * len(thumbnails)
    for i, thumbnail in enumerate(thumbnails):
        rank = order.index(i) + 1
        score = f'<small title="{SCORE}">score {one.scores[i]:.2f}</small>'
        chips[i] = f'<img src="{data_url(thumbnail)}" alt="Candidate {rank}">{score}'
    return "<h2>Which mask is right?</h2>" + chips_html(chips, one.chosen, "Candidate masks", "pictures")


def status_html(session: Session, sentence: str = "", is_error: bool = False) -> str:
    """Size and times, and a sentence about the last input."""
    size = f"{session.width} x {session.height} pixels"
    parts = [size + (" (reduced from {} x {})".format(*session.reduced_from) if session.reduced_from else "")]
    parts += [f"read in {session.encode_seconds:.1f}{NO_BREAK}s"]
    parts += [f"answer in {session.answer_seconds:.2f}{NO_BREAK}s"] if session.answer_seconds is not None else []
    sentence = f" <b{' class=error' * is_error}>{html.escape(sentence)}</b>" if sentence else ""
    return f'<p class="hint" role="status">{" · ".join(parts)}{sentence}</p>'


def problem_html(sentence: str) -> str:
    """What is wrong with an uploaded file."""
    return f'<p class="error" role="alert">{html.escape(sentence)}</p>'


def thumbnail_html(path: Path) -> str:
    """An example image, made small."""
    with Image.open(path) as image:
        image.thumbnail((2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
        return f'<img src="{data_url(image)}" alt="{path.stem}">'
