"""What the stages of deploy/docker/Dockerfile install, read from the Dockerfile itself.

Owns the reading of its instructions. Understood is what this Dockerfile uses; anything else that would install a
package is an error, so that no test passes because an instruction was not seen.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from deploy.locks.__main__ import ENVS, FOLDER

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
PREFIX = "/opt/penstock"  # the services' environment in each image
PIP_VALUES = ("--constraint", "--requirement", "--python", "--wheel-dir", "--dest")  # options of pip with a value


@dataclass(frozen=True)
class Instruction:
    """One instruction, with continued lines joined: `RUN`, and the rest."""

    word: str
    rest: str


@dataclass(frozen=True)
class Stage:
    """One stage. `base`: another stage, or an image with the build arguments' defaults filled in."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def all_of(self, word: str) -> list[str]:
        """The rest of each instruction of this kind, in order."""
        return [each.rest for each in self.instructions if each.word == word]


@dataclass(frozen=True)
class Install:
    """One `pip install` into the environment `prefix`: its requirements, and which versions of them."""

    prefix: str
    requirements: tuple[str, ...]
    constraint: str
    with_dependencies: bool


@dataclass
class _Pip:
    """The arguments of one pip command."""

    options: dict[str, list[str]] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)


@cache
def project() -> dict[str, Any]:
    """`[project]` of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


@cache
def defaults() -> dict[str, str]:
    """The build arguments before the first stage, with their defaults."""
    before = DOCKERFILE.read_text(encoding="utf-8").partition("\nFROM ")[0]
    return dict(re.findall(r"^ARG (\w+)=(.*)$", before, re.MULTILINE))


@cache
def stages() -> dict[str, Stage]:
    """All stages by name, in order."""
    found: dict[str, Stage] = {}
    name, base, instructions = "", "", list[Instruction]()

    def close() -> None:
        if name:
            found[name] = Stage(name, base, tuple(instructions))

    for each in _instructions():
        if each.word != "FROM":
            instructions.append(each)
            continue
        close()
        image, _, name = each.rest.partition(" AS ")
        base, instructions = re.sub(r"\$\{(\w+)\}", lambda found: defaults()[found[1]], image), []
    close()
    return found


def versions_file(name: str) -> Path:
    """A list of versions or packages: of the services, or SGLang's, which come with the wheel."""
    [found] = [folder / name for folder in (FOLDER, ENVS) if (folder / name).is_file()]
    return found


def finals() -> dict[str, Stage]:
    """The stages that are images of services: those with an entry point."""
    return {name: stage for name, stage in stages().items() if stage.all_of("ENTRYPOINT")}


def lineage(name: str) -> Iterator[Stage]:
    """The stage, its base, the base's base, ... as far as they are stages."""
    while name in stages():
        yield stages()[name]
        name = stages()[name].base


def value_of(name: str, word: str) -> str:
    """What a stage has or inherits: the last `ENTRYPOINT`, `USER` or `WORKDIR`."""
    return next(values[-1] for stage in lineage(name) if (values := stage.all_of(word)))


def environment_of(name: str) -> dict[str, str]:
    """The variables that a stage sets or inherits from other stages; what they inherit from an image stays `$NAME`."""
    variables: dict[str, str] = {}
    for stage in reversed(list(lineage(name))):
        for line in stage.all_of("ENV"):
            variables |= dict(part.split("=", 1) for part in shlex.split(line))
    return variables


def installs(name: str, prefix: str) -> list[Install]:
    """What `prefix` of a stage holds: its own installs, those of its base, and those of stages it is copied from."""
    found: list[Install] = []
    for stage in reversed(list(lineage(name))):
        for each in stage.instructions:
            if each.word == "COPY" and (copied := re.fullmatch(rf"--from=(\S+) {prefix} {prefix}", each.rest)):
                found += installs(copied[1], prefix)
            if each.word == "RUN":
                found += [install for install in _installs(each.rest) if install.prefix == prefix]
    return found


def _instructions() -> Iterator[Instruction]:
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield Instruction(word, " ".join(rest.split()))


def _installs(script: str) -> Iterator[Install]:
    """The installs of one RUN."""
    for command in re.split(r"&&|;|\|\|", script):
        if not re.search(r"\bpip\b.* install ", command):
            continue
        pip = _pip(command)
        if "--python" not in pip.options:  # a tool of the build, which is in no image
            continue
        [python] = pip.options["--python"]
        [constraint] = pip.options.get("--constraint", [""])
        requirements = [line for path in pip.options.get("--requirement", []) for line in _lines(path)]
        yield Install(
            python.removesuffix("/bin/python"),
            (*requirements, *(_named(word) for word in pip.words)),
            Path(constraint).name,
            "--no-deps" not in pip.flags,
        )


def _pip(command: str) -> _Pip:
    pip = _Pip()
    words = iter(shlex.split(command[command.index("pip") :])[1:])
    for word in words:
        if word in PIP_VALUES:
            pip.options.setdefault(word, []).append(next(words))
        elif word.startswith("-"):
            pip.flags.add(word)
        elif word != "install":
            pip.words.append(word)
    return pip


def _named(word: str) -> str:
    """A requirement; the wheel of this project is its name."""
    return project()["name"] if Path(word).name == f"{project()['name']}-*.whl" else word


@cache
def _lines(path: str) -> tuple[str, ...]:
    """The requirements of a list: one that the stage `requirements` writes, or one of the repository."""
    name = Path(path).name
    written = {
        target: arguments.split()
        for script in stages()["requirements"].all_of("RUN")
        for arguments, target in re.findall(r"python requirements\.py ([\w -]+) > (\S+)", script)
    }
    if name in written:
        command = [sys.executable, str(ROOT / "deploy" / "docker" / "requirements.py"), *written[name]]
        text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    else:
        text = versions_file(name).read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))
