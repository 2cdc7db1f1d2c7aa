"""Whatever comes in, there is a result of the right form or a clear error.

Hypothesis makes the input, the same in every run. `FUZZ_EXAMPLES=2000 pytest tests/test_robustness.py` takes so many
new ones for each test, to look for more.
"""

import ast
import io
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import logging as transformers_logging
from typer.testing import CliRunner

from hf_efficientsam import (
    EfficientSamImageProcessor,
    EfficientSamOnnxPredictor,
    EfficientSamPredictor,
    EfficientSamProcessor,
)
from hf_efficientsam.cli.app import app
from hf_efficientsam.export.onnx_export import export_onnx
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles

ROOT = Path(__file__).resolve().parents[2]
FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def examples(number: int):
    return settings(
        max_examples=FUZZ_EXAMPLES or number,
        derandomize=not FUZZ_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ------------------------------------------------------------------------------------------------ what may come in

NUMBERS = st.one_of(
    st.integers(-12, 40),
    st.floats(-12, 40, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 1e300, -1e300, 10**400, 2**63, 1e-300, True, -0.0]),
)
NOTHING = st.sampled_from([None, "", "here", b"bytes", {}, {"x": 1}, object(), 1j, range(2)])
DTYPES = "bool uint8 int8 uint16 int16 uint32 int64 uint64 float16 float32 float64 longdouble complex64 U3 object"
MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B"
ANYTHING = st.recursive(st.one_of(NUMBERS, NOTHING), lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@st.composite
def arrays(draw, shapes):
    """NumPy's and torch's."""
    pixels = st.sampled_from([0, 1, 0.5, 100, 255, -1, 256, 65535, 7e4, 1e30, math.nan, math.inf])
    values = np.array(draw(st.lists(pixels, min_size=1, max_size=2)))
    with np.errstate(all="ignore"):
        array = np.resize(values, draw(shapes)).astype(draw(st.sampled_from(DTYPES.split())))
    is_torch = array.dtype.kind in "buifc" and array.dtype != np.longdouble and draw(st.booleans())
    return torch.from_numpy(array) if is_torch else array


@st.composite
def pictures(draw):
    size = draw(st.sampled_from([(1, 1), (1, 9), (300, 2), (17, 23), (99, 99)]))
    return Image.new(draw(st.sampled_from(MODES.split())), size, draw(st.sampled_from([0, 1])))


SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 20]), max_size=5),
    st.sampled_from([(9, 7), (9, 7, 3), (3, 9, 7), (1, 9, 7), (9, 7, 4), (2, 9, 7, 3), (20, 40, 3)]),
)
ONE_IMAGE = st.one_of(arrays(SHAPES), pictures(), NOTHING, NUMBERS)
IMAGES = st.one_of(ONE_IMAGE, st.lists(ONE_IMAGE, max_size=3))


def nested(leaf, depth: int):
    for _ in range(depth):
        leaf = st.lists(leaf, max_size=4)
    return leaf


COORDINATE = st.one_of(st.integers(0, 9), NUMBERS)
POINT = st.one_of(st.just([3, 4]), st.lists(COORDINATE, min_size=2, max_size=2))
BOX = st.one_of(st.just([1, 1, 6, 5]), st.lists(COORDINATE, min_size=4, max_size=4), st.none(), st.just([]))
LABEL = st.sampled_from([1, 0, -1, -10])
KINDS = {
    "points": [nested(POINT, 2), nested(POINT, 1), arrays(st.sampled_from([(1, 1, 2), (2, 3, 2)])), ANYTHING],
    "labels": [nested(LABEL, 2), nested(NUMBERS, 2), nested(NUMBERS, 1), arrays(SHAPES), ANYTHING],
    "boxes": [nested(BOX, 1), BOX, arrays(st.sampled_from([(1, 4), (2, 4)])), ANYTHING],
    "masks": [arrays(st.sampled_from([(1, 16, 16), (2, 16, 16), (1, 3, 5), (1, 0, 0)])), ANYTHING],
}
KINDS = {name: st.one_of(kinds) for name, kinds in KINDS.items()}


