"""Batches of an epoch, and the batches of each optimiser step, however the run was cut into processes and restarts."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset, RandomSampler


def epoch_loader(
    accelerator: Accelerator,
    data: Any,
    global_batch_size: int,
    num_workers: int = 0,
    epoch_images: int | None = None,
    **options,
) -> tuple[DataLoader, int]:
    """
    Shuffled batches for this process, and optimiser steps an epoch.

    Args:
        accelerator: of `start_accelerator`, which knows how many batches make a step.
        data: a map-style dataset, or a stream that is split over the processes already; with `set_epoch`.
        global_batch_size: images a step, over all processes.
        num_workers: processes that read images.
        epoch_images: how many images count as an epoch; by default all, which a stream cannot know. An epoch has a
            whole number of steps, however many processes there are.
        options: `DataLoader`'s.

    Raises:
        ValueError: if an epoch is less than one step, or not known.
    """
    streamed = isinstance(data, IterableDataset)
    if streamed and epoch_images is None:
        raise ValueError("How many images there are in streamed shards is not known; give --epoch_images.")
    images = epoch_images or len(data)
    steps = images // global_batch_size
    if steps == 0:
        raise ValueError(f"{images} images are less than one step; lower --global_batch_size {global_batch_size}.")
    batches_a_step = accelerator.gradient_accumulation_steps * accelerator.num_processes
    options |= {"batch_size": global_batch_size // batches_a_step, "num_workers": num_workers}
    options |= {
        "worker_init_fn": leave_signals_to_main,
        "persistent_workers": num_workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
    }
    if streamed:
        return DataLoader(data, **options), steps
    sampler = RandomSampler(data, num_samples=steps * global_batch_size)
    loader = DataLoader(data, sampler=sampler, **options)
    return accelerator.prepare_data_loader(loader, device_placement=False), steps


def leave_signals_to_main(worker: int) -> None:
    """A worker goes on when a terminal or a scheduler signals all processes, so that the step can be ended and saved;
    it ends when the main process says so."""

    main_process = multiprocessing.parent_process().pid

    def wait_for_main() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main_process:
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=wait_for_main, daemon=True).start()


def step_batches(
    accelerator: Accelerator, loader: DataLoader, done: int, steps: int, epoch_steps: int
) -> Iterator[tuple[int, Iterator[Any]]]:
    """
    For each optimiser step after the first `done`, up to `steps`: its number, from 1, and the batches of this process,
    to be used up before the next. They are not on its device yet: gathered for one step of many, they need not fit
    there together.

    Args:
        accelerator, loader, epoch_steps: of `start_accelerator` and `epoch_loader`.
        done: as `TrainingRun.resume` says.
        steps: how many there are in all.
    """
    accumulation = accelerator.gradient_accumulation_steps
    while done < steps:
        epoch, position = divmod(done, epoch_steps)
        batches = _epoch_batches(accelerator, loader, epoch, position * accumulation)
        for _ in range(min(epoch_steps - position, steps - done)):
            done += 1
            yield done, islice(batches, accumulation)


def _epoch_batches(accelerator: Accelerator, loader: DataLoader, epoch: int, skip: int) -> Iterator[Any]:
    """The batches of an epoch for this process, after the first `skip`."""
    data = loader.dataset
    data.set_epoch(epoch)
    if isinstance(data, IterableDataset):
        skip = data.fast_forward(skip, loader.batch_size, loader.num_workers)
    batches = accelerator.skip_first_batches(loader, skip) if skip else loader
    if hasattr(batches, "set_epoch"):  # a prepared one, which also shuffles
        batches.set_epoch(epoch)
    yield from batches
