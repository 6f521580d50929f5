"""Folders of one process each: separate while two live, taken over from a dead one, deleted on release."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.weights import local_folder
from penstock.weights.local_folder import LocalFolder, free_memory_of_run, name_of_run, shared_memory

HOLD = """
import sys
from penstock.weights.local_folder import LocalFolder
print(LocalFolder("a", 0, sys.argv[1]).path, flush=True)
input()
"""


def test_two_claims_are_apart_and_a_released_one_is_free_again(tmp_path: Path) -> None:
    first, second = (LocalFolder("a", 0, str(tmp_path)) for _ in range(2))
    other = LocalFolder("b", 0, str(tmp_path))
    assert [each.path.name for each in (first, second, other)] == ["a-0", "a-1", "b-0"]
    first.release()
    assert not first.path.exists()
    assert LocalFolder("a", 0, str(tmp_path)).path == first.path


def test_the_folder_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == str(tmp_path / "a-0")
        assert LocalFolder("a", 0, str(tmp_path)).path == tmp_path / "a-1"
        holder.kill()
        holder.wait()
    assert LocalFolder("a", 0, str(tmp_path)).path == tmp_path / "a-0"


def test_a_folder_that_its_holder_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders = [LocalFolder("a", 0, str(tmp_path))]
    path, real = holders[0].path, fcntl.flock

    def release_first(lock: int, operation: int) -> None:
        while holders:
            holders.pop().release()
        real(lock, operation)

    monkeypatch.setattr(fcntl, "flock", release_first)
    second = LocalFolder("a", 0, str(tmp_path))
    monkeypatch.undo()
    assert second.path == path
    assert LocalFolder("a", 0, str(tmp_path)).path == tmp_path / "a-1"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"weights\.local_folder: .*file"):
        LocalFolder("a", 0, str(tmp_path / "file"))


def test_memory_is_used_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shared_memory(2**62) is None
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder = LocalFolder("a", 2**62)
    assert folder.path == tmp_path / "a-0"
    assert name_of_run("run", tmp_path / "x") != name_of_run("run", tmp_path / "y")


def test_the_memory_of_a_run_that_has_ended_is_freed_and_that_of_others_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_folder, "SHARED_MEMORY", tmp_path / "memory")
    free_memory_of_run("a", tmp_path / "a")  # a host without such memory
    mine, other = name_of_run("a", tmp_path / "a"), name_of_run("a-b", tmp_path / "a-b")
    kept = [other, f"{other}-trainer-0", f"{mine}-mine", "sem.x"]
    for name in (*kept, mine, f"{mine}-trainer-0", f"{mine}-rollout-12"):
        (tmp_path / "memory" / name / "00000001.1").mkdir(parents=True)
    free_memory_of_run("a", tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "memory").iterdir()) == sorted(kept)
