"""The environment that affects the bits of a step: versions of libraries, and the kind of processor.

Owns their names.
"""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("penstock", "torch", "transformers", "peft", "numpy")
ABSENT = "absent"


def present_versions() -> dict[str, str]:
    """The versions of this process."""
    found = {name: _version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {**found, "python": platform.python_version(), "machine": platform.machine(), "arithmetic": device}


def differing_versions(recorded: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each difference; each alone may change the digests."""
    for name, here in present_versions().items():
        there = recorded.get(name, ABSENT)
        if there != here:
            yield f"{name} is {here} here and was {there} where the bundle was made: digests may differ for that alone"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT
