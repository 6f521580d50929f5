"""Parts of the memory that a process needs, before it starts.

trainer_memory, engine_memory:  configuration, model's shape -> MemoryNeed of a process
fit:                            needs of all processes, GPUs   -> what is refused, what is warned of
"""

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
MIB = 2**20
CONTEXT_BYTES = GIB // 2
"""Assumption: what the driver, CUDA's context and its libraries take of a GPU for each process."""


@dataclass(frozen=True)
class Part:
    """A part of a need. key: what changes it. certain: whether it is there in any step, whatever the batch holds."""

    name: str
    num_bytes: int
    key: str
    certain: bool = False


@dataclass(frozen=True)
class MemoryNeed:
    """The memory of one process at its peak.

    >>> need = MemoryNeed("trainer", (Part("master weights", 3 * GIB, "actor.path", True), Part("rest", GIB, "-")))
    >>> need.num_bytes // GIB, need.certain_bytes // GIB
    (4, 3)
    """

    process: str
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def certain_bytes(self) -> int:
        """Of parts that no batch is too small to need."""
        return sum(part.num_bytes for part in self.parts if part.certain)

    def of(self, name: str) -> int:
        """Bytes of a part; 0 if there is none."""
        return sum(part.num_bytes for part in self.parts if part.name == name)


def table(needs: Sequence[MemoryNeed]) -> list[str]:
    """One line for each part: process, part, GiB, the keys to change. Nothing without needs."""
    if not needs:
        return []
    rows = [("process", "part", "GiB", "keys")]
    for need in needs:
        rows += [(need.process, part.name, in_gib(part.num_bytes), part.key) for part in need.parts if part.num_bytes]
        rows.append((need.process, "together", in_gib(need.num_bytes), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]


def in_gib(num_bytes: int) -> str:
    """As `12.3`; small ones as `0.04`."""
    return f"{num_bytes / GIB:.1f}" if num_bytes >= GIB else f"{num_bytes / GIB:.2f}"
