"""A checkpoint -> a Hub repository that needs nothing but transformers, and a Space: what `efficientsam publish` does.

All is made in a folder, tried from there in a process without this package, and only then uploaded. The same
checkpoint and versions give the same bytes. Wrong input is a ValueError of one sentence.
"""

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, SpaceCard, constants, eval_result_entries_to_yaml, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from hf_efficientsam import __version__
from hf_efficientsam.export.metrics_report import is_of_another, metrics_as_entries, read_metrics
from hf_efficientsam.export.model_card import GENERATED, Provenance, complete_card, model_card
from hf_efficientsam.export.package_wheel import WHEEL_NAME, build_wheel
from hf_efficientsam.export.standalone import verify_standalone
from hf_efficientsam.inference.image_files import check_folder
from hf_efficientsam.inference.loading import (
    checkpoint_fingerprint,
    find_checkpoint,
    load_head,
    load_model,
    stored_dtype,
)
from hf_efficientsam.inference.project_files import project_files
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

logger = logging.getLogger(__name__)

SPACES = project_files("spaces")
SPACE_FILES = ("app.py", "README.md", "requirements.txt")
MODEL_OF_THE_SPACE = 'os.environ.get("EFFICIENTSAM_MODEL"'  # in app.py
# Of a checkpoint, beside weights, configurations and code.
CARRIED = ("README.md", "LICENSE*", "metrics.json", "saliency/metrics.json", "*.png", "*.jpg")

# Folders of a repository, as its card explains them.
PARTS = {
    "saliency": "`saliency/`: a head for what stands out: `efficientsam salient photo.jpg --model {name}`.",
    "onnx": "`onnx/`: encoder and decoder in ONNX, for `EfficientSamOnnxPredictor`, which needs no torch.",
}


