import io
import json
import os
import runpy
import tarfile
from pathlib import Path

import pytest

# No test may reach a network, nor may a process that it starts.
OFFLINE = Path(__file__).parent / "offline"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
runpy.run_path(str(OFFLINE / "sitecustomize.py"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, data and teacher weights that lies beside the checkout; absent elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (golden numbers, images and weights) beside the checkout")
    return folder


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """A json of 5 images with 1 to 5 objects each: bright rectangles and discs on a dark ground."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in range(5):
        width, height = 60 + 8 * i, 80 - 6 * i
        image = Image.new("RGB", (width, height), (20, 10 * i, 40))
        draw = ImageDraw.Draw(image)
        for n in range(i + 1):
            left, top = 2 + 9 * n, 3 + 7 * n
            right, bottom = left + 12 + i, top + 20
            draw.rectangle((left, top, right - 1, bottom - 1), fill=(250 - 30 * n, 200, 60 * n))
            polygon = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "segmentation": [polygon], "iscrowd": 0, "category_id": 1}
            )
        image.save(folder / "images" / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": width, "height": height})
    (folder / "masks.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture(scope="session")
def shards(coco, tmp_path_factory) -> list[Path]:
    """The images of `coco` as two SA-1B shards."""
    from hf_efficientsam.training.data.coco import CocoMasks

    folder, dataset = tmp_path_factory.mktemp("shards"), CocoMasks(coco / "masks.json")
    for shard in range(2):
        with tarfile.open(folder / f"sa_{shard}.tar", "w") as tar:
            for index in range(shard, len(dataset), 2):
                record, sample = dataset.records[index], dataset[index]
                annotations = [
                    {"id": number, "segmentation": rle | {"counts": rle["counts"].decode()}}
                    for number, rle in zip(sample.annotation_ids, sample.rles, strict=True)
                ]
                image = {"image_id": record["id"], "width": record["width"], "height": record["height"]}
                text = json.dumps({"image": image, "annotations": annotations}).encode()
                for ending, content in (("jpg", (coco / "images" / f"{index}.jpg").read_bytes()), ("json", text)):
                    info = tarfile.TarInfo(f"sa_{index}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [folder / "sa_0.tar", folder / "sa_1.tar"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A checkpoint of a tiny model that takes every kind of prompt, in half precision as the bundled one."""
    import tiny

    model = tiny.one_layer_model(**tiny.EVERY_PROMPT).half()
    return tiny.save(tmp_path_factory.mktemp("model"), model, tiny.processor())


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model, tmp_path_factory) -> Path:
    """The folder of `tiny_model`, exported to ONNX by the first of several test processes that needs it."""
    from filelock import FileLock

    from hf_efficientsam.export.onnx_export import export_onnx

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_onnx"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            export_onnx(str(tiny_model), folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """As in the processes that tests start, so that sums are rounded alike."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_configure(config):
    """Of several test processes each takes its share of the processor's cores, with the processes that it starts."""
    if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        import torch

        threads = max(1, torch.get_num_threads() // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items):
    """Of several test processes none is left with a long file at the end: files that have slow tests come first."""
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish(session):
    """Where EFFICIENTSAM_NO_SKIP is set (in CI, which has ../shared) a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several test processes; the first one counts for all
        return
    if os.environ.get("EFFICIENTSAM_NO_SKIP") and reporter.stats.get("skipped"):
        reporter.write_line("EFFICIENTSAM_NO_SKIP is set, and tests were skipped.", red=True)
        session.exitstatus = 1
