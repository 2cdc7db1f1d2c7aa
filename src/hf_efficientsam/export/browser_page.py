"""A checkpoint -> a folder for any static host: the page in spaces/browser, and what it runs in a visitor's browser.

index.html, style.css, *.js         the page
README.md                           with the front matter of a static Space of the Hub
ort/                                onnxruntime-web
model/encoder.onnx, decoder.onnx    of `export_layout`, layout "transformers.js", weights stored in half precision
model/model.json                    what the page must know: the model's name, prompts and preprocessing, and the
                                    bytes of each large file, for the progress that is shown
examples/                           photographs
"""

import hashlib
import io
import json
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import onnx

from hf_efficientsam.inference.image_files import write_files
from hf_efficientsam.inference.onnx_predictor import METADATA_KEY
from hf_efficientsam.inference.project_files import project_files

from .onnx_layouts import LAYOUTS, export_layout
from .quantize import store_float16

PAGE = project_files("spaces") / "browser"
EXAMPLES = Path(__file__).parents[1] / "demo" / "examples"
MODEL = dict(zip(("model/encoder.onnx", "model/decoder.onnx"), LAYOUTS["transformers.js"], strict=True))

RUNTIME_URL = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"
RUNTIME = {  # its files that the page loads, and their SHA-256; the first three without WebGPU, the others with it
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}


def is_runtime_file(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == RUNTIME[name]


def fetch_runtime(folder: Path) -> dict[str, bytes]:
    """
    The files of `RUNTIME` by name: those in `folder` if all are there, else from npm's registry, 33 MB.

    Raises:
        ValueError: the registry is not in reach, or sends other files.
    """
    present = {name: (folder / name).read_bytes() for name in RUNTIME if (folder / name).is_file()}
    if present.keys() == RUNTIME.keys() and all(is_runtime_file(*one) for one in present.items()):
        return present
    try:
        with urllib.request.urlopen(RUNTIME_URL, timeout=60) as answer:
            content = answer.read()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {name: archive.extractfile(f"package/dist/{name}").read() for name in RUNTIME}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise ValueError(f"onnxruntime-web could not be fetched from {RUNTIME_URL}: {error}") from None
    if wrong := [name for name, content in files.items() if not is_runtime_file(name, content)]:
        raise ValueError(f"{RUNTIME_URL} holds another {wrong[0]} than expected; nothing was written.")
    return files


def export_browser(name: str, output: Path) -> dict[str, int]:
    """
    Writes the folder that this module describes. onnxruntime-web is not fetched again if it is there already.

    Args:
        name: directory or Hub name of a checkpoint, or "bundled".
        output: folder, which is created.

    Returns:
        path of each file in it -> its number of bytes.

    Raises:
        ValueError: as `export_layout`; or onnxruntime-web cannot be fetched.
    """
    files = {f"ort/{file}": content for file, content in fetch_runtime(output / "ort").items()}
    with tempfile.TemporaryDirectory() as temporary:
        export_layout("transformers.js", name, Path(temporary))
        for file, part in MODEL.items():
            graph = onnx.load(Path(temporary, part.file))
            files[file] = store_float16(graph).SerializeToString()
    (description,) = (one.value for one in graph.metadata_props if one.key == METADATA_KEY)
    sizes = {file: len(content) for file, content in files.items() if file.endswith((".onnx", ".wasm"))}
    files["model/model.json"] = json.dumps({**json.loads(description), "bytes": sizes}, indent=2).encode()
    files |= {f"examples/{path.name}": path.read_bytes() for path in EXAMPLES.iterdir()}
    files |= {path.name: path.read_bytes() for path in PAGE.iterdir() if path.is_file()}
    write_files({output / file: content for file, content in files.items()})
    return {file: len(content) for file, content in files.items()}


__all__ = ["export_browser"]
