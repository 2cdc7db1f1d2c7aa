"""A wheel of the installed package, for Hub repositories: until the package is on PyPI, they bring it along."""

import base64
import hashlib
import zipfile
from importlib import metadata
from pathlib import Path

from hf_efficientsam import __version__

PACKAGE = Path(__file__).resolve().parents[1]
WHEEL_NAME = f"hf_efficientsam-{__version__}-py3-none-any.whl"
TAGS = "Wheel-Version: 1.0\nGenerator: hf_efficientsam\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel(folder: Path) -> Path:
    """
    Writes the wheel of the package that runs here, installed or in a checkout. The bundled checkpoint's weights are
    left out, because the repository has weights of its own. The same files make the same bytes.

    Raises:
        ValueError: if the package is not installed, so that nobody knows what it needs.
    """
    files = {
        path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".safetensors"
    }
    info = f"hf_efficientsam-{__version__}.dist-info"
    files |= {f"{info}/{name}": content for name, content in installed_metadata().items()}
    files[f"{info}/WHEEL"] = TAGS.encode()
    record = "".join(f"{name},sha256={digest(content)},{len(content)}\n" for name, content in sorted(files.items()))
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(folder / WHEEL_NAME, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in sorted(files.items()):
            wheel.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return folder / WHEEL_NAME


def installed_metadata() -> dict[str, bytes]:
    """What an installer would need to know: requirements, commands, licences, by their path in the `.dist-info`."""
    try:
        distribution = metadata.distribution("hf-efficientsam")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "the package is not installed, so its wheel cannot be made; install it with pip install -e ."
        ) from None
    if distribution.version != __version__:
        raise ValueError(
            f"version {distribution.version} of the package is installed, but {__version__} runs; install it again."
        )
    found = {
        Path(*path.parts[1:]).as_posix(): path
        for path in distribution.files or []
        if path.parts[0].endswith(".dist-info")
    }
    wanted = {name for name in found if name in ("METADATA", "entry_points.txt") or name.startswith("licenses/")}
    return {name: found[name].read_binary() for name in sorted(wanted)}


def digest(content: bytes) -> str:
    """As RECORD has it: base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


__all__ = ["WHEEL_NAME", "build_wheel"]
