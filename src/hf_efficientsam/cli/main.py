"""Where the command `efficientsam` starts.

Ctrl+C ends it at once, with one line and exit code 130: also while torch and transformers are imported, and while
torch computes, which holds up Python's own handling of it until the computation is over.
"""

import atexit
import gc
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

GRACE = 0.5  # seconds in which what is half written can be removed
INTERRUPTED = 130

ending = threading.Lock()


def end() -> NoReturn:
    """Says that the command was stopped, once, and ends the process without waiting for anything."""
    with ending:
        sys.stdout.flush()
        sys.stderr.write(f"{os.linesep * sys.stderr.isatty()}efficientsam: stopped by Ctrl+C\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)


def watch(received: socket.socket) -> None:
    """Ends the process soon after a signal of Ctrl+C; returns when the other end is closed, as the process ends."""
    while number := received.recv(1):
        if number[0] == signal.SIGINT:
            threading.Event().wait(GRACE)
            end()


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they start with &
    received, sent = socket.socketpair()
    sent.setblocking(False)
    signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, args=[received], daemon=True).start()
    atexit.register(gc.freeze)  # else Python's end takes a second, to look for garbage among all that was imported
    try:
        from .app import app

        app()
    except KeyboardInterrupt:
        end()
    except SystemExit as error:
        if error.code == INTERRUPTED:  # which typer makes of a KeyboardInterrupt
            end()
        raise


if __name__ == "__main__":
    main()
