"""What tests of processes share."""

from collections.abc import Callable

import psutil
import pytest

from penstock.workers import guard

Children = Callable[[], list[psutil.Process]]


@pytest.fixture
def new_children() -> Children:
    """The processes below this one that the test has started; fixtures of the session have more.

    Without the guard of a driver, which lives as long as the driver does.
    """
    before = set(psutil.Process().children(recursive=True))

    def found() -> list[psutil.Process]:
        now = psutil.Process().children(recursive=True)
        return [each for each in now if each not in before and not _is_guard(each)]

    return found


def _is_guard(process: psutil.Process) -> bool:
    try:
        return guard.__file__ in process.cmdline()
    except psutil.Error:
        return False
