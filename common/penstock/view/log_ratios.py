"""The log-ratios of a step as a reader sees them: of each sampled token, trainer minus sampler.

Invariant: only a file that is of the step's own groups counts: it names the digest of their file, and has as many
tokens. Anything else is a step of which none were recorded, with the reason; and never more than two files are held.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock.contracts import ScoredGroup
from penstock.contracts.log_ratios import BYTES_A_TOKEN, SUFFIX, LogRatiosFile, unpack_log_ratios
from penstock.records.files import STEP_FILES
from penstock.view.step_files import MOST_HELD, NAME
from penstock.view.tickets import Committed


@dataclass(frozen=True)
class Largest:
    """The value of a group that is farthest from 0; completion: whose. place: among its sampled tokens."""

    value: float
    completion: int
    place: int


class StepLogRatios:
    """Those of one step. missing: why there are none; else empty."""

    def __init__(self, groups: Sequence[Sequence[bytes]], missing: str = "") -> None:
        self.missing = missing
        self._groups = groups
        self._largest: dict[int, list[Largest | None]] = {}

    def of(self, group: int, completion: int) -> list[float | None] | None:
        """Of each sampled token of a trajectory, None: not computed. None in place of all: no token was."""
        data = self._groups[group][completion] if not self.missing else b""
        return [None if math.isnan(value) else value for value in unpack_log_ratios(data)] if data else None

    def largest(self, group: int) -> list[Largest | None]:
        """Of each trajectory of a group; None: no token of it was computed."""
        if self.missing:
            return []
        if group not in self._largest:
            row = self._groups[group]
            self._largest[group] = [_largest(unpack_log_ratios(data), place) for place, data in enumerate(row)]
        return self._largest[group]


def largest_of(found: Sequence[Largest | None]) -> Largest | None:
    """The one that is farthest from 0."""
    return max((each for each in found if each is not None), key=lambda each: abs(each.value), default=None)


def _largest(values: Sequence[float], completion: int) -> Largest | None:
    computed = [value for value in values if value == value]  # nan differs from itself
    if not computed:
        return None
    value = max(max(computed), min(computed), key=abs)
    return Largest(value, completion, values.index(value))


class LogRatioReader:
    """Reads the log-ratios of a run's steps."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / STEP_FILES
        self._held: OrderedDict[tuple[str, str], StepLogRatios] = OrderedDict()

    def of(self, record: Committed, groups: Sequence[ScoredGroup]) -> StepLogRatios:
        """Those of a step, with these groups. A file that is not there yet is looked for again."""
        key = (record.file, record.digest)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        found = self._read(record, groups)
        if not found.missing:
            while len(self._held) >= MOST_HELD:
                self._held.popitem(last=False)
            self._held[key] = found
        return found

    def _read(self, record: Committed, groups: Sequence[ScoredGroup]) -> StepLogRatios:
        if not NAME.fullmatch(record.file):
            return StepLogRatios((), f"its step file is called {record.file!r}")
        path = self._folder / Path(record.file).with_suffix(SUFFIX)
        lengths = [[each.num_tokens * BYTES_A_TOKEN for each in group.group.trajectories] for group in groups]
        try:
            if path.stat().st_size > 2 * sum(map(sum, lengths)) + 2**20:
                return StepLogRatios((), f"{path.name} is larger than the log-ratios of this step")
            found = msgspec.msgpack.decode(path.read_bytes(), type=LogRatiosFile)
        except FileNotFoundError:
            return StepLogRatios(
                (), f"there is no {path.name}: a crash lost it, or an earlier release trained the step"
            )
        except (OSError, msgspec.MsgspecError) as error:
            return StepLogRatios((), f"{path.name} cannot be read ({error})")
        if found.digest != record.digest:
            return StepLogRatios((), f"{path.name} is of a step file with digest {found.digest}, not {record.digest}")
        if not _fit(found.groups, lengths):
            return StepLogRatios((), f"{path.name} has other numbers of tokens than the step file")
        return StepLogRatios(found.groups)


def _fit(groups: Sequence[Sequence[bytes]], lengths: Sequence[Sequence[int]]) -> bool:
    """Whether each trajectory has a value for each token, or none."""
    if [len(row) for row in groups] != [len(row) for row in lengths]:
        return False
    pairs = (
        (data, size) for row, sizes in zip(groups, lengths, strict=True) for data, size in zip(row, sizes, strict=True)
    )
    return all(len(data) in (0, size) for data, size in pairs)
