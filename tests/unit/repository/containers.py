"""Processes that can import the wheel of this project and some distributions, and nothing else: no checkout.

Owns how they start. What they can import is made of what is installed here (`installed`).
"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from tests.patience import START_SECONDS
from tests.unit.repository.dockerfile import ROOT, Install, project
from tests.unit.repository.installed import Names, closure, here, link, normalized

SITE = Path(sysconfig.get_paths()["purelib"])
IMPORT_ALL = Path(__file__).with_name("import_all.py")
ON_RAY = [f"penstock_launch.on_ray.{name}" for name in ("cluster", "host", "remote", "site")]
# What the command imports only after it has asked whether it is there.
CHECKS = [f"penstock_launch.check.{name}" for name in ("command", "few_rows", "generation", "prompts", "rewards")]
ASKED_FOR = ("penstock_trainer.offline", "penstock_trainer.data", "huggingface_hub", *CHECKS)


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout. Needs no network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """What the wheel adds to a site-packages folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


class Containers:
    """Such processes, in a working folder like an image's."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        """wheel: unpacked."""
        self._folder = folder
        self._wheel = wheel
        self._sites: dict[Names, Path] = {}
        self._ran: dict[tuple[Names, tuple[str, ...]], subprocess.CompletedProcess[str]] = {}
        self.work = folder / "penstock"
        self.work.mkdir()
        (self.work / "examples").symlink_to(ROOT / "examples")  # compose mounts it

    def run_once(self, names: Names, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As `run`, but one process stands for all with the same distributions and arguments."""
        if (names, arguments) not in self._ran:
            self._ran[names, arguments] = self.run(names, *arguments)
        return self._ran[names, arguments]

    def run(
        self, names: Names, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """This Python without its site-packages, but with these distributions."""
        if names not in self._sites:
            self._sites[names] = self._folder / f"site-{len(self._sites)}"
            link(SITE, names, self._wheel, self._sites[names])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "PYTHON"))}
        path = os.pathsep.join(map(str, (self.work, self._sites[names])))
        return subprocess.run(
            [sys.executable, "-S", "-P", *arguments],
            cwd=self.work,
            env={**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **(variables or {})},
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )


def left_out(names: Names, present: Iterable[str] = ()) -> list[str]:
    """The modules of extras that an environment leaves out; an extra of `present` is no choice there."""
    extras = project()["optional-dependencies"]
    lines = [line for extra in extras.keys() - set(present) for line in extras[extra]]
    missing = {normalized(Requirement(line).name) for line in lines} - names
    files = [file for name in missing & here(SITE).keys() for file in here(SITE)[name].files or ()]
    return sorted({file.parts[0].removesuffix(".py") for file in files} - {"..", "__pycache__"})


def packages(*extras: str) -> Names:
    """What `pip install 'penstock[extras]'` installs."""
    named = f"[{','.join(extras)}]" if extras else ""
    return closure(SITE, [Install("", (f"{project()['name']}{named}",), "", True)])


def bare_leaves_out(extras: Iterable[str] = ()) -> list[str]:
    """What the command may fail to import without the extras of services, or with these alone."""
    return [*left_out(packages(*extras)), *ASKED_FOR, *ON_RAY]
