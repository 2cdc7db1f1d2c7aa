import os
import pickle
import tarfile
import warnings
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pytest
from tars import write_shard
from torch.utils.data import DataLoader

from hf_efficientsam.training.data import shards as shards_module
from hf_efficientsam.training.data.shards import REACH, Shards, Streamed


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def one_pass(monkeypatch):
    monkeypatch.setattr(shards_module, "count", lambda: [0])


class Numbers(Shards):
    """Records of one text with a number, 100 times its key; `decoded` lists the keys that were asked for."""

    needs = ((".txt", ".text"),)

    def __init__(self, shards):
        super().__init__(shards)
        self.decoded = []

    def decode(self, record):
        self.decoded.append(record["key"])
        ((name, content),) = record["members"]
        if not content.isdigit():
            raise ValueError(f"{name} in {record['shard']} is no number.")
        return int(content)


class Keys(Numbers):
    """All readable."""

    def decode(self, record):
        return 100 * int(record["key"])


class Bytes(Numbers):
    def decode(self, record):
        ((_, content),) = record["members"]
        return content


class Pairs(Numbers):
    needs = ((".txt",), (".json",))

    def decode(self, record):
        return tuple(content for _, content in record["members"])


class Items(Streamed):
    def item(self, key, decoded):
        return {"key": key, "number": decoded, "epoch": self.epoch.item()}


def write(folder, shards, records, broken=(), kind=Numbers):
    """`records` in all, named by their number, dealt to shards in turns."""
    for shard in range(shards):
        numbers = range(shard, records, shards)
        members = {f"{k}.txt": b"broken" if k in broken else b"%d" % (100 * k) for k in numbers}
        write_shard(folder / f"{shard:02}.tar", members)
    return kind([f"{folder}/{{00..{shards - 1:02}}}.tar"])


def keys(stream, number):
    return [key for key, _ in islice(stream, number)]


# Reading


def test_patterns_of_shards(tmp_path):
    names = [f"{part}-{k:03}.tar" for part in (1, 2) for k in (8, 9, 10)]
    for name in names:
        write_shard(tmp_path / name, {})
    source = Numbers([f"{tmp_path}/{{1..2}}-{{008..010}}.tar"])
    assert source.shards == [f"{tmp_path}/{name}" for name in names]
    assert source.fingerprint() == Numbers(source.shards).fingerprint() != Numbers(source.shards[:2]).fingerprint()
    assert pickle.loads(pickle.dumps(source)).records.num_shards == 6
    url = "https://example.org/{0..1}.tar"
    assert Numbers([url]).shards == ["https://example.org/0.tar", "https://example.org/1.tar"], "not looked for yet"
    with pytest.raises(ValueError, match=r"There is no shard .*1-011\.tar"):
        Numbers([f"{tmp_path}/1-{{010..012}}.tar"])
    with pytest.raises(ValueError, match="stands for no shard"):
        Numbers(["{9..1}.tar"])


