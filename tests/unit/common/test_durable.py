"""Files that are complete or absent, and why one could not be written."""

import resource
from pathlib import Path

import pytest

from penstock.durable import write_durably
from penstock.errors import PenstockError


def test_too_many_open_files_are_no_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(PenstockError, match=r"Too many open files.*ulimit -n") as caught:
            write_durably(tmp_path / "summary.json", b"{}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "room" not in str(caught.value)


def test_a_folder_that_is_not_there_is_told_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(PenstockError, match=r"No such file.*expected room there and the right to write.*run\.root"):
        write_durably(tmp_path / "none" / "summary.json", b"{}")