@st.composite
def prompts(draw):
    """Of one image: points, labels, boxes and masks, some of them."""
    chosen = draw(st.sets(st.sampled_from(list(KINDS)), min_size=1))
    return {name: draw(KINDS[name]) for name in KINDS if name in chosen}


# ------------------------------------------------------------------------------------------------ the processor

PROCESSORS = {
    "square": EfficientSamProcessor(EfficientSamImageProcessor(size=32, max_image_pixels=5000)),
    "aspect kept": EfficientSamProcessor(EfficientSamImageProcessor(size=32, keep_aspect_ratio=True)),
}


@examples(250)
@given(st.sampled_from(list(PROCESSORS)), IMAGES)
def test_any_image(kind, images):
    try:
        inputs = PROCESSORS[kind](images)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    pixels, sizes, inside = (inputs[name] for name in ("pixel_values", "original_sizes", "reshaped_input_sizes"))
    assert pixels.dtype == torch.float32 and pixels.isfinite().all() and len(pixels) == len(sizes) == len(inside)
    assert pixels.shape[1] == 3 and all(side in (16, 32) for side in pixels.shape[2:])
    assert (sizes > 0).all() and (inside > 0).all() and (inside <= torch.tensor(pixels.shape[2:])).all()


@examples(400)
@given(st.lists(prompts(), min_size=1, max_size=2))
def test_any_prompts(images):
    names = {name for image in images for name in image}
    asked = {f"input_{name}": [image.get(name) for image in images] for name in names}
    try:
        inputs = PROCESSORS["square"](original_sizes=[(9, 7), (30, 40)][: len(images)], **asked)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert len({array.shape[:2] for array in inputs.values()}) <= 1
    assert all(len(array) == len(images) and array.isfinite().all() for array in inputs.values())
    assert ("input_points" in inputs) == ("input_labels" in inputs)


# ------------------------------------------------------------------------------------------------ the predictors


