"""What tests of processes share."""

from collections.abc import Callable

import psutil
import pytest

from penstock.workers import guard

Children = Callable[[], list[psutil.Process]]


@pytest.fixture
def new_children() -> Children:
    """The processes below this one that the test has started; fixtures of the session have more, which may have new
    children too.

    Without the guard of a driver, which lives as long as the driver does.
    """
    before = set(psutil.Process().children())

    def found() -> list[psutil.Process]:
        own = [each for each in psutil.Process().children() if each not in before and not _is_guard(each)]
        return own + [below for each in own for below in _below(each)]

    return found


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_guard(process: psutil.Process) -> bool:
    try:
        return guard.__file__ in process.cmdline()
    except psutil.Error:
        return False