@dataclass(frozen=True)
class Repository:
    """
    What becomes one repository of the Hub.

    Attributes:
        name: `"org/name"`.
        kind: `"model"` or `"space"`.
        folder: its files.
    """

    name: str
    kind: str
    folder: Path

    def files(self) -> dict[str, int]:
        """Path, relative to the folder and sorted -> size in bytes."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}


# ------------------------------------------------------------------------------------------------ checks before


def check_repository_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        name_is_valid = False
    else:
        name_is_valid = name.count("/") == 1
    if not name_is_valid:
        raise ValueError(
            f"{name!r} is no name of a repository; it must be org/name, of letters, digits, '-', '_' and '.'."
        )


def check_output(output: Path, directory: Path) -> None:
    if output.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{output} lies in the checkpoint {directory}; choose another folder.")
    check_folder(output)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder.")


def check_space_files() -> None:
    if missing := [SPACES / file for file in SPACE_FILES if not (SPACES / file).is_file()]:
        raise ValueError(
            f"the Space's files are not installed with the package ({missing[0]} is missing); run this from a "
            "checkout of the project that was installed with `pip install -e .`, or publish without a Space."
        )


def check_hub_in_reach() -> None:
    if constants.HF_HUB_OFFLINE:
        raise ValueError("nothing can be uploaded while HF_HUB_OFFLINE is set; unset it, or leave out --push.")
    if get_token() is None:
        raise ValueError(
            "nothing can be uploaded without a token of the Hub; log in with `hf auth login`, or set HF_TOKEN."
        )


# ------------------------------------------------------------------------------------------------ the folders


def make_model(
    directory: Path,
    name: str,
    folder: Path,
    onnx: bool,
    provenance: Provenance = Provenance(),  # noqa: B008 (it is frozen)
) -> Repository:
    """
    The model repository `name`: weights in the checkpoint's own precision, the code, a wheel of the package, the
    saliency head if there is one, ONNX files if wanted, and a model card: the checkpoint's own with the fields that it
    lacks, or one that states its metrics.json.
    """
    logger.info("Making the repository %s ...", name)
    repository = Repository(name, "model", folder)
    folder.mkdir(parents=True)
    model, processor = load_model(str(directory), stored_dtype(directory))
    refuse_stale_metrics(directory, model, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if onnx:
        write_onnx(directory, folder / "onnx")
    if (directory / "saliency").is_dir():
        load_head(str(directory / "saliency"), dtype="auto").save_pretrained(folder / "saliency")
        for code in (folder / "saliency").glob("*.py"):
            code.replace(folder / code.name)  # where transformers looks for it
    for pattern in CARRIED:
        for source in directory.glob(pattern):
            shutil.copyfile(source, folder / source.relative_to(directory))
    # Where image processors have their configuration by themselves, for programs that know no processor_config.json.
    processor.image_processor.save_pretrained(folder)
    build_wheel(folder)
    card = write_card(model, name, folder, provenance)
    if provenance.evaluated_on:
        entries = metrics_as_entries(read_metrics(str(folder)) or "", provenance.evaluated_on)
        if not entries:
            raise ValueError(
                "--evaluated-on names what metrics.json was measured on, but the checkpoint has no metrics.json of "
                "training/evaluate_masks.py; measure it, or leave the option out."
            )
        (folder / ".eval_results").mkdir()
        text = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / ".eval_results" / "masks.yaml").write_text(text)
    if not any(folder.glob("LICENSE*")):  # ours is of the code; the card may say something else of the weights
        name = "LICENSE" if card.data.license == "apache-2.0" else "LICENSE-CODE"
        (folder / name).write_text(metadata.distribution("hf-efficientsam").read_text("licenses/LICENSE"))
    return repository


def refuse_stale_metrics(directory: Path, model: EfficientSamModel, processor: EfficientSamProcessor) -> None:
    """Raises a ValueError if the `metrics.json` of a checkpoint says that it is of another."""
    metrics, in_float32 = read_metrics(str(directory)), copy.deepcopy(model).float()  # as it was measured
    if metrics and is_of_another(metrics, checkpoint_fingerprint(in_float32, processor.image_processor)):
        raise ValueError(
            f"{directory / 'metrics.json'} is of another checkpoint; measure this one (efficientsam evaluate masks) "
            "or remove the file."
        )


def write_card(model: EfficientSamModel, name: str, folder: Path, provenance: Provenance) -> ModelCard:
    """The card of the repository in `folder`, whose README.md is the checkpoint's if it has one."""
    metrics, readme = read_metrics(str(folder)), folder / "README.md"
    card = load_card(readme) if readme.exists() else None
    if card is not None and GENERATED not in card.text:
        card = complete_card(card, name, metrics, provenance)
    else:
        if card is not None:
            provenance = provenance.or_else(card.data)
        card = model_card(model, name, [], metrics, provenance)
        parts = [f"- {text.format(name=name)}" for part, text in PARTS.items() if (folder / part).is_dir()]
        card.text += "\n".join(["\n## Also in this repository\n", *parts, ""]) if parts else ""
    card.save(readme)
    return card


def load_card(readme: Path) -> ModelCard:
    """The Hub refuses a card whose front matter is no YAML, after the upload has begun."""
    try:
        return ModelCard.load(readme)
    except Exception as error:  # of YAML, of the text's encoding, or of the fields
        reason = " ".join(str(error).split())
        raise ValueError(f"the front matter of the checkpoint's {readme.name} cannot be read: {reason}") from None


def write_onnx(directory: Path, folder: Path) -> None:
    try:
        from .onnx_export import export_onnx
    except ImportError as error:
        raise ValueError(f"--onnx needs {error.name}; install hf-efficientsam[onnx].") from None
    export_onnx(str(directory), folder)


