"""Asks uv which versions fit together on Linux x86-64 with CUDA, and which wheels they have.

uv resolves for a Python and a platform that this host need not have. Each call reads the package index.
"""

import subprocess
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.locks.lockfile import Package, Resolution, plain_name

PLATFORM = "x86_64-manylinux_2_34"  # glibc 2.34: that of SGLang's wheels
FROM_SOURCE = ("cellpylib", "pycosat", "zss")  # reasoning-gym asks for them; none has a wheel for Linux


@dataclass(frozen=True)
class Inputs:
    """What is resolved: requirement files, with `options` of `uv pip compile` for them.

    must: versions that are taken or the resolution fails. rather: versions that are taken if they fit.
    """

    sources: Sequence[Path]
    options: Sequence[str]
    must: Mapping[str, str]
    rather: Mapping[str, str]


def resolve(uv: Path, inputs: Inputs, python: str) -> Resolution:
    """All packages, with their wheels. CalledProcessError if they do not fit together; uv has said why."""
    with tempfile.TemporaryDirectory() as folder:
        must, chosen, wheels = (Path(folder, name) for name in ("must.txt", "chosen.txt", "pylock.toml"))
        must.write_text(_constraints(inputs.must), encoding="utf-8")
        chosen.write_text(_constraints(inputs.rather), encoding="utf-8")  # uv keeps what its output has, if it fits
        _compile(uv, inputs, python, must, ["--output-file", str(chosen)])
        _compile(uv, inputs, python, chosen, ["--format", "pylock.toml", "--output-file", str(wheels)])
        return read_resolution(wheels.read_text(encoding="utf-8"))


def _compile(uv: Path, inputs: Inputs, python: str, constraints: Path, output: Sequence[str]) -> None:
    command = [str(uv), "pip", "compile", *map(str, inputs.sources), *inputs.options, "--constraint", str(constraints)]
    command += ["--python-version", python, "--python-platform", PLATFORM, "--no-python-downloads"]
    command += ["--only-binary", ":all:", *(part for name in FROM_SOURCE for part in ("--no-binary", name))]
    subprocess.run([*command, "--no-header", "--no-annotate", "--quiet", *output], check=True)


def read_resolution(pylock: str) -> dict[str, Package]:
    """The packages of a pylock.toml (PEP 751)."""
    return {plain_name(each["name"]): _package(each) for each in tomllib.loads(pylock)["packages"]}


def _package(entry: Mapping[str, Any]) -> Package:
    files = entry.get("wheels") or [entry["sdist"]]
    hashes = tuple(sorted(file["hashes"]["sha256"] for file in files))
    return Package(plain_name(entry["name"]), entry["version"], hashes, max(file.get("size", 0) for file in files))


def _constraints(versions: Mapping[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in versions.items())