@pytest.fixture(scope="module")
def predictors(tiny_model, tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(str(tiny_model), folder)
    return [EfficientSamPredictor.from_pretrained(str(tiny_model)), EfficientSamOnnxPredictor(folder, num_threads=1)]


def outcomes(predictors: list, ask) -> list:
    """What each answers, or the type of its error; a path may lead to no file."""
    found = []
    for predictor in predictors:
        try:
            found.append(ask(predictor))
        except (ValueError, TypeError, FileNotFoundError) as error:
            assert str(error)
            found.append(type(error))
    return found


def refused(ours, theirs) -> bool:
    """Both refuse the same, but for masks of other sizes, which torch alone resizes."""
    assert isinstance(theirs, type) or not isinstance(ours, type), (ours, theirs)
    return isinstance(theirs, type)


@examples(100)
@given(ONE_IMAGE)
def test_predictors_with_any_image(predictors, image):
    for features in outcomes(predictors, lambda one: one.set_image(image) or np.asarray(one.get_image_embedding())):
        assert isinstance(features, type) or np.isfinite(features).all()
    for predictor in predictors:
        assert predictor.is_image_set == (predictor.image is not None)


@examples(150)
@given(prompts(), st.sampled_from([(9, 7), (30, 40)]))
def test_predictors_with_any_prompts(predictors, asked, size):
    for predictor in predictors:
        predictor.set_image(np.full((*size, 3), 90, np.uint8))
    ours, theirs = outcomes(predictors, lambda one: one.segment(**asked))
    if refused(ours, theirs):
        return
    assert ours.masks.shape == theirs.masks.shape == (len(ours), *size) and ours.masks.dtype == theirs.masks.dtype
    assert np.isfinite(ours.scores).all() and np.allclose(ours.scores, theirs.scores, atol=1e-3)
    assert np.isfinite(ours.boxes).all() and ours.boxes.shape == theirs.boxes.shape == (len(ours), 4)


@examples(100)
@given(prompts())
def test_predictors_asked_as_segment_anythings(predictors, asked):
    for predictor in predictors:
        predictor.set_image(np.full((9, 7, 3), 90, np.uint8))
    names = {"points": "point_coords", "labels": "point_labels", "boxes": "box", "masks": "mask_input"}
    # Of the first object, as far as there is one.
    first = {names[kind]: of[0] if isinstance(of, list) and of else of for kind, of in asked.items()}
    ours, theirs = outcomes(predictors, lambda one: one.predict(**first))
    if not refused(ours, theirs):
        assert ours[0].shape == theirs[0].shape == (3, 9, 7) and np.allclose(ours[1], theirs[1], atol=1e-3)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(autouse=True)
def library_settings():
    """The command silences transformers for its process; here the process goes on."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def run(*arguments):
    """An outcome that is allowed, whatever the arguments."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    said = result.stderr
    assert result.exit_code in (0, 2) and isinstance(result.exception, SystemExit | None), (said, result.exception)
    if result.exit_code and said.startswith("Usage: "):  # what typer itself finds wrong
        assert "\nError: " in said
    elif result.exit_code:
        assert said.startswith("efficientsam: ") and said.count("\n") == 1, said
    return result


@st.composite
def contents(draw):
    """The bytes of an image file, most often damaged."""
    kind = draw(st.sampled_from(["png", "jpeg", "webp", "gif", "bmp", "tiff"]))
    buffer = io.BytesIO()
    modes = ["L", "RGB", "1", "LA", "P", "RGBA", "I;16"] if kind in ("png", "tiff") else ["L", "RGB"]
    mode = draw(st.sampled_from(modes))
    Image.new(mode, draw(st.sampled_from([(20, 12), (1, 1), (1, 50)]))).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    how = draw(st.sampled_from(["whole", "cut", "changed", "random", "begun"]))
    if how == "cut":
        del content[draw(st.integers(0, len(content) - 1)) :]
    elif how == "changed":
        for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
            content[place] = draw(st.integers(0, 255))
    elif how == "random":
        return draw(st.binary(max_size=200))
    elif how == "begun":
        return bytes(content[:12]) + draw(st.binary(max_size=60))
    return bytes(content)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
VALUES = st.one_of(
    st.lists(NUMBERS, min_size=1, max_size=5).map(lambda numbers: ",".join(map(str, numbers))),
    st.sampled_from(["1", "0.5", "1e400", "-5", "", "{}", "~", "..", "/", "a/b/c", "/dev/null"]),
    TEXT,
)
FILES = {"--output": ["mask.png", "mask.jpg", "", ".png"], "--overlay": ["overlay.jpg", "overlay.png", "overlay"]}
OPTIONS = {
    "segment": {
        "--point": st.one_of(st.sampled_from(["5,5", "0,0"]), VALUES),
        "--background": st.one_of(st.just("3,4"), VALUES),
        "--box": st.one_of(st.sampled_from(["1,1,15,9", "0,0,99,99"]), VALUES),
        "--separate-points": None,
        "--all-masks": None,
        "--only-listed": None,
    },
    "everything": {
        "--points-per-side": st.one_of(st.sampled_from(["1", "2"]), TEXT, st.sampled_from(["0", "1025", "1" * 400])),
        "--points-per-batch": VALUES,
        "--pred-iou-thresh": VALUES,
        "--stability-score-thresh": VALUES,
        "--box-nms-thresh": VALUES,
        "--crop-n-layers": st.sampled_from(["0", "-1", "1.5", "x", "7", "1" * 400]),
        "--min-mask-region-area": VALUES,
        "--no-overlay": None,
    },
    "salient": {"--threshold": VALUES, "--min-area": VALUES, "--saliency": VALUES},
}


@st.composite
def commands(draw):
    """The name of a command, and its options as text; what it is to write is in a folder `written`."""
    command = draw(st.sampled_from(list(OPTIONS)))
    known = OPTIONS[command] | {"--json": None, "--max-pixels": VALUES}
    options = []
    for name in draw(st.lists(st.sampled_from(list(known)), max_size=4)):
        options += [name] if known[name] is None else [name, draw(known[name])]
    if command == "everything":
        return command, [*options, "--points-per-side", "2", "--output", "written"]
    for name in draw(st.sets(st.sampled_from(list(FILES)))):
        options += [name, "written/" + draw(st.sampled_from(FILES[name]))]
    return command, options


@examples(40)
@given(commands(), contents(), st.sampled_from(["a.png", "a.jpg", "a"]))
def test_any_command(tmp_path_factory, tiny_model, command, content, name):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(command[0], name, *command[1], "--model", tiny_model)
    assert (folder / name).read_bytes() == content
    assert {path.name for path in folder.iterdir()} <= {name, "written"}


ENTRY = st.fixed_dictionaries(
    {"image": st.one_of(st.just("a.png"), st.text(max_size=8), ANYTHING)},
    optional={name: KINDS[name] for name in ("points", "labels", "boxes")} | {"x": ANYTHING},
)
LINES = st.lists(st.one_of(ENTRY, ENTRY, st.binary(max_size=20), ANYTHING), min_size=1, max_size=2)


def as_line(value) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=str).encode()


