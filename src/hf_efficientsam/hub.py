"""Where checkpoints live: the bundled one, and Hub repositories."""

from pathlib import Path


def bundled_checkpoint() -> str:
    """
    Directory of the checkpoint that is installed with the package: model and processor, for `from_pretrained`.

    EfficientSAM-Ti at 512 pixels, trained by this project; its README.md says on what and how well it does.
    """
    return str(Path(__file__).parent / "checkpoints" / "efficientsam-ti")
