"""The id of a run's folder: made once, moved with the folder, never that of two folders."""

import concurrent.futures
import errno
import os
from pathlib import Path

import pytest

from penstock.errors import PenstockError
from penstock.run_home import RunHome


def test_a_new_folder_gets_an_id_and_keeps_it_wherever_it_is_moved(tmp_path: Path) -> None:
    first = RunHome(tmp_path / "a" / "run", "trainer").id()
    assert len(first) == 16
    assert RunHome(tmp_path / "b" / "run", "trainer").id() != first
    (tmp_path / "a" / "run" / "steps").mkdir()
    (tmp_path / "a").rename(tmp_path / "c")
    assert RunHome(tmp_path / "c" / "run", "launcher").id() == first


def test_processes_that_begin_at_the_same_moment_read_the_same_id(tmp_path: Path) -> None:
    homes = [RunHome(tmp_path / "run", "trainer") for _ in range(16)]
    with concurrent.futures.ThreadPoolExecutor(len(homes)) as threads:
        assert len({*threads.map(RunHome.id, homes)}) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["folder_id"]


def test_a_backup_without_an_id_takes_over_the_one_that_it_is_given(tmp_path: Path) -> None:
    home = RunHome(tmp_path / "run", "trainer")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert home.id() == ""
    home.keep("0123456789abcdef")
    assert home.id() == "0123456789abcdef"


def test_the_last_lease_moves_with_the_folder_and_is_0_in_a_new_one(tmp_path: Path) -> None:
    home = RunHome(tmp_path / "run", "trainer")
    assert home.last_lease() == 0
    home.keep_lease(7)
    home.keep_lease(12)
    home.keep_lease(8)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert RunHome(tmp_path / "moved", "trainer").last_lease() == 12
    (tmp_path / "moved" / "lease").write_text("")
    assert RunHome(tmp_path / "moved", "trainer").last_lease() == 0


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PenstockError, match=r"file/run cannot be written .*run\.root"):
        RunHome(tmp_path / "file" / "run", "trainer").id()


def test_a_file_system_without_hard_links_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PenstockError, match=r"folder_id cannot be written .*run\.root"):
        RunHome(tmp_path, "trainer").id()
    assert list(tmp_path.iterdir()) == []
