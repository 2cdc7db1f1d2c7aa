"""A training run from its start to its end: accelerator, resuming, log, checkpoints, teardown."""

import dataclasses
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from hf_efficientsam.inference.image_files import describe_error
from hf_efficientsam.inference.logs import log_shown

from .checkpoints import Checkpoints, SaveError
from .config import RunConfig
from .metrics_log import MetricsLog, tracker_arguments
from .optimization import describe_unless_finite
from .reports import replace_text
from .stopping import LeftOutSteps, StopSignals, TrainingStopped

NEXT_COMMANDS = {  # of a run's project, with its model
    "masks": "efficientsam demo --model {model}",
    "peer_masks": "efficientsam evaluate masks --model {model} --annotations ANNOTATIONS.json",
    "sami": "efficientsam train masks --encoder {model} --train ANNOTATIONS.json --output_dir runs/masks",
    "distill": "efficientsam train masks --model {model} --train ANNOTATIONS.json --output_dir runs/masks",
    "classification": "efficientsam train classification --evaluate {model} --test IMAGES",
    "semantic": "efficientsam train semantic --evaluate {model} --test IMAGES",
    "detection": "efficientsam train detection --evaluate {model} --val ANNOTATIONS.json",
    "saliency": "efficientsam salient IMAGE --saliency {model} --overlay drawn.jpg",
}

logger = logging.getLogger(__name__)


