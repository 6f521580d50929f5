"""Step files as a reader sees them: the groups that a step was trained on.

Invariant: only files that the ledger names are read, by a name that leads nowhere else, and a reader holds two of them
at most. A file that was pruned, damaged or left behind by another life is an error that says so.
"""

import re
from collections import OrderedDict
from pathlib import Path

import msgspec
import xxhash

from penstock.contracts import ScoredGroup
from penstock.contracts.step_file import StepFile
from penstock.errors import DataError
from penstock.records.files import STEP_FILES
from penstock.records.step_numbers import number_of
from penstock.view.tickets import Committed

NAME = re.compile(r"\d{8,}\.\d+\.pack")
MOST_HELD = 2  # one that is looked at, and one to compare it with
LARGEST_BYTES = 2**30  # a reader beside a training must leave it its memory


class StepFileReader:
    """Reads the step files of a run."""

    def __init__(self, folder: Path, most_held: int = MOST_HELD) -> None:
        self._folder = folder / STEP_FILES
        self._most_held = most_held
        self._held: OrderedDict[tuple[str, str], tuple[ScoredGroup, ...]] = OrderedDict()

    def groups(self, record: Committed) -> tuple[ScoredGroup, ...]:
        """The groups of a committed step, in the order in which they are trained. DataError if they cannot be had."""
        key = (record.file, record.digest)
        if key not in self._held:
            groups = self._read(record)
            while len(self._held) >= self._most_held:
                self._held.popitem(last=False)
            self._held[key] = groups
        self._held.move_to_end(key)
        return self._held[key]

    def _read(self, record: Committed) -> tuple[ScoredGroup, ...]:
        step = f"step {number_of(record.step)}"
        if not NAME.fullmatch(record.file):
            raise DataError(f"{step}: its file is called {record.file!r}; expected <step>.<lease>.pack")
        path = self._folder / record.file
        try:
            if (size := path.stat().st_size) > LARGEST_BYTES:
                raise DataError(f"{step}: its file has {size:,} bytes; expected at most {LARGEST_BYTES:,}")
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"{step}: its file is gone: pruned by checkpoint.keep_step_bytes, or not copied; expected "
                f"{path.name} in {self._folder}"
            ) from None
        except OSError as error:
            raise DataError(f"{step}: {path} cannot be read ({error.strerror})") from None
        if (digest := xxhash.xxh3_64_hexdigest(data)) != record.digest:
            raise DataError(f"{step}: {path.name} has digest {digest}; the ledger records {record.digest}")
        try:
            return msgspec.msgpack.decode(data, type=StepFile).groups
        except msgspec.MsgspecError as error:
            raise DataError(f"{step}: {path.name} is of another release ({error})") from None