@examples(60)
@given(LINES)
def test_any_prompts_file(tmp_path_factory, tiny_model, lines):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "images").mkdir()
    Image.new("RGB", (20, 12), (200, 10, 10)).save(folder / "images" / "a.png")
    (folder / "prompts.jsonl").write_bytes(b"\n".join(map(as_line, lines)))
    options = ["--prompts", folder / "prompts.jsonl", "--output", folder / "written", "--model", tiny_model]
    run("segment", folder / "images", *options)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written <= {"images/a.png", "prompts.jsonl", "written/a.json", "written/a.png", "written/a_1.png"} | {
        f"written/a_{i}.png" for i in range(2, 9)
    }


OUTSIDE = ["{folder}/secret.png", "../secret.png", "a/../../secret.png", "images/../../secret.png", "..", "/", "."]
NOWHERE = [
    "C:\\secret.png",
    "C:secret.png",
    "\\\\server\\secret.png",
    "..\\secret.png",
    "a.png\0",
    "x" * 5000,
    "\ud800",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE + NOWHERE)
def test_prompts_files_stay_in_the_folder(tmp_path, tiny_model, name):
    for file in ("images/a.png", "secret.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 12)).save(tmp_path / file)
    line = {"image": name.format(folder=tmp_path), "points": [[3, 4]]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line))
    before = sorted(tmp_path.rglob("*"))
    options = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "images/out", "--model", tiny_model]
    assert run("segment", tmp_path / "images", "--only-listed", *options).exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ annotations

SEGMENTATION = st.one_of(
    st.lists(st.lists(COORDINATE, max_size=8), max_size=2),
    st.fixed_dictionaries({"size": st.just([12, 20]), "counts": st.one_of(st.lists(NUMBERS, max_size=4), st.text())}),
    st.just({"size": [12, 20], "counts": [100, 20, 120]}),
    ANYTHING,
)
ANNOTATION = st.fixed_dictionaries(
    {"image_id": st.one_of(st.just(1), ANYTHING), "segmentation": SEGMENTATION},
    optional={name: ANYTHING for name in ("id", "category_id", "iscrowd")},
)
RECORD = st.builds(
    lambda changes: {"file_name": "a.png", "id": 1, "width": 20, "height": 12} | changes,
    st.dictionaries(
        st.sampled_from(["file_name", "coco_url", "id", "width", "height", "source"]), ANYTHING, max_size=2
    ),
)


@examples(80)
@given(st.lists(st.one_of(RECORD, RECORD, ANYTHING), max_size=2), st.lists(ANNOTATION, max_size=3))
def test_any_annotations(annotations_folder, records, annotations):
    path = annotations_folder / "masks.json"
    path.write_text(json.dumps({"images": records, "annotations": annotations}, default=str))
    try:
        dataset = CocoMasks(path)
        masks = [decode_rles(dataset[i].rles) for i in range(len(dataset))]
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return
    assert all(of_image.shape[1:] == (12, 20) and of_image.any((1, 2)).all() for of_image in masks)


@pytest.fixture(scope="module")
def annotations_folder(tmp_path_factory) -> Path:
    """A folder with images/a.png."""
    folder = tmp_path_factory.mktemp("annotations")
    (folder / "images").mkdir()
    Image.new("RGB", (20, 12), (200, 10, 10)).save(folder / "images" / "a.png")
    return folder


