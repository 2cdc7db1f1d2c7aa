"""Streams of webdataset tar shards: divided among processes and workers, shuffled, endless, and resumable anywhere."""

import hashlib
import os
import re
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, groupby, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import IterableDataset, StreamingDownloadManager
from datasets.distributed import split_dataset_by_node
from torch.utils import data

KEY = re.compile(r"(?s:.*/)?[^.]*")  # a member's path up to the first dot of its name
REACH = 16  # a broken record is replaced by one of so many before it


class Extent(NamedTuple):
    """Where bytes are: in which file, from which on, and how many."""

    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """
        Raises:
            ValueError: if they are not there any more.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                content = file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read any more ({error.strerror}).") from error
        if len(content) < self.size:
            raise ValueError(f"{self.path} has become shorter.")
        return content


class Shards:
    """The records of webdataset tar shards, read from start to end and never unpacked to disk.

    Neighbouring members with the same path up to the first dot of the name are one record; that path is its key. For
    each entry of `needs` the first member with one of its suffixes is read, the others are not; without any such
    member it is no record. A shard that cannot be opened or breaks off is left there, with a warning.

    Subclasses set `needs` and give `decode`.

    Args:
        shards: paths or URLs (whatever `datasets` opens: https, hf, s3, ...); `{000..099}` in them stands for each
            of these numbers.

    Raises:
        ValueError: for a path that is not there or a pattern that stands for nothing.
    """

    needs: tuple[tuple[str, ...], ...]

    def __init__(self, shards: Sequence[str]):
        self.shards = [shard for pattern in shards for shard in _expand(pattern)]
        for shard in self.shards:
            if "://" not in shard and not os.path.isfile(shard):
                raise ValueError(f"There is no shard {shard}; check the paths or the range in braces.")
        # `datasets` shuffles and splits the list of shards, and buffers the records.
        arguments = {"shards": self.shards, "needs": self.needs}
        self.records = IterableDataset.from_generator(_read_shards, gen_kwargs=arguments)

    def decode(self, record: dict) -> Any:
        """What a record holds: `shard`, `key` and `members`, a (name, bytes) for each of `needs`.

        Raises ValueError, naming member and shard, if it is broken.
        """
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Key and decoded content of each record of one shard, in order; broken ones are left out with a warning."""
        return self._readable(_read_shards([self.shards[shard]], self.needs), CountedWarnings("Skipped"))

    def stream(
        self,
        seeds: Sequence[int],
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_buffer: int = 1000,
        skip: int = 0,
    ) -> Iterator[tuple[str, Any]]:
        """Keys and decoded contents without an end; inside a worker of a DataLoader, that worker's part of them.

        In each pass every record goes to one process and one worker. If there are enough shards each process takes
        its share of them, else it reads all and takes every n-th record; workers divide the shards of their process.

        A broken record is replaced, with a warning, by the nearest readable one of the 16 before it, or else by the
        next. So each record takes one place, and what follows `skip` does not depend on having seen what it skips.

        Args:
            seeds: of the order, with the number of the pass; the same on all processes.
            process_index, num_processes: which of how many processes reads.
            shuffle_buffer: how many records each worker mixes; of URLs they are kept in memory, encoded.
            skip: records that are passed over without being decoded, and those of tars on a disk without being read.

        Raises:
            ValueError: if no record of any shard can be read, or the package for a URL is not installed.
        """
        worker = data.get_worker_info()
        if worker is not None and worker.id >= self.parts(process_index, num_processes):
            return
        broken, waiting = CountedWarnings("Replaced by another"), 0
        recent = deque(maxlen=REACH)  # newest first, without those known to be broken
        for pass_number in count():
            readable = False
            for record in self._deal(seeds, pass_number, process_index, num_processes, shuffle_buffer):
                if skip > 0:
                    skip, readable = skip - 1, True
                    recent.appendleft(record)
                    continue
                found = next(self._readable([record], broken), None)
                replacement = None if found else next(self._readable(filter(None, recent)), None)
                recent.appendleft(record if found else None)
                waiting += 1
                if found or replacement:
                    yield from repeat(found or replacement, waiting)
                    readable, waiting = True, 0
            if not readable and not any(self._readable(_read_shards(self.shards, self.needs))):
                raise ValueError(f"No record of {self.shards[0]} ... could be read; check the shards.")

    def parts(self, process_index: int, num_processes: int) -> int:
        """How many shards the workers of a process divide."""
        shards = len(self.shards)
        return len(range(process_index, shards, num_processes)) if shards >= num_processes else shards

    def fingerprint(self) -> str:
        """Changes with the list of shards."""
        return hash_lines(self.shards)

    def _deal(
        self, seeds: Sequence[int], pass_number: int, process_index: int, num_processes: int, shuffle_buffer: int
    ) -> IterableDataset:
        """The encoded records of one pass for one process."""
        seed = np.random.SeedSequence([*seeds, pass_number]).generate_state(1)[0]
        records = self.records.shuffle(seed=int(seed), buffer_size=shuffle_buffer)
        if len(self.shards) >= num_processes:
            return records.shard(num_processes, process_index, contiguous=False)
        # In turns, so that no process is left without any where records are few.
        return split_dataset_by_node(records, (process_index + pass_number) % num_processes, num_processes)

    def _readable(
        self, records: Iterable[dict], when_broken: Callable[[ValueError], None] = lambda error: None
    ) -> Iterator[tuple[str, Any]]:
        for record in records:
            try:
                for member, suffixes in zip(record["members"], self.needs, strict=True):
                    if member is None:
                        raise ValueError(f"{record['key']} in {record['shard']} has no {' or '.join(suffixes)}.")
                members = [(name, one.read() if isinstance(one, Extent) else one) for name, one in record["members"]]
                decoded = self.decode(record | {"members": members})
            except ValueError as error:
                when_broken(error)
            else:
                yield record["key"], decoded


