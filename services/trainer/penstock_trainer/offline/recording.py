"""A recording: the steps of a run that can be trained again.

Owns the choice of these steps, and of the weights from which a replay starts. Invariant: nothing is written; a step
counts if the journal (or the ledger of a run without one) names it and its file exists.

    starts (initial weights, checkpoints)   0 ........... 50 ........... 100
    step files, by id                           pruned    50 51 52 ......... 103      --steps 61:70 starts from 50
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from penstock.config import Config
from penstock.contracts.ledger import LedgerState, RunRecord, StepRecord
from penstock.errors import ConfigError, DataError
from penstock.records.step_numbers import number_of, parse_steps, spans
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles

STEP_FILE = re.compile(r"\d{8}\.\d+\.pack")
DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Plan:
    """Train steps [start, end) from `checkpoint` (None: the initial weights); the requested ones begin at `first`."""

    checkpoint: str | None
    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Recording:
    """The recorded steps of one run. overridden: keys whose value in `config` holds instead of that of the steps."""

    config: Config
    folder: Path
    ledger: LedgerState
    step_files: StepFiles
    checkpoints: Checkpoints
    overridden: Collection[str] = ()

    @property
    def run(self) -> RunRecord:
        if self.ledger.run is None:
            raise DataError(f"{self.folder}: its journal has no record of the run: expected the one that begins it")
        return self.ledger.run

    @property
    def configs(self) -> StepConfigs:
        """The configuration of each step."""
        return StepConfigs(self.config, self.run.dataset_length, self.step_files.settings, self.overridden)

    def config_of(self, step: int) -> Config:
        """The configuration with which a replay trains a recorded step."""
        return self.configs.of(self.steps[step])

    @property
    def steps(self) -> dict[int, StepRecord]:
        """All recorded steps, whether their file exists or not."""
        return {record.step: record for record in self.ledger.steps}

    @property
    def available(self) -> list[int]:
        """Steps whose file exists."""
        return sorted(step for step, record in self.steps.items() if self.step_files.exists(record))

    @property
    def starts(self) -> dict[int, str | None]:
        """Steps -> the checkpoint after them; None for the initial weights."""
        there = {each.steps: each.name for each in self.ledger.checkpoints if self.checkpoints.exists(each)}
        return {0: None, **there}

    def plan(self, asked: str) -> Plan:
        """The plan to train the steps of --steps, or all available ones; an error names the available ones."""
        first, end = parse_steps(asked) if asked else (None, None)
        available, starts = self.available, self.starts
        if not available:
            raise DataError(
                f"{self.folder / 'steps'} holds none of the {len(self.steps)} recorded steps: expected step files; "
                "raise checkpoint.keep_step_bytes before a run to keep them"
            )
        if first is None:
            reachable = [step for step in available if step in starts]
            if not reachable:
                raise DataError(
                    f"step files of {spans(available)} are there, and no weights to start from (those after "
                    f"{_listed(starts)} steps): expected a checkpoint at or before one; raise checkpoint.keep"
                )
            first = reachable[0] if end is None or reachable[0] < end else end - 1
        if end is None:
            end = first + 1
            while end in set(available):
                end += 1
        start = max(steps for steps in starts if steps <= first)
        self._require(range(start, end), first, available, starts)
        return Plan(starts[start], start, first, end)

    def _require(self, needed: range, first: int, available: list[int], starts: dict[int, str | None]) -> None:
        missing = sorted(set(needed) - set(available))
        if not missing:
            return
        recorded = self.steps
        untrained = [step for step in missing if step not in recorded]
        if untrained:
            untrained = [step for step in untrained if step >= first] or untrained
            raise DataError(
                f"--steps: steps {spans(untrained)} are not recorded; expected some of {spans(available)}, whose files "
                "are there"
            )
        lead_in = (
            f" (the start for step {number_of(first)} is after {needed.start} steps)" if first > needed.start else ""
        )
        raise DataError(
            f"--steps: the files of steps {spans(missing)} are gone{lead_in}: pruned by checkpoint.keep_step_bytes, or "
            f"deleted; expected some of {spans(available)}, from weights after {_listed(starts)} steps"
        )


def open_run(config: Config, ask_ledger: Callable[[], LedgerState], overridden: Collection[str] = ()) -> Recording:
    """The recording of run.name in run.root; `ask_ledger` reads the ledger of a run without a journal."""
    folder = Path(config.run.root) / config.run.name
    if not folder.is_dir():
        raise ConfigError(
            f"run {config.run.name!r} is not in {config.run.root}: expected its folder {folder}; check run.name and "
            "run.root"
        )
    return open_folder(config, folder, ask_ledger, overridden)


def open_folder(
    config: Config,
    folder: Path,
    ask_ledger: Callable[[], LedgerState] | None = None,
    overridden: Collection[str] = (),
) -> Recording:
    """The recording in a folder with the layout of a run's folder."""
    step_files = StepFiles(folder / "steps", config.checkpoint.keep_step_bytes)
    journal = step_files.journal
    ledger = ask_ledger() if ask_ledger is not None and not journal.exists else journal.read()
    ledger = journal.with_archive(ledger)
    for record in ledger.steps:
        if not STEP_FILE.fullmatch(record.file):
            raise DataError(f"step {record.number}: its file is called {record.file!r}; expected <step>.<lease>.pack")
        if record.settings and not DIGEST.fullmatch(record.settings):
            raise DataError(f"step {record.number}: its settings are {record.settings!r}; expected 16 hex digits")
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    return Recording(config, folder, ledger, step_files, checkpoints, overridden)


def _listed(starts: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(starts)))
