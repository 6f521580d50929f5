"""SGLang's environment: its packages, the order in which they are installed, and how a folder becomes it.

    python environment.py --folder .venv-sglang (--cpu | --cuda) [--python python3.12] [--check]

Runs before any package is installed, so it imports the standard library alone. The locks lie beside it.

Owns the folder: `.building` is in it until it is complete, then `.ready`; both hold the form. Invariant: forms never
mix, since pip would leave the packages of the other in place, so another form begins with an empty folder. A folder
that holds anything else is refused. After an interruption the same call goes on.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILDING, READY = ".building", ".ready"
OLDEST = (3, 11)
LOCKED = ((3, 11), (3, 12))  # the Pythons that the lock for CUDA was resolved for
OLDEST_GLIBC = (2, 34)  # that of SGLang's wheels
COST = {
    "cpu": "2 to 10 minutes the first time, 3 GB on disk",
    "cuda": "4 GB to download, 10 minutes or more the first time, 11 GB on disk",
}
# Order matters for CPUs: torchvision's own requirements would replace torch, and sglang's would bring CUDA libraries.
# The lock for CUDA is complete.
INSTALLS = {
    "cpu": (
        ("torch", ("--constraint", "sglang.txt", "torch")),
        ("what SGLang imports", ("--constraint", "sglang.txt", "--requirement", "sglang-requirements.txt")),
        ("SGLang", ("--constraint", "sglang.txt", "--no-deps", "sglang", "torchvision")),
    ),
    "cuda": (("all packages of the lock", ("--no-deps", "--requirement", "sglang-cuda.txt")),),
}
PIP = ("-m", "pip", "--disable-pip-version-check")
PROBE = (
    "import platform as p, sys; "
    "sys.stdout.write('|'.join(('%d.%d.%d' % sys.version_info[:3], sys.platform, p.machine()) + p.libc_ver()))"
)
PROBE_SECONDS = 60.0
SIGN_OF_LIFE_SECONDS = 15.0
END_SECONDS = 10.0  # for pip to remove what it has half installed

Tell = Callable[[str], None]


class RefusedError(Exception):
    """An interpreter or a folder that this environment cannot be made with; nothing was changed."""


class InstallError(Exception):
    """A program that failed; it has said why."""


@dataclass(frozen=True)
class Interpreter:
    """What a Python answers: on which machine, with which C library."""

    path: str
    version: str
    system: str
    machine: str
    libc: str
    libc_version: str

    @property
    def release(self) -> tuple[int, ...]:
        """(3, 11) of 3.11.7."""
        return _numbers(self.version)[:2]

    def __str__(self) -> str:
        return f"Python {self.version} ({self.path}) on {self.system} {self.machine}, {self.libc} {self.libc_version}"


def ask(python: str) -> Interpreter:
    """The interpreter `python`; RefusedError if it does not answer."""
    try:
        ran = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(f"{python!r} is no Python interpreter that answers: {error}") from error
    answer = ran.stdout.split("|")
    if ran.returncode or len(answer) != 5:
        raise RefusedError(f"{python!r} is no Python interpreter: exit code {ran.returncode} {ran.stderr[-200:]}")
    return Interpreter(python, *answer)


def refuse_unfit(found: Interpreter, form: str) -> None:
    """RefusedError if the packages of this form cannot be installed for the interpreter."""
    if found.release < OLDEST:
        raise RefusedError(f"SGLang's environment needs Python >= {_dotted(OLDEST)}; found {found}")
    has_wheels = (found.system, found.machine, found.libc) == ("linux", "x86_64", "glibc")
    if form == "cuda" and not (
        has_wheels and found.release in LOCKED and _numbers(found.libc_version)[:2] >= OLDEST_GLIBC
    ):
        raise RefusedError(
            f"the environments for CUDA need Python {' or '.join(map(_dotted, LOCKED))} on Linux x86-64 with "
            f"glibc >= {_dotted(OLDEST_GLIBC)}; found {found}"
        )


def form_of(folder: Path) -> str | None:
    """cpu or cuda: what the environment in the folder is made for, complete or not; None if there is none."""
    for mark in (folder / BUILDING, folder / READY):
        if mark.is_file():
            return mark.read_text(encoding="utf-8").strip() or "cpu"  # older marks are empty
    return None


def make(folder: Path, form: str, python: str, tell: Tell) -> Path:
    """Make the environment, or finish it; returns its interpreter. RefusedError, InstallError."""
    found = ask(python)
    refuse_unfit(found, form)
    _refuse_folder(folder)
    tell(f"SGLang's environment ({folder}, Python {found.version}, for {form}): installing; {COST[form]}.")
    own = folder / "bin" / "python"
    if form_of(folder) != form or not os.access(own, os.X_OK) or _release_of(folder) not in (None, found.release):
        _run([python, "-m", "venv", "--clear", str(folder)], "an empty environment", tell)
    (folder / BUILDING).write_text(f"{form}\n", encoding="utf-8")
    for number, (what, words) in enumerate(INSTALLS[form], 1):
        tell(f"SGLang's environment: {number} of {len(INSTALLS[form])}: {what}")
        files = [str(HERE / word) if word.endswith(".txt") else word for word in words]
        _run([str(own), *PIP, "install", "--quiet", *files], what, tell)
    if form == "cuda":  # a lock that lacks something would only show when the engine starts
        _run([str(own), *PIP, "check"], "a check of what they ask for", tell)
    (folder / BUILDING).replace(folder / READY)
    tell("SGLang's environment: ready.")
    return own


def _refuse_folder(folder: Path) -> None:
    if folder.resolve() == Path(sys.prefix).resolve():
        raise RefusedError(f"{folder} is the environment of this command; expected a folder of SGLang's own")
    try:
        is_taken = form_of(folder) is None and any(folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise RefusedError(f"{folder} is a file; expected a folder, or a name that is free") from error
    if is_taken:
        raise RefusedError(
            f"{folder} holds something else than an environment that was made here; expected an empty folder, or a "
            "name that is free"
        )


def _release_of(folder: Path) -> tuple[int, ...] | None:
    """(3, 11): of the Python that the environment was made with, as venv notes it."""
    try:
        lines = (folder / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    noted = dict(line.replace(" ", "").split("=", 1) for line in lines if "=" in line)
    return _numbers(noted["version"])[:2] if "version" in noted else None


def _run(command: Sequence[str], what: str, tell: Tell) -> None:
    """Run to the end, with a sign of life now and then. What it started ends with this call, however that ends."""
    started = time.monotonic()
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    process = subprocess.Popen(command, env=environ)
    try:
        while process.poll() is None:
            try:
                process.wait(SIGN_OF_LIFE_SECONDS)
            except subprocess.TimeoutExpired:
                minutes, seconds = divmod(int(time.monotonic() - started), 60)
                tell(f"SGLang's environment: {what}, {minutes}:{seconds:02d} so far")
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        raise InstallError(f"{' '.join(command)} ended with exit code {process.returncode}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def main(argv: Sequence[str] | None = None) -> int:
    """What `make` runs: the exit code, 0 if the environment is made, or for --check could be."""
    parser = argparse.ArgumentParser(description="Make SGLang's environment.")
    form = parser.add_mutually_exclusive_group(required=True)
    for name in INSTALLS:
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name)
    parser.add_argument("--folder", type=Path, default=Path(".venv-sglang"))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--check", action="store_true", help="only whether the interpreter fits")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            refuse_unfit(ask(arguments.python), arguments.form)
        else:
            make(arguments.folder, arguments.form, arguments.python, lambda line: print(line, flush=True))
    except (RefusedError, InstallError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # make says so
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