class Streamed(data.IterableDataset):
    """Items from `Shards` without an end: the training script says how long an epoch is.

    The order depends on order_seed, epoch, number of processes and number of workers. Call `set_epoch` before each
    epoch. The split is done here, so nothing else (such as accelerate's `prepare`) may split the batches again.
    Subclasses give `item(key, decoded)`, a dict.

    Args:
        source, ...: see `Shards.stream`.
        order_seed: of the order.
    """

    def __init__(
        self,
        source: Shards,
        order_seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_buffer: int = 1000,
    ):
        self.source = source
        self.order_seed = order_seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.shuffle_buffer = shuffle_buffer
        self.epoch, self.skip = shared_number(), shared_number()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.skip.zero_()

    def fast_forward(self, batches: int, batch_size: int, num_workers: int) -> int:
        """Passes over the first batches of the epoch without decoding; called between `set_epoch` and iterating.

        Workers take turns, so all pass over the same number of batches. Returns how many, fewer than workers, are
        left for the caller to draw and drop.
        """
        # Workers without a shard take no turn.
        turns = max(1, min(num_workers, self.source.parts(self.process_index, self.num_processes)))
        rounds, left = divmod(batches, turns)
        self.skip.fill_(rounds * batch_size)
        return left

    def __iter__(self) -> Iterator[dict]:
        seeds, skip = [self.order_seed, self.epoch.item()], self.skip.item()
        stream = self.source.stream(seeds, self.process_index, self.num_processes, self.shuffle_buffer, skip)
        for key, decoded in stream:
            yield self.item(key, decoded)


def shared_number() -> torch.Tensor:
    """In shared memory, because persistent workers keep the copy of a dataset that they were started with."""
    return torch.zeros((), dtype=torch.int64).share_memory_()


def hash_lines(lines: Iterable[str]) -> str:
    """SHA-256 of some lines, names of files among them."""
    return hashlib.sha256(os.fsencode("".join(f"{line}\n" for line in lines))).hexdigest()


class CountedWarnings:
    """Warns of the first ten times that something was left out, say, then of every hundredth, with their number."""

    def __init__(self, fate: str):
        self.fate, self.number = fate, 0

    def __call__(self, error: ValueError | str) -> None:
        self.number += 1
        if self.number <= 10 or self.number % 100 == 0:
            warnings.warn(f"{error} {self.fate}, as {self.number} so far.", stacklevel=2)


def _read_shards(shards: list[str], needs: tuple[tuple[str, ...], ...]) -> Iterator[dict]:
    # Not by load_dataset("webdataset"): that decodes the other members too and stops at the first broken one, and
    # refuses shards that mix jpg and png.
    for shard in shards:
        try:
            for key, files in groupby(_files(shard), lambda file: KEY.match(file[0])[0]):
                members = [None] * len(needs)
                for name, file in files:
                    for i, suffixes in enumerate(needs):
                        if members[i] is None and name.lower().endswith(suffixes):
                            members[i] = name, (file if isinstance(file, Extent) else file.read())
                            break
                    if all(members):
                        break  # before a tear in what follows
                if any(members):
                    yield {"shard": shard, "key": key, "members": members}
        except MemoryError:
            raise
        except ImportError as error:  # which concerns all shards
            raise ValueError(f"{shard} cannot be opened without another package ({error}); install it.") from error
        except Exception as error:  # every protocol has its own; a run goes on without the shard
            warnings.warn(f"{shard} is broken ({error!r}); what follows in it is skipped.", stacklevel=2)


def _files(shard: str) -> Iterator[tuple[str, Any]]:
    """
    Name and content of each file of a shard; of a tar on a disk, of which only the headers are read, its extent. So to
    pass over records takes no reading, and a buffer of them little memory.
    """
    try:
        tar = None if "://" in shard else tarfile.open(shard, "r:")  # noqa: SIM115
    except tarfile.ReadError:  # compressed
        tar = None
    if tar is None:
        yield from StreamingDownloadManager().iter_archive(shard)
        return
    with tar:
        end = os.path.getsize(shard)
        while (member := tar.next()) is not None:
            tar.members = []  # which would fill the memory
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            if member.isreg() and not os.path.basename(member.name).startswith((".", "__")):
                extent = Extent(shard, member.offset_data, member.size)
                yield member.name, tar.extractfile(member) if member.issparse() else extent


def _expand(pattern: str) -> list[str]:
    """`a{08..10}b` -> a08b, a09b, a10b; a pattern may have several ranges."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern, maxsplit=1)
    if len(parts) == 1:
        return parts
    before, first, last, after = parts
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise ValueError(f"{pattern} stands for no shard; the range in braces must go upwards.")
    return [f"{before}{number:0{len(first)}}{rest}" for number in numbers for rest in _expand(after)]
