"""The limits that the kernel's control groups set on this process: those of a container, a Slurm job, a systemd unit.

Both hierarchies: version 2, and version 1, in which each controller has a tree of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMBERSHIP = "proc/self/cgroup"
TREE = "sys/fs/cgroup"
NO_LIMIT_BYTES = 2**60  # version 1 has a number near 2**63 for none


@dataclass(frozen=True)
class Limits:
    """The lowest limit of the process's own group and those above it; None: there is none."""

    memory_bytes: int | None = None
    cores: float | None = None
    num_processes: int | None = None


def read_limits(root: Path = Path("/")) -> Limits:
    """The limits of this process. root: where proc and sys are."""
    memory, cores, processes = [], [], []
    for folder in _groups(root):
        memory += _numbers(folder, "memory.max") + _numbers(folder, "memory.limit_in_bytes")
        processes += _numbers(folder, "pids.max")
        for quota, period in zip(
            [*_numbers(folder, "cpu.max")[:1], *_numbers(folder, "cpu.cfs_quota_us")],
            [*_numbers(folder, "cpu.max")[1:], *_numbers(folder, "cpu.cfs_period_us")],
            strict=False,
        ):
            cores += [quota / period] if quota > 0 else []  # version 1 has -1 for none
    memory = [size for size in memory if size < NO_LIMIT_BYTES]
    return Limits(min(memory, default=None), min(cores, default=None), min(processes, default=None))


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups and those above them. A container's own group may be the tree's root."""
    try:
        lines = (root / MEMBERSHIP).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        tree = root / TREE / controllers
        below = Path(path.lstrip("/"))
        for group in (below, *below.parents):
            yield tree / group


def _numbers(folder: Path, name: str) -> list[int]:
    """The numbers in a file; none without it, or if it begins with `max`, which means no limit."""
    try:
        words = (folder / name).read_text().split()
    except OSError:
        return []
    return [] if words[:1] == ["max"] else [int(word) for word in words]
