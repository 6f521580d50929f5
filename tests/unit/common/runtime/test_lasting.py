"""Imports cost no collections, and what they made costs none later."""

import gc
import subprocess
import sys

import pytest

from penstock.runtime.lasting import lasting
from tests.patience import START_SECONDS


def test_the_collector_pauses_and_leaves_alone_what_was_made() -> None:
    with lasting():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled()
    left = {id(each) for each in gc.get_objects()}
    assert not any(id(each) in left for each in made)


def test_the_collector_goes_on_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), lasting():
        raise ImportError
    assert gc.isenabled()


def test_at_the_end_of_the_process_all_is_collected_again() -> None:
    """A library that looks then for what it has leaked finds nothing."""
    source = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(gc.get_freeze_count()))\n"  # called after those that are registered later
        "from penstock.runtime.lasting import lasting\n"
        "with lasting():\n"
        "    made = [[number] for number in range(1000)]\n"
        "print(gc.get_freeze_count() > 1000)\n"
    )
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=START_SECONDS)
    assert (ran.stdout, ran.stderr) == ("True\n0\n", "")
