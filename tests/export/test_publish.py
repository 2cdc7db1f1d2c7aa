import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard, SpaceCard, parse_eval_result_entries
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_efficientsam.cli.app import app
from hf_efficientsam.export import publish
from hf_efficientsam.export.model_card import Provenance, training_card
from hf_efficientsam.export.package_wheel import PACKAGE, WHEEL_NAME, build_wheel
from hf_efficientsam.export.standalone import verify_standalone

REPORT = {
    "model": "tiny",
    "annotations": "/home/someone/data/val/instances.json",
    "images": 3,
    "masks": 7,
    "seed": 0,
    "protocol": "As the paper does.",
    "results": {
        "box": {"confident": {"all": {"miou": 0.65432, "count": 7}, "small": {"miou": 0.5, "count": 2}}},
        "baseline": {"ellipse": {"all": {"miou": 0.25, "count": 7}, "small": {"miou": 0.125, "count": 2}}},
    },
}


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory) -> Path:
    """In half precision, with a saliency head, numbers, and a file of a training that is nobody's business."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    shutil.copytree(tiny_model, folder)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    tiny.saliency_head(**sizes).half().save_pretrained(folder / "saliency")
    for code in folder.rglob("*.py"):
        code.unlink()  # as in the bundled checkpoint; what is published is the package's
    (folder / "metrics.json").write_text(json.dumps(REPORT))
    (folder / "saliency" / "metrics.json").write_text("{}")
    (folder / "optimizer.bin").write_bytes(b"secret")
    return folder


@pytest.fixture
def unproved(monkeypatch):
    """Spares the time of the second process where it has nothing to say."""
    monkeypatch.setattr(publish, "verify_standalone", lambda directory, name, folder: None)


class FakeHub:
    """Keeps what is asked of the Hub, and each upload's files: name -> bytes."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        self.calls, self.files, self.error = [], {}, error
        self.private = set()
        for name in ("create_repo", "upload_folder", "repo_exists", "model_info"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))
        monkeypatch.setattr(publish, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
        monkeypatch.setattr(publish, "get_token", lambda: "hf_token")

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append(("create_repo", repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def repo_exists(self, repo_id):
        return repo_id in self.private

    def model_info(self, repo_id):
        return SimpleNamespace(private=repo_id in self.private)

    def upload_folder(self, repo_id, folder_path, **options):
        self.calls.append(("upload_folder", repo_id, options))
        self.files[repo_id] = read_files(folder_path)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["publish", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments) -> str:
    code, stdout, stderr = call(*arguments)
    *progress, sentence = stderr.splitlines()
    assert code == 2 and stdout == "" and all(line.endswith(" ...") for line in progress), (stdout, stderr)
    return sentence


# ----------------------------------------------------------------------------------------------- what is made


@pytest.mark.slow
def test_published_twice_is_the_same_and_needs_no_package(checkpoint, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "deeper" / "second"
    code, stdout, stderr = call(checkpoint, "someone/tiny", "--output", first)
    assert code == 0, stderr
    assert "left out" in stdout and "optimizer.bin" in stdout
    steps = ["Making the repository someone/tiny ...", "Loading someone/tiny in a process without this package ..."]
    assert [line for line in stderr.splitlines() if line in steps] == steps

    elsewhere = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(checkpoint, elsewhere)
    monkeypatch.chdir(elsewhere.parent)
    monkeypatch.setattr(publish, "verify_standalone", lambda directory, name, folder: None)
    assert call("tiny", "someone/tiny", "--output", second)[0] == 0
    assert read_files(first) == read_files(second)
    assert not any(str(checkpoint.parent).encode() in content for content in read_files(first).values())


def test_repository_has_what_the_checkpoint_has(checkpoint, tmp_path):
    config = checkpoint / "config.json"  # half precision, and to be computed in float32: as the bundled checkpoint
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    folder = publish.make_model(checkpoint, "someone/tiny", tmp_path / "model", onnx=False).folder
    names = set(read_files(folder))
    assert {name for name in names if not name.endswith(".py")} == {
        WHEEL_NAME,
        "LICENSE-CODE",
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "saliency/config.json",
        "saliency/metrics.json",
        "saliency/model.safetensors",
    }
    assert {"modeling_efficientsam.py", "modeling_saliency.py", "processing_efficientsam.py"} < names
    for part in (".", "saliency"):
        ours, theirs = (load_file(one / part / "model.safetensors") for one in (checkpoint, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        # The Fourier frequencies are always in float32.
        assert {theirs[key].dtype for key in ours if "frequencies" not in key} == {torch.float16}
    assert "Apache License" in (folder / "LICENSE-CODE").read_text()  # nothing is known of the weights' terms
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    try:
        folder = publish.make_model(checkpoint, "someone/tiny", tmp_path / "free", onnx=False).folder
    finally:
        (checkpoint / "README.md").unlink()
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_card_states_what_was_measured_and_nothing_else(checkpoint, tmp_path):
    publish.make_model(checkpoint, "someone/tiny", tmp_path / "measured", onnx=False)
    card = ModelCard.load(tmp_path / "measured" / "README.md")
    assert card.data.pipeline_tag == "mask-generation" and '"someone/tiny"' in card.text
    assert "7 masks of 3 images (val/instances.json), seed 0. As the paper does." in card.text
    assert "| mIoU | all | small |\n|---|---|---|\n| box, confident | 0.654 | 0.500 |\n" in card.text
    assert "--model someone/tiny`" in card.text and "`onnx/`" not in card.text
    assert "| baseline, ellipse | 0.250 | 0.125 |" in card.text and "/home" not in card.text

    unmeasured = tmp_path / "unmeasured"
    shutil.copytree(checkpoint, unmeasured)
    (unmeasured / "metrics.json").unlink()
    publish.make_model(unmeasured, "someone/tiny", tmp_path / "model", onnx=False)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "None were recorded" in card.text and "mIoU" not in card.text


def test_hub_knows_the_numbers_and_where_the_model_comes_from(checkpoint, tmp_path, monkeypatch, unproved):
    options = ["--license", "cc-by-4.0", "--base-model", "someone/base", "--evaluated-on", "someone/val"]
    options += ["--dataset", "someone/one", "--dataset", "someone/two", "--output", tmp_path / "out"]
    code, _, stderr = call(checkpoint, "someone/tiny", *options)
    assert code == 0, stderr
    data = ModelCard.load(tmp_path / "out" / "model" / "README.md").data
    assert (data.license, data.base_model, data.datasets) == (
        "cc-by-4.0",
        "someone/base",
        ["someone/one", "someone/two"],
    )
    (result,) = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("someone/val", "mean_iou", 0.6543)
    assert result.metric_name == "mIoU, box, confident" and result.task_type == "mask-generation"
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((tmp_path / "out" / "model" / ".eval_results" / "masks.yaml").read_text())
    )
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/val", "box_confident", 0.6543)
    assert "no name of a repository" in refused(checkpoint, "someone/tiny", "--dataset", "my images")
    unmeasured = tmp_path / "unmeasured"
    shutil.copytree(checkpoint, unmeasured)
    (unmeasured / "metrics.json").write_text(json.dumps(REPORT | {"model_sha256": "0"}))
    assert "metrics.json is of another checkpoint; measure this one" in refused(unmeasured, "someone/tiny")
    (unmeasured / "metrics.json").unlink()
    assert "has no metrics.json" in refused(unmeasured, "someone/tiny", "--evaluated-on", "someone/val")


def test_card_of_a_training_is_written_anew_with_what_it_knew(checkpoint, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(checkpoint, trained)
    provenance = Provenance(license="mit", base_model="someone/base", datasets=["someone/images"])
    training_card("finetune_masks", tiny.model(), provenance).save(trained / "README.md")
    folder = publish.make_model(trained, "someone/tiny", tmp_path / "model", False, Provenance("cc-by-4.0")).folder
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", "someone/base")
    assert card.data.datasets == ["someone/images"] and "OWNER/NAME" not in card.text and "0.654" in card.text


def test_image_processor_alone_is_found_by_its_own_file(checkpoint, tmp_path):
    folder = publish.make_model(checkpoint, "someone/tiny", tmp_path / "model", onnx=False).folder
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "EfficientSamImageProcessor"
    assert stored["size"] == json.loads((folder / "processor_config.json").read_text())["image_processor"]["size"]


def test_wheel_is_the_package_without_weights(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    wheel = build_wheel(first)
    assert wheel.read_bytes() == build_wheel(second).read_bytes()
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    assert not list((tmp_path / "site").rglob("*.safetensors"))
    ours = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    theirs = tmp_path / "site" / "hf_efficientsam"
    assert {path.relative_to(theirs) for path in theirs.rglob("*.py")} == ours
    (installed,) = metadata.distributions(name="hf-efficientsam", path=[str(tmp_path / "site")])
    assert installed.requires == metadata.requires("hf-efficientsam")
    assert [point.name for point in installed.entry_points] == ["efficientsam"]


def test_own_card_and_licence_are_kept(checkpoint, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(checkpoint, own)
    files = {
        "README.md": b"---\nlicense: mit\n---\n![cases](cases.png)\n",
        "LICENSE.txt": b"mine",
        "cases.png": b"picture",
    }
    for name, content in files.items():
        (own / name).write_bytes(content)
    folder = publish.make_model(own, "someone/tiny", tmp_path / "model", onnx=False).folder
    made = read_files(folder)
    card = ModelCard(made.pop("README.md").decode())
    assert "![cases](cases.png)" in card.text and card.data.license == "mit"
    assert card.data.pipeline_tag == "mask-generation" and 'from_pretrained("someone/tiny")' in card.text
    assert card.data.eval_results[0].metric_value == 0.6543
    del files["README.md"]
    assert files.items() <= made.items() and "LICENSE" not in made

    (own / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"front matter of the checkpoint's README.md cannot be read"):
        publish.make_model(own, "someone/tiny", tmp_path / "again", onnx=False)


def test_onnx_is_exported_into_its_folder(checkpoint, tmp_path, monkeypatch):
    onnx_export = pytest.importorskip("hf_efficientsam.export.onnx_export")
    exported = []

    def export_onnx(name, folder):
        exported.append((name, folder))
        folder.mkdir()

    monkeypatch.setattr(onnx_export, "export_onnx", export_onnx)
    publish.make_model(checkpoint, "someone/tiny", tmp_path / "model", onnx=True)
    assert exported == [(str(checkpoint), tmp_path / "model" / "onnx")]
    assert "`onnx/`" in (tmp_path / "model" / "README.md").read_text()


def test_space_shows_the_model(tmp_path):
    publish.check_space_files()
    made = publish.make_space("someone/tiny", "someone/show", tmp_path / "space")
    others = ("__pycache__", "browser")  # a Space of its own
    expected = {path for path in read_files(publish.SPACES) if not set(others) & set(Path(path).parts)}
    assert made.files().keys() == expected
    assert made.files().keys() >= {"README.md", "app.py", "requirements.txt"}
    code = (tmp_path / "space" / "app.py").read_text()
    assert 'os.environ.get("EFFICIENTSAM_MODEL", "someone/tiny")' in code
    compile(code, "app.py", "exec")
    address = f"https://huggingface.co/someone/tiny/resolve/main/{WHEEL_NAME}"
    requirements = (tmp_path / "space" / "requirements.txt").read_text()
    assert f"\nhf-efficientsam[demo] @ {address}\n" in requirements
    data = SpaceCard.load(tmp_path / "space" / "README.md").data.to_dict()
    assert data["sdk"] == "gradio" and data["app_file"] == "app.py"
    assert data["title"] == "show" and data["models"] == ["someone/tiny"]


# ----------------------------------------------------------------------------------------------- the proof


@pytest.mark.slow
def test_other_answers_are_not_uploaded(checkpoint, tmp_path):
    made = publish.make_model(checkpoint, "someone/tiny", tmp_path / "model", onnx=False)
    weights = load_file(made.folder / "saliency" / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, made.folder / "saliency" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="someone/tiny would give other saliency without this package than"):
        verify_standalone(checkpoint, made.name, made.folder)


@pytest.mark.slow
def test_what_does_not_load_alone_is_not_uploaded(checkpoint, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch)
    make_model = publish.make_model

    def forget_a_file(*arguments):
        made = make_model(*arguments)
        (made.folder / "processing_efficientsam.py").write_text("from hf_efficientsam import EfficientSamProcessor\n")
        return made

    monkeypatch.setattr(publish, "make_model", forget_a_file)
    output = tmp_path / "output"
    message = refused(checkpoint, "someone/tiny", "--push", "--output", output)
    assert "someone/tiny would not load without this package, so it is not uploaded: " in message
    assert "hf_efficientsam" in message
    assert not hub.calls and not output.exists() and not list(tmp_path.iterdir())


def test_incomplete_heads_are_refused(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = load_file(broken / "saliency" / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, broken / "saliency" / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's weights, such as classifier.bias" in refused(broken, "someone/tiny")


# ----------------------------------------------------------------------------------------------- upload


def test_nothing_is_uploaded_unless_asked(checkpoint, monkeypatch, unproved, tmp_path):
    hub = FakeHub(monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, stdout, _ = call(checkpoint, "someone/tiny", "--demo")
    assert code == 0 and not hub.calls
    assert "model someone/tiny: " in stdout and "space someone/tiny-demo: " in stdout
    size = (checkpoint / "metrics.json").stat().st_size
    assert f" {size:,} metrics.json\n" in stdout
    assert stdout.splitlines()[-1] == "nothing was uploaded; the same command with --push uploads these files"
    assert not list(tmp_path.iterdir())


def test_private_repositories(checkpoint, monkeypatch, unproved):
    hub = FakeHub(monkeypatch)
    assert "--private is for new repositories" in refused(checkpoint, "someone/tiny", "--private")
    message = "a private Space cannot be built"
    assert message in refused(checkpoint, "someone/tiny", "--push", "--private", "--demo")
    assert message in refused(checkpoint, "someone/tiny", "--push", "--private", "--space", "someone/show")
    assert call(checkpoint, "someone/tiny", "--push", "--private")[0] == 0
    assert hub.calls[0][2]["private"] is True
    hub.private = {"someone/tiny"}  # from then on
    assert "someone/tiny is private on the Hub" in refused(checkpoint, "someone/tiny", "--push", "--demo")
    assert call(checkpoint, "someone/tiny", "--push")[0] == 0


def test_push_makes_one_commit_a_repository(checkpoint, monkeypatch, unproved, tmp_path):
    hub = FakeHub(monkeypatch)
    arguments = (checkpoint, "someone/tiny", "--space", "someone/show", "--output", tmp_path / "kept")
    code, stdout, _ = call(*arguments, "--push")
    assert code == 0 and "uploaded to https://huggingface.co/someone/tiny\n" in stdout
    made = {"private": None, "exist_ok": True}
    message = {"commit_message": f"Published by hf_efficientsam {publish.__version__}"}
    assert hub.calls == [
        ("create_repo", "someone/tiny", {"repo_type": "model", "space_sdk": None, **made}),
        ("upload_folder", "someone/tiny", {"repo_type": "model", **message}),
        ("create_repo", "someone/show", {"repo_type": "space", "space_sdk": "gradio", **made}),
        ("upload_folder", "someone/show", {"repo_type": "space", **message}),
    ]
    assert hub.files == {
        "someone/tiny": read_files(tmp_path / "kept" / "model"),
        "someone/show": read_files(tmp_path / "kept" / "space"),
    }


def answered(status: int) -> HfHubHTTPError:
    request = httpx2.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError("first line\nsecond line", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answered(403), "the Hub does not let this token write to someone/tiny; log in with `hf auth login`"),
        (answered(500), "the Hub refused someone/tiny: first line second line"),
        (httpx2.ConnectError("no route"), "someone/tiny could not be uploaded: no route"),
    ],
)
def test_what_the_hub_says_is_one_sentence(checkpoint, monkeypatch, unproved, error, message):
    FakeHub(monkeypatch, error)
    code, _, stderr = call(checkpoint, "someone/tiny", "--push")
    *steps, said = stderr.splitlines()
    assert code == 2 and said.startswith(f"efficientsam: {message}")
    assert steps == ["Making the repository someone/tiny ...", "Uploading someone/tiny ..."]


def test_push_needs_the_hub_and_a_token(checkpoint, monkeypatch):
    FakeHub(monkeypatch)
    monkeypatch.setattr(publish, "get_token", lambda: None)
    assert "log in with `hf auth login`, or set HF_TOKEN" in refused(checkpoint, "someone/tiny", "--push")
    publish.constants.HF_HUB_OFFLINE = True
    assert "HF_HUB_OFFLINE is set" in refused(checkpoint, "someone/tiny", "--push")


# ----------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../tiny", "a/..", "-a/b", "a b/c", "a/b.git", "", "a/b\n", "/a/b"])
def test_names_that_are_none_are_refused(checkpoint, name):
    assert "is no name of a repository; it must be org/name" in refused("--", checkpoint, name)
    assert "is no name of a repository" in refused("--space", name, "--", checkpoint, "someone/tiny")


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    assert "no such directory" in refused(tmp_path / "absent", "someone/tiny")
    assert "no such directory" in refused(checkpoint / "config.json", "someone/tiny")
    assert "holds no config.json" in refused(tmp_path, "someone/tiny")


def test_output_must_be_new(checkpoint, tmp_path):
    assert "lies in the checkpoint" in refused(checkpoint, "someone/tiny", "--output", checkpoint / "deep" / "er")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in refused(checkpoint, "someone/tiny", "--output", tmp_path / "full")
    assert "is a file" in refused(checkpoint, "someone/tiny", "--output", tmp_path / "full" / "file")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_space_needs_a_checkout(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(publish, "SPACES", tmp_path)
    assert "run this from a checkout of the project" in refused(checkpoint, "someone/tiny", "--demo")
