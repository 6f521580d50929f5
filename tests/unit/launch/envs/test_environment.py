"""How a folder becomes SGLang's environment, with a stand-in for the interpreter and its pip."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from penstock_launch.envs import environment
from penstock_launch.envs.environment import (
    InstallError,
    Interpreter,
    RefusedError,
    ask,
    form_of,
    make,
    refuse_unfit,
)
from tests.patience import ANSWER_SECONDS, START_SECONDS
from tests.unit.launch.envs.stand_in import StandIn

FIT = Interpreter("python", "3.12.1", "linux", "x86_64", "glibc", "2.36")
FOR_CPUS = [
    "install --quiet --constraint sglang.txt torch",
    "install --quiet --constraint sglang.txt --requirement sglang-requirements.txt",
    "install --quiet --constraint sglang.txt --no-deps sglang torchvision",
]
FOR_CUDA = ["install --quiet --no-deps --requirement sglang-cuda.txt", "check"]


@pytest.fixture
def host(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sglang"


def made(folder: Path, form: str, host: StandIn) -> list[str]:
    lines: list[str] = []
    assert make(folder, form, str(host.python), lines.append) == folder / "bin" / "python"
    return lines


def test_this_interpreter_answers() -> None:
    found = ask(sys.executable)
    assert (found.version, found.machine) == (".".join(map(str, sys.version_info[:3])), os.uname().machine)
    refuse_unfit(found, "cpu")


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        ({"version": "3.10.13"}, "cpu", r"needs Python >= 3\.11; found Python 3\.10\.13 \(python\)"),
        ({"version": "2.7.18"}, "cuda", r"needs Python >= 3\.11; found Python 2\.7\.18"),
        (
            {"version": "3.13.0"},
            "cuda",
            r"need Python 3\.11 or 3\.12 on Linux x86-64 with glibc >= 2\.34; found .*3\.13",
        ),
        ({"machine": "aarch64"}, "cuda", "found Python 3.12.1 .* on linux aarch64"),
        ({"libc": "", "libc_version": ""}, "cuda", "glibc >= 2.34"),
        ({"libc_version": "2.31"}, "cuda", "found .*glibc 2.31"),
    ],
)
def test_an_interpreter_that_does_not_fit_is_refused(change: dict[str, str], form: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        refuse_unfit(replace(FIT, **change), form)


def test_interpreters_that_fit() -> None:
    for version in ("3.11.0", "3.12.9"):
        refuse_unfit(replace(FIT, version=version), "cuda")
    refuse_unfit(replace(FIT, version="3.13.0", machine="aarch64", libc=""), "cpu")


def test_what_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="'no-such-python' is no Python interpreter that answers"):
        ask("no-such-python")
    with pytest.raises(RefusedError, match="'false' is no Python interpreter: exit code 1"):
        ask("false")


def test_packages_are_installed_in_order(host: StandIn, folder: Path) -> None:
    lines = made(folder, "cpu", host)
    assert host.calls() == ["venv", *FOR_CPUS]
    assert form_of(folder) == "cpu"
    assert [path.name for path in folder.glob(".[br]*")] == [".ready"]
    assert f"({folder}, Python 3.11.7, for cpu): installing; 2 to 10 minutes" in lines[0]
    assert [line for line in lines if "of 3" in line] == lines[1:4]
    made(folder, "cpu", host)
    assert host.calls() == FOR_CPUS


def test_another_form_and_another_python_begin_with_an_empty_folder(host: StandIn, folder: Path) -> None:
    made(folder, "cpu", host)
    host.calls()
    left = folder / "package"
    left.touch()
    made(folder, "cuda", host)
    assert host.calls() == ["venv", *FOR_CUDA]
    assert not left.exists()
    made(folder, "cuda", StandIn(host.folder, "3.12.1"))
    assert host.calls() == ["venv", *FOR_CUDA]


def test_what_failed_goes_on_and_is_not_ready_before(host: StandIn, folder: Path) -> None:
    (host.folder / "broken").touch()
    with pytest.raises(InstallError, match=r"torch ended with exit code 1"):
        made(folder, "cpu", host)
    assert host.calls() == ["venv", FOR_CPUS[0]]
    assert not (folder / ".ready").exists()
    (host.folder / "broken").unlink()
    made(folder, "cpu", host)
    assert host.calls() == FOR_CPUS


def test_an_interruption_ends_pip_and_the_next_call_goes_on(host: StandIn, folder: Path) -> None:
    (host.folder / "slow").touch()
    command = [sys.executable, environment.__file__, "--cpu", "--folder", str(folder), "--python", str(host.python)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + START_SECONDS
    while FOR_CPUS[0] not in (calls := host.calls()):
        assert time.monotonic() < deadline, calls
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # to it alone: its pip must not stay
    _, errors = process.communicate(timeout=ANSWER_SECONDS)  # which waits for all that hold its output
    assert (process.returncode, errors) == (130, "")
    assert (folder / ".building").read_text() == "cpu\n"
    (host.folder / "slow").unlink()
    made(folder, "cpu", host)
    assert host.calls() == FOR_CPUS


def test_a_slow_step_gives_signs_of_life(host: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SIGN_OF_LIFE_SECONDS", 0.05)
    slow = host.folder / "slow"
    slow.touch()

    def tell(line: str) -> None:
        if re.search(r"torch, \d+:\d\d so far", line):
            slow.unlink(missing_ok=True)

    make(folder, "cpu", str(host.python), tell)  # pip ends no earlier
    assert not slow.exists()


def test_a_folder_with_something_else_is_refused_and_stays(host: StandIn, folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").touch()
    for form in ("cpu", "cuda"):
        with pytest.raises(RefusedError, match="holds something else"):
            made(folder, form, host)
    assert (folder / "thesis.tex").exists()
    with pytest.raises(RefusedError, match="is a file"):
        made(folder / "thesis.tex", "cpu", host)
    with pytest.raises(RefusedError, match="the environment of this command"):
        made(Path(sys.prefix), "cpu", host)
    assert host.calls() == []


def test_an_older_mark_is_of_cpus(host: StandIn, folder: Path) -> None:
    made(folder, "cpu", host)
    (folder / ".ready").write_text("")
    assert form_of(folder) == "cpu"
