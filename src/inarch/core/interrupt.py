"""Ctrl-C while something is imported."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""


@contextmanager
def importing() -> Iterator[None]:
    """Around slow imports, before anything is written: Ctrl-C ends the process at once.

    As an exception it would leave half a module behind, or be swallowed by one, and fail in other words later.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main one may set a handler
        yield
        return
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_: object) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)
