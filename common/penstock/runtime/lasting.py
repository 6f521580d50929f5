"""Objects that live as long as the process, such as modules and all that they define.

Owns what the garbage collector does with them: nothing. torch and transformers make a million objects. The collector
would go through them again and again while they are made, then during the run, and find no garbage. At the end of the
process they are garbage like all else: libraries such as nanobind, by which triton is made, call what is left then a
leak, in hundreds of lines.
"""

import atexit
import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """For a block of imports: the collector pauses, and then leaves alone every object that there is."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        leave_alone()


def leave_alone() -> None:
    """Until the process ends, the collector does not look at any object that there is now."""
    gc.freeze()
    atexit.register(gc.unfreeze)