def make_space(model: str, name: str, folder: Path) -> Repository:
    """The Space `name`: the web demo on the model repository `model`."""
    shutil.copytree(SPACES, folder, ignore=shutil.ignore_patterns("__pycache__", "browser"))
    app = (folder / "app.py").read_text()
    before, found, after = app.partition(MODEL_OF_THE_SPACE)
    if not found:
        raise ValueError(
            f"{SPACES / 'app.py'} does not read {MODEL_OF_THE_SPACE}...), where the model's name belongs."
        )
    (folder / "app.py").write_text(f'{before}{found}, "{model}"{after}')
    requirements = (folder / "requirements.txt").read_text()
    wheel = f"https://huggingface.co/{model}/resolve/main/{WHEEL_NAME}"
    # While a Space is built it has requirements.txt alone, so the wheel is named by its address.
    (folder / "requirements.txt").write_text(
        requirements.replace("hf-efficientsam[demo]", f"hf-efficientsam[demo] @ {wheel}")
    )
    card = SpaceCard.load(folder / "README.md")
    card.data.title = name.split("/")[-1]
    card.data.models = [model]
    card.save(folder / "README.md")
    return Repository(name, "space", folder)


# ------------------------------------------------------------------------------------------------ the whole


@contextmanager
def made_repositories(
    directory: Path,
    name: str,
    space: str | None = None,
    onnx: bool = False,
    output: Path | None = None,
    provenance: Provenance = Provenance(),  # noqa: B008 (it is frozen)
) -> Iterator[list[Repository]]:
    """
    What is to be uploaded, made and proved; it is gone afterwards unless there is an `output`.

    Args:
        directory: of a checkpoint.
        name: `"org/name"` of the model repository.
        space: name of the Space, if there is to be one.
        onnx: also export the model into `onnx/`.
        provenance: what the model card is to say of the model's making.
        output: an empty or new folder, where `model` and `space` appear once all is right.

    Raises:
        ValueError: a name is none, the checkpoint cannot be loaded, or its repository does not work by itself.
    """
    for one in (name, space, provenance.base_model, *provenance.datasets, provenance.evaluated_on):
        if one is not None:
            check_repository_name(one)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory.")
    find_checkpoint(str(directory))
    if space is not None:
        check_space_files()
    if output is not None:
        check_output(output, directory)
        output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output and output.parent, prefix=".efficientsam.") as temporary:
        folder = Path(temporary, "made")
        repositories = [make_model(directory, name, folder / "model", onnx, provenance)]
        if space is not None:
            repositories.append(make_space(name, space, folder / "space"))
        verify_standalone(directory, name, repositories[0].folder)
        if output is not None:
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
            repositories = [replace(one, folder=output / one.folder.name) for one in repositories]
        yield repositories


# ------------------------------------------------------------------------------------------------ upload


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the Hub answers about the repository `name` into a ValueError of one sentence."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(
                f"the Hub does not let this token write to {name}; log in with `hf auth login`, by a token that may "
                "write there."
            ) from None
        raise ValueError(f"the Hub refused {name}: {' '.join(str(error).split())}") from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} could not be uploaded: {reason}") from None


def check_model_is_public(name: str) -> None:
    """
    For a Space, which is built without a token: it could not install the package from a private repository.

    Raises:
        ValueError: if the repository `name` is private, or the Hub is not in reach.
    """
    with hub_errors(name):
        is_private = HfApi().repo_exists(name) and HfApi().model_info(name).private
    if is_private:
        raise ValueError(
            f"{name} is private on the Hub, so a Space could not install the package from it; make it public, or "
            "leave out the Space."
        )


def upload(repository: Repository, private: bool) -> str:
    """
    Uploads a repository in one commit. Files of the same name are replaced, others stay.

    Args:
        private: only its owners may see it, if it is new.

    Returns:
        its address.

    Raises:
        ValueError: if the Hub is not in reach or refuses.
    """
    logger.info("Uploading %s ...", repository.name)
    api, space_sdk = HfApi(), "gradio" if repository.kind == "space" else None
    options = {"repo_id": repository.name, "repo_type": repository.kind}
    with hub_errors(repository.name):
        url = api.create_repo(**options, space_sdk=space_sdk, private=private or None, exist_ok=True)
        message = f"Published by hf_efficientsam {__version__}"
        api.upload_folder(**options, folder_path=repository.folder, commit_message=message)
    return str(url)
