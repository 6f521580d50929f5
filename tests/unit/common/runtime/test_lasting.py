"""Imports cost no collections, and what they made costs none later."""

import gc

import pytest

from penstock.runtime.lasting import lasting


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
