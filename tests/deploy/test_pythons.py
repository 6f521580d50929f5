"""The wheel on each Python that it is for: pip installs it from the package index, bare, and its command runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import START_SECONDS
from tests.unit.repository.containers import IMPORT_ALL, bare_leaves_out, build_wheel

pytestmark = pytest.mark.slow

CONFIG = "run: {name: r}\nactor: {path: m}\ndata: {train: {path: d.jsonl}}\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command that succeeds."""
    words = list(map(str, command))
    ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=START_SECONDS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def interpreter(release: str) -> str:
    """A Python of this release that starts: on PATH, or one of pyenv's, whose commands start only chosen ones."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in (f"python{release}", *map(str, sorted(pyenv.glob(f"versions/{release}.*/bin/python")))):
        if shutil.which(python) and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    pytest.skip(f"no Python {release} on PATH or in {pyenv}")


@pytest.mark.parametrize("release", ["3.11", "3.12", "3.13"])
def test_the_bare_wheel_works(release: str, wheel: Path, tmp_path: Path) -> None:
    run(interpreter(release), "-m", "venv", "--without-pip", "venv", folder=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    (tmp_path / "run.yaml").write_text(CONFIG)
    pip = (sys.executable, "-m", "pip", "--python", binaries / "python")
    run(*pip, "install", "--quiet", "--no-compile", wheel, folder=tmp_path)
    assert "launch" in run(binaries / "penstock", "--help", folder=tmp_path)
    assert "group_size" in run(binaries / "penstock", "config", "--config", "run.yaml", folder=tmp_path)
    run(binaries / "python", IMPORT_ALL, "penstock_launch.__main__", *bare_leaves_out(), folder=tmp_path)
