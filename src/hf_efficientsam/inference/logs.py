"""What the package logs, for those who run a command or a script."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def log_shown() -> Iterator[None]:
    """What the package logs, such as what a reader leaves out, is shown on stderr; of several processes' the first's,
    and the others' errors."""
    logger, handler = logging.getLogger("hf_efficientsam"), logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
