"""The command: whatever files and options it gets, it succeeds or says in a sentence what is wrong."""

import io
import json
import math
import shutil

import pytest
from fuzz import ANYTHING, KINDS, NUMBERS, examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import logging as transformers_logging
from typer.testing import CliRunner

from hf_efficientsam.cli.app import app


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
    if result.exit_code:
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
