"""Objects that live as long as the process, such as modules and all that they define.

Owns what the garbage collector does with them: nothing. torch and transformers make a million objects. The collector
would go through them again and again while they are made, then during the run, and at the end of the process, and find
no garbage: a third of the CPU time of a trainer that starts and ends.
"""

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
        gc.freeze()