def start_accelerator(config: RunConfig, fsdp: bool = False, **options) -> Accelerator:
    """
    With the configuration's trackers, and accumulating gradients to its `global_batch_size`. On CUDA, products of
    float32 matrices are computed in TF32 from here on, unless NVIDIA_TF32_OVERRIDE=0 is set.

    Args:
        config: the run's.
        fsdp: whether the model is large enough for FSDP.
        options: `Accelerator`'s.

    Raises:
        ValueError: for an unknown tracker, for FSDP where it is of no use, and if batches of `batch_size` (None: all
            images of a process) do not make the global batch.
    """
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))
    options["kwargs_handlers"] = [timeout, *options.get("kwargs_handlers", [])]
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        **tracker_arguments(config.trackers, Path(config.output_dir)),
        **options,
    )
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not fsdp:
            raise ValueError("A model this small gains nothing from FSDP; launch with training/accelerate/ddp.yaml.")
        if config.ema_decay:
            raise ValueError("An average of the weights cannot be kept with FSDP; leave --ema_decay out, or use DDP.")
    images, processes = config.global_batch_size, accelerator.num_processes
    batch_size = config.batch_size or max(1, images // processes)
    accelerator.gradient_accumulation_steps, left = divmod(images, batch_size * processes)
    if left:
        raise ValueError(
            f"--global_batch_size {images} must be a multiple of --batch_size {batch_size} times {processes} "
            "process(es); change one of them, or start fewer processes with `accelerate launch --num_processes 1`."
        )
    return accelerator


def accelerator_without_timeout() -> Accelerator:
    """For work without a training loop: processes that are done wait a week for the others, not minutes."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


class TrainingRun:
    """
    What a training loop needs to stop and go on, as a context that ends after the loop's function has returned.

        accelerator = start_accelerator(config)
        with TrainingRun(accelerator, config, "sami") as run:
            training_function(config, run)

        def training_function(config, run):
            ...
            model, optimizer = run.accelerator.prepare(model, optimizer)
            done = run.resume(steps, [scheduler, average])
            for step, batches in step_batches(run.accelerator, loader, done, steps, epoch_steps):
                ...
                run.log.add(step, images=config.global_batch_size, loss=loss)
                if run.is_save_due(step):
                    run.save(step)

    An error of data, disk or numbers in the loop becomes `TrainingStopped`; one before `resume` stays as it is. After
    SIGTERM or Ctrl-C the step is ended and saved, then the run stops; a second Ctrl-C stops it at once.

    Args:
        accelerator: of `start_accelerator`.
        config: the run's.
        project: the kind of run, one of `NEXT_COMMANDS`, under which trackers keep it.
        streamed: whether images are streamed, so that who reads how many at a time decides about their order.
    """

    log: MetricsLog | None = None

    def __init__(self, accelerator: Accelerator, config: RunConfig, project: str, streamed: bool = False):
        self.accelerator, self.config, self.project, self.streamed = accelerator, config, project, streamed
        self.output_dir, self.left_out = Path(config.output_dir), LeftOutSteps()
        self.signals = StopSignals(shown=accelerator.is_main_process)
        self.checkpoints = Checkpoints(accelerator, self.output_dir / "checkpoints")

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        self.signals.end()
        if error is None:
            if self.log is not None:
                self.log.close()
                model = self.output_dir / "model"
                self.accelerator.print(f"The model is in {model}, its log and plots are in {self.output_dir}. Next:")
                self.accelerator.print("  " + NEXT_COMMANDS[self.project].format(model=model))
            # The models that the accelerator holds first: freeing one together with the processes' group can hang
            # (pytorch/pytorch issue 56297). Those of the loop's function are gone with it.
            self.accelerator.free_memory()
            self.accelerator.end_training()
        elif self.log is not None and isinstance(error, OSError | SaveError | ValueError):
            raise TrainingStopped(last_line(error)) from error
        elif self.log is not None and isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise TrainingStopped(
                "A process that reads images was killed, mostly as memory ran out; start again to go on, with fewer "
                "--num_workers or --batch_size."
            ) from error

    def resume(self, steps: int, state: list[Any]) -> int:
        """
        Loads the newest checkpoint and starts the log. Called on every process, after `accelerator.prepare`.

        Args:
            steps: how many the run has.
            state: schedulers, averages and what else belongs to a checkpoint beside the prepared; None is left out.
                They are not prepared: Accelerate would step a scheduler once for every process.

        Returns:
            the number of steps that are done; 0 without a checkpoint.

        Raises:
            ValueError: see `check_same_run` and `Checkpoints.resume`.
        """
        if self.accelerator.is_main_process:
            check_same_run(self.config, self.accelerator.num_processes, self.streamed)
        for one in state:
            if one is not None:
                self.accelerator.register_for_checkpointing(one)
        log, self.steps = MetricsLog(self.accelerator, self.output_dir, steps, self.config.log_steps), steps
        done = self.checkpoints.resume()
        if done == steps:
            self.accelerator.print(
                f"{self.output_dir} holds a finished run; choose another --output_dir for a new one, or delete it."
            )
        log.start(done, self.project, dataclasses.asdict(self.config))
        self.log, self.saved = log, time.monotonic()
        self.signals.start()
        return done

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps happens now; it does after the last."""
        return step % every == 0 or step == self.steps

    def check_finite(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor | float, images: list) -> None:
        """
        Says if a step was left out because its loss or gradient is not finite, see `clip_gradients`. Called on every
        process with its own loss `[]` and images.

        Raises:
            TrainingStopped: see `LeftOutSteps`.
        """
        problem = describe_unless_finite(self.accelerator, loss, grad_norm, images)
        self.left_out.note(step, problem, step == self.steps, self.accelerator.is_main_process)

    def is_save_due(self, step: int) -> bool:
        """Whether model and checkpoint are to be saved after a step: by number, by time, or as the run is to stop. The
        same on every process, on each of which it is called."""
        late = 0 < 60 * self.config.save_minutes < time.monotonic() - self.saved
        now = torch.tensor([[late, self.signals.number]], device=self.accelerator.device)
        late, self.signals.number = self.accelerator.gather(now).amax(0).tolist()
        return self.is_due(step, self.config.save_steps) or bool(late or self.signals.number)

    def save(self, step: int) -> None:
        """
        A checkpoint and the plots. After the model itself is saved, so that a finished run has its model.

        Raises:
            TrainingStopped: once all is saved, if the run is to stop.
        """
        self.log.plot()
        self.checkpoints.save(step)
        self.saved = time.monotonic()
        if self.signals.number and step < self.steps:
            raise self.signals.stopped(step, "start again with the same options to go on")


def check_same_run(config: RunConfig, num_processes: int, streamed: bool) -> None:
    """
    Notes the configuration in its `output_dir`, and once there is a checkpoint compares at each start what decides
    about what is learnt.

    Raises:
        ValueError: if a run with another configuration is there, which resuming would mix with this one.
    """
    folder, now = Path(config.output_dir), dataclasses.asdict(config)
    free = {"save_steps", "save_minutes", "log_steps", "image_steps", "trackers", "output_dir", "cache_dir"}
    free |= {"timeout_minutes"}
    if streamed:
        now["num_processes"] = num_processes
    else:
        free |= {"num_workers", "batch_size"}
    path = folder / "config.json"
    if not path.is_file() or not any((folder / "checkpoints").glob("step_*")):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in now if name not in free and before.get(name) != now[name]]:
        if changed == ["num_processes"] and "num_processes" in before:
            before, now = before["num_processes"], now["num_processes"]
            raise ValueError(
                f"{folder} holds a run of {before} processes, whose number decides who reads which images: "
                f"with {now}, some would come twice and others not at all. Start {before}, or train its model on into "
                "a new --output_dir."
            )
        raise ValueError(
            f"{folder} holds a run with another {', '.join(changed)}; choose a new --output_dir, or delete that one."
        )


def check_device(name: str | None) -> None:
    """
    Raises:
        ValueError: for a device that torch does not know or this machine lacks; None, for a script's own choice, fits.
    """
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def run_script(name: str, main: Callable[[], None]) -> None:
    """Calls a script's `main`. What a user can mend ends it with one sentence: exit code 2 for what cannot be run, 1
    for a run that stopped (a full disk, a broken image), 128 and the signal's number for one that was stopped."""
    try:
        with log_shown():
            main()
    except (OSError, SaveError, ValueError) as error:
        message, code = last_line(error), 2
    except TrainingStopped as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = "Stopped by Ctrl-C.", 128 + signal.SIGINT
    else:
        return
    print(f"\n{name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def last_line(error: BaseException) -> str:
    """The sentence of an error; of what a worker of a DataLoader raises, which comes with its traceback, its end."""
    if getattr(error, "filename", None) is not None:  # the operating system's
        return describe_error(error)
    text = str(error).strip()
    return text.splitlines()[-1].removeprefix("ValueError: ") if text.startswith("Caught ") else text
