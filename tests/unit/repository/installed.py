"""A folder with exactly the distributions that an environment would hold, made of links to those installed here.

Owns the closure of requirements by the metadata of what is installed, and the folder. Invariant: a module can be
imported from the folder only if one of these distributions brings it; this project is there as its wheel.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

from tests.unit.repository.dockerfile import Install, project

Names = frozenset[str]


def normalized(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def here(site: Path) -> Mapping[str, Distribution]:
    """The distributions of a site-packages folder by name."""
    return {normalized(each.metadata["Name"]): each for each in distributions(path=[str(site)])}


def closure(site: Path, installs: Iterable[Install]) -> Names:
    """What the installs bring. AssertionError if something of it is not installed in `site`."""
    found: set[str] = set()
    for install in installs:
        for line in install.requirements:
            _add(site, Requirement(line), install.with_dependencies, found)
    return frozenset(name for name in found if "[" not in name)


def _add(site: Path, wanted: Requirement, with_dependencies: bool, found: set[str]) -> None:
    """Add a requirement with all that it needs. `found` also notes each extra, as `name[extra]`."""
    name = normalized(wanted.name)
    for key, extra in ((name, ""), *((f"{name}[{extra}]", extra) for extra in sorted(wanted.extras))):
        if key in found:
            continue
        found.add(key)
        if not with_dependencies:
            continue
        for needed in _dependencies(site, name):
            if needed.marker is None and extra:
                continue  # found without the extra
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                _add(site, needed, with_dependencies, found)


def _dependencies(site: Path, name: str) -> list[Requirement]:
    if name == project()["name"]:
        return _own_dependencies()
    assert name in here(site), f"{name} is not installed in {site}: run `make envs`"
    return list(map(Requirement, here(site)[name].requires or []))


def _own_dependencies() -> list[Requirement]:
    """Those of this project as its wheel has them: each of an extra with a marker."""
    found = list(map(Requirement, project()["dependencies"]))
    for extra, lines in project()["optional-dependencies"].items():
        for needed in map(Requirement, lines):
            needed.marker = Marker(f"{f'({needed.marker}) and ' if needed.marker else ''}extra == '{extra}'")
            found.append(needed)
    return found


def link(site: Path, names: Names, wheel: Path, folder: Path) -> None:
    """Make `folder` the site-packages of these distributions. wheel: this project's, unpacked."""
    folder.mkdir()
    owners: dict[tuple[str, ...], set[str]] = {}
    for name, distribution in here(site).items():
        if name == project()["name"]:  # here it is the checkout
            continue
        for file in distribution.files or ():
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            for length in range(1, len(file.parts) + 1):
                owners.setdefault(file.parts[:length], set()).add(name)
    _link(site, folder, (), owners, names)
    if project()["name"] in names:
        for entry in wheel.iterdir():
            (folder / entry.name).symlink_to(entry)


def _link(
    site: Path, folder: Path, path: tuple[str, ...], owners: Mapping[tuple[str, ...], set[str]], names: Names
) -> None:
    """Link what belongs to `names` alone; of a folder that others share, what is in it."""
    for entry in site.joinpath(*path).iterdir():
        inside = (*path, entry.name)
        of = owners.get(inside, set())
        if not of & names:
            continue
        if of <= names or not entry.is_dir():
            folder.joinpath(*inside).symlink_to(entry)
        else:
            folder.joinpath(*inside).mkdir()
            _link(site, folder, inside, owners, names)