# ------------------------------------------------------------------------------------------------ the checkpoint

CONFIG, PROCESSOR, WEIGHTS = "config.json", "processor_config.json", "model.safetensors"
DEEP = "[" * 100_000
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "../../secret"}})


def changed(text: str, *keys: str, to) -> str:
    """The json of a config with another value at `keys`."""
    config = part = json.loads(text)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    return json.dumps(config)


DAMAGE = {  # file, whole text or keys and value, what must be named
    "a list": (CONFIG, "[1]", "/model"),
    "null": (CONFIG, "null", "/model"),
    "endless": (CONFIG, DEEP, "/model"),
    "a word for a size": (CONFIG, ("vision_config", "image_size", "large"), "/model"),
    "no heads": (CONFIG, ("vision_config", "num_attention_heads", 0), "num_attention_heads"),
    "unknown activation": (CONFIG, ("vision_config", "hidden_act", "none"), "/model"),
    "unknown dtype": (CONFIG, ("dtype", "float1"), "/model"),
    "other shapes": (CONFIG, ("mask_decoder_config", "mlp_dim", 8), "/model"),
    "processor: a list": (PROCESSOR, "[1]", "/model"),
    "processor: null": (PROCESSOR, "null", "/model"),
    "processor: endless": (PROCESSOR, DEEP, "/model"),
    "processor: a number": (PROCESSOR, ("image_processor", 5), "/model"),
    "negative size": (PROCESSOR, ("image_processor", "size", {"height": -5, "width": 64}), "/model"),
    "half a pixel": (PROCESSOR, ("image_processor", "size", {"height": 9.5, "width": 64}), "/model"),
    "divisor of 0": (PROCESSOR, ("image_processor", "size_divisor", 0), "size_divisor"),
    "std of 0": (PROCESSOR, ("image_processor", "image_std", [1, 0, 1]), "image_std"),
    "two means": (PROCESSOR, ("image_processor", "image_mean", [0.5, 0.5]), "image_mean"),
    "a word for a mean": (PROCESSOR, ("image_processor", "image_mean", "mean"), "image_mean"),
    "empty": (WEIGHTS, "", "/model"),
    "no header": (WEIGHTS, "\x10\0\0\0\0\0\0\0{}", "/model"),
    "another folder's": (f"{WEIGHTS}.index.json", INDEX, "/model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(tmp_path, tiny_model, damage):
    name, content, named = DAMAGE[damage]
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    Image.new("RGB", (20, 12)).save(tmp_path / "a.png")
    (tmp_path / "secret").write_bytes(b"words")
    if name.endswith(".index.json"):
        (model / WEIGHTS).rename(model / "part.safetensors")
    if isinstance(content, tuple):
        content = changed((model / name).read_text(), *content[:-1], to=content[-1])
    (model / name).write_text(content)
    result = run("segment", tmp_path / "a.png", "--point", "5,5", "--model", model)
    assert result.exit_code == 2 and named in result.stderr, result.stderr


def test_weights_that_are_no_numbers_are_named(tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / WEIGHTS)
    weights["mask_decoder.mask_tokens.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "model" / WEIGHTS, {"format": "pt"})
    said = run("info", tmp_path / "model").stderr
    assert f"{tmp_path / 'model'} has weights that are no finite numbers, in mask_decoder.mask_tokens.weight" in said


# ------------------------------------------------------------------------------------------------ code in files

RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = [
    path for name in ("src", "training", "benchmarks", "spaces") for path in sorted((ROOT / name).rglob("*.py"))
]


def test_nothing_that_could_run_code_is_loaded():
    """Every torch.load says weights_only=True: older torch, and an environment variable, have another default."""
    wrong, loads = [], 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = any(name.split(".")[0] in RUN_CODE for name in imported)
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                bad |= bool(keywords.get("allow_pickle")) or keywords.get("weights_only", True) is not True
                if ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
                    loads += 1
                    bad |= "weights_only" not in keywords
            if bad:
                wrong.append(f"{path.relative_to(ROOT)}, line {node.lineno}: {ast.unparse(node)[:80]}")
    assert loads and not wrong, wrong
