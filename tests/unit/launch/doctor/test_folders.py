"""What the doctor says of folders: room, rights, memory."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.config import Config
from penstock_launch.doctor import folders
from penstock_launch.doctor.folders import (
    Room,
    compiled_folders,
    compiled_line,
    run_bytes,
    run_root_line,
    run_root_now,
    shared_memory_line,
    staged_bytes,
    weights_line,
    weights_now,
)

GIB = 2**30
MILLION = 10**6
ROOM = Room(Path("runs"), Path("/"), 100 * GIB, 50 * GIB, writable=True, executable=True)
SHARED = replace(ROOM, folder=Path("/dev/shm"))


def config_with(**sections: object) -> Config:
    return Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d"}}, **sections})


def test_the_room_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    room = Room.of(tmp_path / "a" / "b")
    assert (room.place, room.writable, room.executable) == (tmp_path, True, True)
    assert 0 < room.free_bytes <= room.total_bytes


def test_nothing_is_made(tmp_path: Path) -> None:
    config = config_with(run={"root": str(tmp_path / "runs")}, weights={"folder": str(tmp_path / "weights")})
    assert [run_root_now(config, 0).verdict, weights_now(config, 0).verdict] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    line = run_root_line(Room.of(tmp_path / "runs" / "mine"), 0)
    assert (line.verdict, "run.root" in line.advice) == ("problem", True)


@pytest.mark.parametrize(
    ("room", "needed", "verdict", "words"),
    [
        (ROOM, 0, "ok", ""),
        (ROOM, 51 * GIB, "warning", "checkpoint.keep"),
        (replace(ROOM, free_bytes=15 * MILLION), 0, "problem", "run.root"),
        (replace(ROOM, writable=False), 0, "problem", "run.root"),
    ],
)
def test_the_room_of_runs(room: Room, needed: int, verdict: str, words: str) -> None:
    line = run_root_line(room, needed)
    assert line.verdict == verdict
    assert words in line.advice


def test_what_a_run_takes() -> None:
    config = config_with(checkpoint={"keep": 2, "keep_step_bytes": 1000})
    assert run_bytes(config, MILLION) == 3 * 12 * MILLION + 1000 + 4 * MILLION
    best = config_with(
        checkpoint={"keep": 2, "keep_step_bytes": 1000, "keep_best": True},
        data={"train": {"path": "d"}, "eval": {"path": "e"}},
    )
    assert run_bytes(best, MILLION) == 5 * 12 * MILLION + 1000 + 4 * MILLION
    adapter = config_with(checkpoint={"keep_step_bytes": 1000}, actor={"path": "m", "lora": {"rank": 8}})
    assert run_bytes(adapter, MILLION) == 1000 + 4 * MILLION
    assert staged_bytes(config, MILLION) == 6 * MILLION
    engine = {"engine": {"dtype": "float32"}}
    assert staged_bytes(config_with(rollout=engine, actor={"path": "m", "dtype": "float32"}), MILLION) == 12 * MILLION


def test_weights_lie_in_memory_if_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "shared_memory", lambda needed: tmp_path if needed < GIB else None)
    config = config_with(run={"root": str(tmp_path / "runs")})
    line = weights_line(config, MILLION)
    assert line.verdict == "ok"
    assert "3 versions of the weights take 1 MiB" in line.seen
    line = weights_line(config, GIB)
    assert line.verdict == "warning"
    assert "on disk, since /dev/shm has no room" in line.seen
    assert "--shm-size" in line.advice
    assert "weights.folder" in line.advice


def test_a_folder_of_weights_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(weights={"folder": str(tmp_path)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=100, used=60, free=40))
    assert [weights_line(config, needed).verdict for needed in (40, 41, 101)] == ["ok", "warning", "problem"]


@pytest.mark.parametrize(
    ("room", "in_memory", "copy", "verdict", "words"),
    [
        (SHARED, True, 0, "ok", ""),
        (SHARED, True, 51 * GIB, "problem", "weights.transport to disk"),
        (replace(SHARED, total_bytes=2**26, free_bytes=2**26), True, 0, "warning", "--shm-size"),
        (SHARED, False, 0, "warning", "tmpfs"),
        (replace(SHARED, writable=False), True, 0, "warning", "tmpfs"),
    ],
)
def test_shared_memory(room: Room, in_memory: bool, copy: int, verdict: str, words: str) -> None:
    line = shared_memory_line(room, in_memory, copy)
    assert line.verdict == verdict
    assert words in line.advice


def test_compiled_code_lies_where_it_can_run(tmp_path: Path) -> None:
    environ = {"TORCHINDUCTOR_CACHE_DIR": "/cache/inductor"}
    places = compiled_folders(environ, Path("/tmp"), Path("/home/u"))
    assert places == {
        "TORCHINDUCTOR_CACHE_DIR": Path("/cache/inductor"),
        "TRITON_CACHE_DIR": Path("/home/u/.triton"),
    }
    rooms = {name: replace(ROOM, folder=folder) for name, folder in places.items()}
    assert compiled_line(rooms).verdict == "ok"
    for room in (replace(ROOM, executable=False), replace(ROOM, writable=False)):
        line = compiled_line({**rooms, "TRITON_CACHE_DIR": room})
        assert line.verdict == "problem"
        assert line.advice.startswith("Set TRITON_CACHE_DIR to")
