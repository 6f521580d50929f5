"""`make envs` makes environments of one form, for this host. The interpreter is a stand-in that notes its calls."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.gpus import FakeGpu, host_with_gpus, host_with_smi
from tests.patience import START_SECONDS

ROOT = Path(__file__).parents[3]
NO_GPU = "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9"
LOCKS = {".venv": "constraints/services-cuda.txt", ".venv-sglang": "sglang-cuda.txt"}
ENVS = Path("deploy/launch/penstock_launch/envs")
# Answers `-m venv FOLDER` with a copy of itself, as venv does; notes what pip is asked for; fails if there
# is `broken`; misses what is in `lacking`.
PYTHON = """#!/bin/sh
case "$*" in
--version) echo "Python $VERSION" ;;
"-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
"-c import sys;"*) exit $TOO_OLD ;;
"-c import platform"*) printf "$VERSION|linux|x86_64|glibc|2.36" ;;
"$ENVS/environment.py "*) exec "$REAL" "$@" ;;
"-m pip "*" check") echo "$0 $*" >> calls; cat lacking 2>/dev/null && exit 1; echo "No broken requirements found." ;;
"-m pip "*) echo "$0 $*" >> calls; [ ! -e broken ] ;;
*) echo "not known: $*" >&2; exit 2 ;;
esac
"""


@dataclass
class Checkout:
    """A copy of what `make envs` reads, on a host of its own."""

    folder: Path
    environ: Mapping[str, str]
    python: dict[str, str] = field(default_factory=lambda: {"VERSION": "3.11.7", "TOO_OLD": "0"})

    def make(self, *arguments: str, fails: bool = False) -> str:
        ran = subprocess.run(
            ["make", "envs", f"PYTHON={self.folder / 'python'}", *arguments],
            cwd=self.folder,
            env={**self.environ, **self.python, "REAL": sys.executable, "ENVS": str(ENVS)},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
        output = ran.stdout + ran.stderr
        assert (ran.returncode != 0) == fails, output
        return output

    def installed(self) -> dict[str, list[str]]:
        """What pip was asked for since the last call, by environment."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        found: dict[str, list[str]] = {}
        for line in lines:
            python, *words = line.split()
            asked = " ".join(words).removeprefix("-m pip --disable-pip-version-check ")
            asked = asked.removeprefix("install --quiet ").replace(f"{(self.folder / ENVS).resolve()}/", "")
            found.setdefault(Path(python).parts[-3], []).append(asked)
        return found

    def forms(self) -> list[str]:
        return [(self.folder / name / ".ready").read_text().strip() for name in LOCKS]


