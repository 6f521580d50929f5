"""The folder of an engine: short enough for sockets, gone with the engine or, after a kill, with the next start."""

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from penstock.errors import EngineStartError
from penstock_rollout.engine.sglang import own_folder
from penstock_rollout.engine.sglang.leftovers import SHARED_MEMORY
from penstock_rollout.engine.sglang.own_folder import MAX_BYTES, OWNER, Owner, OwnFolder, left_over

KILLED = """
import os, signal, sys
from pathlib import Path
from penstock_rollout.engine.sglang.own_folder import OwnFolder
folder = OwnFolder(os.environ)
folder.record([Path(each) for each in sys.argv[1:]])
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose path is short, as those of pytest are not; nothing is swept but in it."""
    monkeypatch.setattr(own_folder, "OTHERS", ())
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def test_it_lies_in_the_users_temporary_folder_and_is_removed_with_all_that_is_in_it(short: Path) -> None:
    folder = OwnFolder({"TMPDIR": str(short)})
    assert folder.path.parent == short
    assert folder.variables("cpu") == {"TMPDIR": str(folder.path)}
    assert folder.variables("cuda")["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{short}/torchinductor_"), "it is kept"
    (folder.path / "socket").touch()
    folder.remove()
    folder.remove()
    assert [*short.iterdir()] == []


def test_a_path_that_is_too_long_for_sockets_gives_way_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * MAX_BYTES)
    long.mkdir()
    folder = OwnFolder({"TMPDIR": str(long)})
    assert len(os.fsencode(folder.path)) <= MAX_BYTES
    assert [*long.iterdir()] == []
    folder.remove()
    monkeypatch.setattr(own_folder, "OTHERS", ())
    with pytest.raises(EngineStartError, match=r"no folder for the engine's sockets: tried .*expected TMPDIR"):
        OwnFolder({"TMPDIR": str(long)})


def test_what_a_killed_service_left_is_removed_by_the_next_start_and_nothing_else(short: Path) -> None:
    own, others = (SHARED_MEMORY / f"sglang_loads_{uuid.uuid4().hex}" for _ in range(2))
    own.touch()
    others.touch()
    environ = {**os.environ, "TMPDIR": str(short), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLED, str(own), str(others)]
    try:
        left = Path(subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False).stdout.strip())
        others.rename(others.with_suffix(".kept"))
        others.touch()  # another file by now
        elsewhere = short / "penstock-eng-elsewhere"
        elsewhere.mkdir()
        owner = msgspec.json.decode((left / OWNER).read_bytes(), type=Owner)
        (elsewhere / OWNER).write_bytes(msgspec.json.encode(msgspec.structs.replace(owner, place="another host")))
        (short / "penstock-eng-strange").mkdir()
        assert [*left_over([str(short)])] == [left]
        living = OwnFolder(environ)
        second = OwnFolder(environ)
        assert not left.exists()
        assert living.path.exists()
        assert {each.name for each in short.iterdir()} == {
            living.path.name,
            second.path.name,
            "penstock-eng-elsewhere",
            "penstock-eng-strange",
        }
        assert [own.exists(), others.exists()] == [False, True]
    finally:
        for path in (own, others, others.with_suffix(".kept")):
            path.unlink(missing_ok=True)