def test_the_members_that_are_needed_are_read_in_any_order(tmp_path, monkeypatch):
    members = {
        "readme.md": b"of no record",
        "a.b/1.txt": b"one",
        "a.b/1.json": b"{1}",
        "a.b/1.more.txt": b"not the first",
        "../../2.cls": b"not needed",
        "../../2.JSON": b"{2}",
        "../../2.txt": b"two",
        "3.txt": b"",
        "3.json": b"",
        f"{tmp_path}/6.txt": b"absolute",
        f"{tmp_path}/6.json": b"{6}",
        "C:\\7.txt": b"on a drive",
        "C:\\7.json": b"{7}",
        f"{'x' * 5000}.txt": b"a long name",
        f"{'x' * 5000}.json": b"{8}",
    }
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    path = write_shard("a.tar", members)
    with tarfile.open(path, "a") as tar:
        links = [("4.txt", tarfile.SYMTYPE), ("4.json", tarfile.LNKTYPE)]
        others = [("5.txt", tarfile.DIRTYPE), ("5.json", tarfile.CHRTYPE), ("9.txt", tarfile.FIFOTYPE)]
        for name, kind in [*links, *others, ("9.json", tarfile.BLKTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "3.txt"
            tar.addfile(member)
    source = Pairs([path])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = dict(source.read(0))
    assert read == {
        "a.b/1": (b"one", b"{1}"),
        "../../2": (b"two", b"{2}"),
        "3": (b"", b""),
        f"{tmp_path}/6": (b"absolute", b"{6}"),
        "C:\\7": (b"on a drive", b"{7}"),
        "x" * 5000: (b"a long name", b"{8}"),
    }
    files = [file.name for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert files == ["a.tar"], "nothing is unpacked"


def bytes_read() -> int:
    """By this process, as the system counts them."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
@pytest.mark.parametrize("shuffle_buffer", [1, 10])
def test_passed_records_of_a_disk_are_not_read(tmp_path, shuffle_buffer):
    size = 2**20
    shards = [
        write_shard(tmp_path / f"{shard}.tar", {f"{k}.txt": b"%d" % k + bytes(size) for k in range(shard, 60, 2)})
        for shard in range(2)
    ]

    def texts(skip, number):
        source, before = Bytes(shards), bytes_read()
        found = list(islice(source.stream([0], 0, 1, shuffle_buffer, skip), number))
        return found, bytes_read() - before

    few, some = texts(10, 1)[1], texts(50, 1)[1]
    assert some - few < size and size <= some < 4 * size, "however much is passed over, what is read is the same"
    assert texts(50, 2)[0] == texts(0, 52)[0][50:]


def test_a_shard_that_becomes_shorter_while_it_is_read_loses_its_records(tmp_path):
    path = Path(write_shard(tmp_path / "a.tar", {f"{k}.txt": b"x" * 2000 for k in range(3)}))
    source = Bytes([str(path)])
    records = source.read(0)
    assert next(records)[0] == "0"
    os.truncate(path, 4000)  # within the second
    with pytest.warns(UserWarning, match="has become shorter. Skipped"):
        assert list(records) == []


def test_a_record_without_a_member_is_broken(tmp_path):
    members = {"1.txt": b"1", "2.json": b"2", "3.txt": b"3", "3.json": b"3"}
    source = Pairs([write_shard(tmp_path / "a.tar", members)])
    with pytest.warns(UserWarning) as warned:
        assert dict(source.read(0)) == {"3": (b"3", b"3")}
    assert [str(warning.message) for warning in warned] == [
        f"1 in {tmp_path}/a.tar has no .json. Skipped, as 1 so far.",
        f"2 in {tmp_path}/a.tar has no .txt. Skipped, as 2 so far.",
    ]


@pytest.mark.parametrize("member, offset", [("txt", 100), ("txt", 512), ("json", 512), ("md", 512)])
def test_a_torn_shard_is_read_up_to_the_tear(tmp_path, member, offset):
    """Within a header of 512 bytes, or within the content behind it."""
    members = {f"{k}.{suffix}": b"%d" % k for k in range(4) for suffix in ("txt", "json", "md")}
    torn = write_shard(tmp_path / "torn.tar", members)
    whole = write_shard(tmp_path / "whole.tar", {"7.txt": b"7", "7.json": b"7"})
    content = (tmp_path / "torn.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(content[: content.index(b"3.%s" % member.encode()) + offset])
    source = Pairs([torn, whole])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        read = [key for key, _ in source.read(0)]
        assert read == ["0", "1", "2", "3"][: 4 if member == "md" else 3], "a record with all it needs is whole"
        assert set(keys(source.stream([0]), 10)) == {*read, "7"}
    assert all("torn.tar is broken" in str(warning.message) for warning in warned), "what the tear took is no record"
    assert bool(warned) == (offset == 512), "tarfile takes half a header for the end"


def test_shards_that_cannot_be_opened_are_left_out(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "empty.tar").write_bytes(b"")
    fsspec.filesystem("memory").pipe("/1.tar", Path(write_shard(tmp_path / "1.tar", {"1.txt": b"100"})).read_bytes())
    bad = ["memory://absent.tar", f"{tmp_path}/page.tar", f"{tmp_path}/empty.tar"]
    with pytest.warns(UserWarning) as warned:
        assert keys(Numbers([*bad, "memory://1.tar"]).stream([0]), 3) == ["1"] * 3
    assert {str(warning.message).split(" is broken")[0] for warning in warned} == set(bad)
    with pytest.warns(UserWarning, match="is broken"), pytest.raises(ValueError, match=r"No record of .* could be"):
        next(Numbers(bad).stream([0], skip=5))


def test_a_package_that_is_missing_is_no_fault_of_the_shard(monkeypatch):
    def iter_archive(manager, shard):
        raise ImportError("aiohttp")

    monkeypatch.setattr(shards_module.StreamingDownloadManager, "iter_archive", iter_archive)
    with pytest.raises(ValueError, match=r"org/1\.tar cannot be opened without another package \(aiohttp\)"):
        next(Numbers(["https://example.org/1.tar"]).stream([0]))


# Dividing


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_processes_and_workers_share_a_pass_without_overlap_or_loss(tmp_path, one_pass, shards, processes, workers):
    source = write(tmp_path, shards, 25)
    read, shards_read = [], 0
    for process in range(processes):
        items = Items(source, process_index=process, num_processes=processes, shuffle_buffer=5)
        mine = [int(key) for batch in DataLoader(items, 3, num_workers=workers) for key in batch["key"]]
        assert len(mine) >= 25 // processes - 5
        shards_read += len({number % shards for number in mine})
        read += mine
    assert sorted(read) == list(range(25))
    assert shards_read == shards or shards < processes, "each shard is read by one process if there are enough"


def test_fewer_records_than_processes(tmp_path):
    source = write(tmp_path, 1, 1)
    for process in range(3):
        assert keys(source.stream([0], process, 3), 3) == ["0"] * 3


def test_order(tmp_path):
    source = write(tmp_path, 3, 30)

    def read(*seeds):
        return keys(source.stream(seeds, shuffle_buffer=10), 90)

    first, passes = read(0, 0), set()
    assert first == read(0, 0)
    assert len({tuple(order) for order in (first, read(1, 0), read(0, 1))}) == 3
    for start in (0, 30, 60):
        passes.add(tuple(first[start : start + 30]))
        assert sorted(map(int, first[start : start + 30])) == list(range(30))
    assert len(passes) == 3 and tuple(map(str, range(30))) not in passes


def test_epoch_and_skip_reach_persistent_workers(tmp_path):
    items = Items(write(tmp_path, 1, 8), shuffle_buffer=8)
    loader = DataLoader(items, 2, num_workers=1, persistent_workers=True)

    def batches(epoch, skip=0):
        items.set_epoch(epoch)
        if skip:
            assert items.fast_forward(skip, 2, 1) == 0
        read = list(islice(loader, 4))
        assert all(batch["epoch"].tolist() == [epoch] * 2 for batch in read)
        return [batch["key"] for batch in read]

    first, second, resumed, third = batches(0), batches(1), batches(1, skip=2), batches(2)
    assert resumed[:2] == second[2:], "what was skipped"
    assert len({str(sorted(keys)) for keys in (first, second, third)}) == 3
    for epoch in (first, second, third):
        assert sorted(key for batch in epoch for key in batch) == list("01234567"), "nothing was"


# Broken records and going on


def with_replacements(order, broken, number):
    """What a stream must begin with where `order` is what is in the shards."""
    result = []
    for i, key in enumerate(order[:number]):
        before = [k for k in reversed(order[max(0, i - REACH) : i]) if k not in broken]
        after = [k for k in order[i:] if k not in broken]
        result.append(key if key not in broken else before[0] if before else after[0])
    return result


BROKEN = {
    "a few": {1, 2, 9, 17},
    "most": set(range(24)) - {3, 4, 11},
    "runs longer than the reach": set(range(48)) - {5, 30},
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:.* Replaced")
def test_a_broken_record_is_replaced_wherever_one_resumes(tmp_path, kind):
    broken = {str(number) for number in BROKEN[kind]}
    records = 48 if kind.startswith("runs") else 24
    source = write(tmp_path, 2, records, BROKEN[kind])
    raw = keys(Keys(source.shards).stream([0], shuffle_buffer=6), 8 * records)
    expected = with_replacements(raw, broken, 3 * records)
    assert broken.isdisjoint(expected) and set(expected) == set(raw) - broken
    for skip in range(0, 2 * records, records // 24 * 3):
        source.decoded.clear()
        resumed = list(islice(source.stream([0], shuffle_buffer=6, skip=skip), records))
        assert [key for key, _ in resumed] == expected[skip : skip + records]
        assert all(number == 100 * int(key) for key, number in resumed)
        if raw[skip] not in broken:
            assert source.decoded[0] == raw[skip], "nothing before it was decoded"


@pytest.mark.filterwarnings("ignore:.* Replaced")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("process, processes", [(0, 1), (1, 2), (2, 3)])
def test_fast_forward_equals_drawing_and_dropping(tmp_path, workers, process, processes):
    items = Items(write(tmp_path, 2, 24, {0, 1, 5, 8, 9, 10, 11, 20}), 3, process, processes, shuffle_buffer=4)

    def batches(skip):
        items.set_epoch(7)
        dropped = items.fast_forward(skip, 3, workers) if skip else 0
        assert dropped < max(1, min(workers, 2))
        read = islice(DataLoader(items, 3, num_workers=workers), dropped, dropped + 14 - skip)
        return [batch["key"] for batch in read]

    whole = batches(0)
    assert len({str(batch) for batch in whole}) > 7
    for skip in (1, 4, 7) if workers < 2 else (4, 7):
        assert batches(skip) == whole[skip:]


def test_a_resumed_run_opens_no_shard_of_the_epochs_before_its_own(tmp_path, monkeypatch):
    """Nor those that come later in its own, so what it passes over does not grow with the run."""
    memory, opened = fsspec.filesystem("memory"), []
    for shard in range(30):
        members = {f"{k}.txt": b"%d" % (100 * k) for k in range(5 * shard, 5 * shard + 5)}
        memory.pipe(f"/resumed/{shard}.tar", Path(write_shard(tmp_path / f"{shard}.tar", members)).read_bytes())
    iter_archive = shards_module.StreamingDownloadManager.iter_archive
    monkeypatch.setattr(
        shards_module.StreamingDownloadManager,
        "iter_archive",
        lambda manager, shard: opened.append(shard) or iter_archive(manager, shard),
    )
    items = Items(Numbers(["memory://resumed/{0..29}.tar"]), shuffle_buffer=4)
    for epoch in (0, 30):
        items.set_epoch(epoch)
        items.fast_forward(batches=6, batch_size=2, num_workers=0)
        next(iter(items))
        assert len(opened) <= 10, "which `datasets` reads in turns; 12 records are passed over, of 150"
        opened.clear()


@pytest.mark.filterwarnings("ignore:.* Replaced")
def test_a_record_that_is_broken_is_decoded_once(tmp_path):
    source = write(tmp_path, 1, 40, range(1, 40))
    list(islice(source.stream([0], shuffle_buffer=40), 200))
    assert sum(key != "0" for key in source.decoded) <= 5 * 39


def test_warnings_say_the_count_and_are_few(tmp_path):
    source = write(tmp_path, 1, 260, range(1, 260))
    for stream, fate in [(source.stream([0]), "Replaced by another"), (source.read(0), "Skipped")]:
        with pytest.warns(UserWarning) as warned:
            list(islice(stream, 260))
        counts = [int(str(warning.message).split(f"{fate}, as ")[1].split()[0]) for warning in warned]
        assert counts[:12] == [*range(1, 11), 100, 200] and all(count % 100 == 0 for count in counts[12:])
        assert all(".txt in " in str(warning.message) for warning in warned)


@pytest.mark.filterwarnings("ignore:.* Replaced")
def test_shards_without_a_readable_record(tmp_path):
    for members in ({"1.md": b"text"}, {"1.txt": b"no number"}, {}):
        source = Numbers([write_shard(tmp_path / "a.tar", members)])
        for skip in (0, 3):
            with pytest.raises(ValueError, match=r"No record of .*a\.tar .* could be read"):
                next(source.stream([0], skip=skip))
    # Where others can read on, a process or worker whose part is broken waits for its part of the next pass.
    source = write(tmp_path, 3, 30, range(0, 30, 3))
    for process in range(3):
        assert len(keys(source.stream([0], process, 3), 40)) == 40
