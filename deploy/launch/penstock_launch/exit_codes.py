"""How a command of the launcher ends: its exit code, and one clear line for what went wrong."""

import signal
from collections.abc import Callable

from penstock.durable import DISK_FAULTS, unwritable
from penstock.errors import PenstockError
from penstock.runtime.output import UNREAD_EXIT_CODE, complain


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command; returns its exit code. A full disk, or output that nobody reads, is no defect: no traceback."""
    try:
        return command()
    except PenstockError as error:
        return _failed(error)
    except BrokenPipeError:
        return UNREAD_EXIT_CODE
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        if error.filename is None:  # of a file that is open already
            return _failed(PenstockError(f"standard output or a file cannot be written ({error.strerror})"))
        return _failed(unwritable(error.filename, error))
    except KeyboardInterrupt:
        complain("penstock: stopped by Ctrl-C")
        return 128 + signal.SIGINT


def _failed(error: PenstockError) -> int:
    complain(f"penstock: {error.kind}: {error}")
    return error.exit_code
