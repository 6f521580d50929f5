"""The text of a lock, which pip reads as a requirements file, and of constraints. Pure functions.

A lock has one line per package, with the hash of each file that may be installed:

    numpy==2.4.6 \\
        --hash=sha256:...
    scipy==1.18.1 ; python_version == "3.12" \\
        --hash=sha256:...

Because of the hashes pip takes these files and no others. A package index may have a build for CPUs under the same
version, which pip would prefer: 2.14.1+cpu counts as newer than 2.14.1.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PIN = re.compile(r"""^([\w.-]+)==([^\s;\\]+)(?:\s*;\s*python_version == "([\d.]+)")?""", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A version of a package, with the SHA-256 hashes of the files that fit. num_bytes: the size of the largest."""

    name: str
    version: str
    hashes: tuple[str, ...]
    num_bytes: int


Resolution = Mapping[str, Package]  # by name: what one version of Python needs


def plain_name(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str, python: str) -> dict[str, str]:
    """Version by plain name, of constraints or a lock, for a version of Python (`3.11`)."""
    return {plain_name(name): version for name, version, only in PIN.findall(text) if only in ("", python)}


def render(introduction: Sequence[str], from_source: Iterable[str], resolutions: Mapping[str, Resolution]) -> str:
    """The lock of these resolutions, by version of Python. `from_source`: packages that have no wheel."""
    names = sorted({name for packages in resolutions.values() for name in packages})
    lines = [f"# {line}" for line in introduction]
    lines += [f"# Python {python}: {_extent(packages)}." for python, packages in resolutions.items()]
    lines.append("--only-binary :all:")
    lines += [f"--no-binary {name}" for name in sorted(from_source) if name in names]
    for name in names:
        lines += _entries({python: packages[name] for python, packages in resolutions.items() if name in packages},
                          len(resolutions))  # fmt: skip
    return "\n".join(lines) + "\n"


def _extent(packages: Resolution) -> str:
    return f"{len(packages)} packages, {sum(each.num_bytes for each in packages.values()) / 1e9:.1f} GB to download"


def _entries(by_python: Mapping[str, Package], num_pythons: int) -> list[str]:
    """The lines of one package; without a marker if each Python has the same version."""
    first = next(iter(by_python.values()))
    if len(by_python) == num_pythons and all(each.version == first.version for each in by_python.values()):
        hashes = sorted({each for package in by_python.values() for each in package.hashes})
        return _entry(f"{first.name}=={first.version}", hashes)
    return [
        line
        for python, package in by_python.items()
        for line in _entry(f'{package.name}=={package.version} ; python_version == "{python}"', package.hashes)
    ]


def _entry(requirement: str, hashes: Sequence[str]) -> list[str]:
    parts = [requirement, *(f"    --hash=sha256:{each}" for each in hashes)]
    return [f"{part} \\" for part in parts[:-1]] + parts[-1:]
