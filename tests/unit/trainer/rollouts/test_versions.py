"""A version number has one digest, unless the resume computes it again."""

import pytest

from penstock.contracts import PolicyIdentity
from penstock.errors import WeightsError
from penstock_trainer.rollouts.versions import Versions

FIRST, SECOND, OTHER = PolicyIdentity(0, "a" * 16), PolicyIdentity(1, "b" * 16), PolicyIdentity(1, "c" * 16)


@pytest.fixture
def versions() -> Versions:
    versions = Versions()
    versions.restore({0: FIRST, 1: SECOND})
    return versions


def test_what_is_known_is_what_was_restored_and_learnt(versions: Versions) -> None:
    known = versions.known
    versions.add(SECOND)  # a step that changed nothing leaves the version as it is
    versions.add(PolicyIdentity(2, "d" * 16))
    assert known == {0: FIRST, 1: SECOND, 2: PolicyIdentity(2, "d" * 16)}


def test_a_number_with_another_digest_is_refused_and_not_learnt(versions: Versions) -> None:
    with pytest.raises(WeightsError, match=f"version 1 is {'b' * 16} and {'c' * 16}: expected one digest"):
        versions.add(OTHER)
    assert versions.known[1] == SECOND


def test_the_resume_may_replace_what_it_has_computed_again(versions: Versions) -> None:
    versions.replace(OTHER)
    assert versions.known == {0: FIRST, 1: OTHER}
    versions.add(OTHER)
    with pytest.raises(WeightsError):
        versions.add(SECOND)


def test_the_announced_version_is_the_last_that_was_announced(versions: Versions) -> None:
    assert versions.announced_version == 0
    versions.announce(SECOND)
    assert versions.announced_version == 1
    assert versions.known[1] == SECOND


def test_nobody_writes_through_the_view(versions: Versions) -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        versions.known[1] = OTHER  # type: ignore[index]
