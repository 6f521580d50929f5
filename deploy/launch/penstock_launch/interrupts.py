"""Ctrl-C while a command is still being imported.

From the import of this module until `heed`, Ctrl-C ends the process at once, without a word, with the exit code of a
program that Ctrl-C has stopped: nothing has begun that would need an end, and an exception could be raised at any line
of any library. Invariant: only Python's own handler is replaced; a signal that is ignored stays ignored.
"""

import os
import signal
from types import FrameType

EXIT_CODE = 128 + signal.SIGINT


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_CODE)


def heed() -> None:
    """From now on Ctrl-C is an exception again, which commands handle."""
    _replace(_end, signal.default_int_handler)


def _replace(old: object, new: "signal._HANDLER") -> None:
    try:
        if signal.getsignal(signal.SIGINT) is old:
            signal.signal(signal.SIGINT, new)
    except ValueError:  # of another thread than the main one, which gets no signals
        return


_replace(signal.default_int_handler, _end)
