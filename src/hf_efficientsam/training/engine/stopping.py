"""How a run ends before its end: by a signal, by losses that stay not finite, or by another error."""

import logging
import signal
import sys
import threading
from typing import Any

MAX_LEFT_OUT = 5  # steps in a row whose loss or gradient is not finite

logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """What ended a run after its start: one sentence for the user, and the exit code of the process."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


class StopSignals:
    """
    Notes SIGTERM and Ctrl-C while it is in force, so that a step can be ended and saved; a second Ctrl-C ends the
    process at once. A context, or `start` and `end`. Does nothing outside of the main thread.

    Args:
        shown: whether the first of them is answered on stderr.

    Attributes:
        number: of the signal that came; 0 for none.
    """

    def __init__(self, shown: bool = True):
        self.number, self.shown, self.handlers = 0, shown, {}

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers = {one: signal.signal(one, self._note) for one in (signal.SIGTERM, signal.SIGINT)}

    def end(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def __enter__(self) -> "StopSignals":
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()

    def _note(self, number: int, frame: Any) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self.shown:
            print("\nThe run stops once this step is saved; Ctrl-C stops it at once.", file=sys.stderr)

    def stopped(self, step: int, how_to_go_on: str) -> TrainingStopped:
        """The error of a run that was stopped after a step, which is saved."""
        name = signal.Signals(self.number).name
        return TrainingStopped(
            f"Stopped by {name} after step {step}, which is saved; {how_to_go_on}.", 128 + self.number
        )


class LeftOutSteps:
    """Counts steps in a row that were left out because their loss or gradient was not finite, and says so."""

    def __init__(self):
        self.in_a_row = 0

    def note(self, step: int, problem: str | None, is_last: bool, shown: bool = True) -> None:
        """
        Args:
            step: its number.
            problem: what the loss was, with the images if they are known; None for a step that was taken.
            is_last: of the run.
            shown: whether it is said, unless it ends the run.

        Raises:
            TrainingStopped: for the last of `MAX_LEFT_OUT` such steps in a row, or of the run.
        """
        self.in_a_row = self.in_a_row + 1 if problem else 0
        if problem and (self.in_a_row == MAX_LEFT_OUT or is_last):
            raise TrainingStopped(
                f"The loss of step {step} is {problem}, as were {self.in_a_row} in a row. They changed nothing; train "
                "with a lower --learning_rate into a new --output_dir, or remove these images."
            )
        if problem and shown:
            logger.warning("The loss of step %s is %s; the step is left out.", step, problem)