def checkout(tmp_path: Path, environ: Mapping[str, str]) -> Checkout:
    folder = tmp_path / "checkout"
    (folder / "constraints").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", *(f"constraints/{path.name}" for path in ROOT.glob("constraints/*"))):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / ENVS, folder / ENVS, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    own = {name: value for name, value in environ.items() if not name.startswith(("MAKE", "CUDA", "MFLAGS"))}
    return Checkout(folder, own)


@pytest.fixture
def with_gpu(tmp_path: Path) -> Checkout:
    return checkout(tmp_path, host_with_gpus(tmp_path / "bin", [FakeGpu()]))


@pytest.fixture
def without_gpu(tmp_path: Path) -> Checkout:
    return checkout(tmp_path, host_with_smi(tmp_path / "bin", NO_GPU))


def appears(host: Checkout, tmp_path: Path) -> None:
    """A GPU appears on this host."""
    host_with_gpus(tmp_path / "bin", [FakeGpu()])


def assert_from_locks(installed: Mapping[str, list[str]]) -> None:
    """Each environment from its lock alone, and nothing is missing in it."""
    own = "--no-deps --no-build-isolation --editable ."
    assert installed == {
        ".venv": [f"--no-deps --requirement {LOCKS['.venv']}", own, "check"],
        ".venv-sglang": [f"--no-deps --requirement {LOCKS['.venv-sglang']}", "check"],
    }


def test_a_host_with_a_gpu_gets_the_cuda_form_from_the_locks(with_gpu: Checkout) -> None:
    with_gpu.make()
    assert_from_locks(with_gpu.installed())
    assert with_gpu.forms() == ["cuda", "cuda"]
    assert "NVIDIA GPU" not in with_gpu.make()
    assert with_gpu.installed() == {}


def test_a_host_whose_driver_fails_gets_the_cpu_form(without_gpu: Checkout) -> None:
    without_gpu.make()
    installed = without_gpu.installed()
    services, sglang = "--constraint constraints/services.txt", "--constraint sglang.txt"
    assert installed == {
        ".venv": [f"{services} torch hatchling", f"{services} --no-build-isolation --editable .[all,dev]"],
        ".venv-sglang": [
            f"{sglang} torch",
            f"{sglang} --requirement sglang-requirements.txt",
            f"{sglang} --no-deps sglang torchvision",
        ],
    }
    assert without_gpu.forms() == ["cpu", "cpu"]


def test_environments_stay_if_a_gpu_appears_and_make_says_how_to_change_them(
    without_gpu: Checkout, tmp_path: Path
) -> None:
    without_gpu.make()
    without_gpu.installed()
    appears(without_gpu, tmp_path)
    assert "`make envs CUDA=1` makes them anew" in without_gpu.make()
    (without_gpu.folder / ".venv" / ".ready").write_text("")  # as before there were forms
    assert "`make envs CUDA=1` makes them anew" in without_gpu.make()
    assert without_gpu.installed() == {}


def test_another_form_begins_with_empty_environments(without_gpu: Checkout) -> None:
    without_gpu.make()
    without_gpu.installed()
    left = [without_gpu.folder / name / "package-of-the-other-form" for name in LOCKS]
    for path in left:
        path.touch()
    without_gpu.make("CUDA=1")
    assert_from_locks(without_gpu.installed())
    assert without_gpu.forms() == ["cuda", "cuda"]
    assert not any(path.exists() for path in left)
    without_gpu.make()
    assert without_gpu.installed() == {}


def test_an_interrupted_form_is_not_mixed_with_the_next(with_gpu: Checkout) -> None:
    (with_gpu.folder / "broken").touch()
    with_gpu.make(fails=True)
    (with_gpu.folder / "broken").unlink()
    left = with_gpu.folder / ".venv" / "half-a-package"
    left.touch()
    with_gpu.make()
    assert left.exists()
    with_gpu.make("CUDA=0")
    assert with_gpu.forms() == ["cpu", "cpu"]
    assert not left.exists()


def test_an_environment_that_lacks_a_package_is_not_ready(with_gpu: Checkout) -> None:
    (with_gpu.folder / "lacking").write_text("sglang 0.5.23 requires torch, which is not installed.\n")
    assert "sglang 0.5.23 requires torch" in with_gpu.make(fails=True)
    (with_gpu.folder / "lacking").unlink()
    with_gpu.make()
    assert with_gpu.forms() == ["cuda", "cuda"]


def test_both_environments_have_one_form(with_gpu: Checkout) -> None:
    with_gpu.make("CUDA=0")
    shutil.rmtree(with_gpu.folder / ".venv-sglang")
    with_gpu.make()
    assert with_gpu.forms() == ["cpu", "cpu"]


def test_the_cuda_form_is_refused_for_a_python_without_a_lock(with_gpu: Checkout) -> None:
    with_gpu.python |= {"VERSION": "3.13.0"}
    output = with_gpu.make(fails=True)
    assert "found Python 3.13.0" in output
    assert "need Python 3.11 or 3.12 on Linux x86-64" in output
    assert with_gpu.installed() == {}
    with_gpu.make("CUDA=0")


@pytest.mark.parametrize("value", ["yes", "2"])
def test_a_form_that_does_not_exist_is_refused(with_gpu: Checkout, value: str) -> None:
    assert f"CUDA={value}: expected 1" in with_gpu.make(f"CUDA={value}", fails=True)


def test_a_shells_own_variable_chooses_no_form(with_gpu: Checkout) -> None:
    with_gpu.environ = {**with_gpu.environ, "CUDA": "/usr/local/cuda"}
    with_gpu.make()
    assert with_gpu.forms() == ["cuda", "cuda"]
