"""A tiny run, trained on the CPU as by the loop; the commands on it, and how to read their output."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from penstock.config import Config
from penstock.config.load import load_config
from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import LedgerState, RunRecord, WeightsRecord
from penstock_launch.__main__ import run
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.learner import Learner
from penstock_trainer.weights.files import published_format
from penstock_trainer.weights.staging import Staging
from tests.unit.trainer.trainer_groups import example_groups

NUM_STEPS = 5
CHECKPOINT_AFTER = 3
SECRET = "a-secret-of-this-run"
RUN = RunRecord("d" * 16, 20, 4, 4, 0)


@dataclass
class RecordedRun:
    """A run's folder, and the commands on it."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "r"

    @property
    def journal(self) -> Journal:
        return Journal(self.path / "steps")

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    def command(self, word: str, *words: str) -> int:
        return run([word, "--config", str(self.config_path), *words])

    def bundle(self, *words: str, name: str = "b.tar") -> Path:
        out = self.folder / name
        assert self.command("bundle", "--out", str(out), *words) == 0
        return out

    def step_file(self, step: int) -> Path:
        return self.path / "steps" / f"{step:08d}.1.pack"

    def change(self, change: Callable[[LedgerState], None]) -> None:
        ledger = self.journal.read()
        change(ledger)
        self.journal.begin(ledger)


def write_config(folder: Path, **changes: object) -> Config:
    document = {
        "run": {"root": str(folder / "runs"), "name": "r"},
        "actor": {"path": str(folder / "model"), "dtype": "float32", "group_size": 4},
        "data": {"train": {"path": "unused.jsonl"}, "batch_size": 4},
        "rollout": {"engine": {"dtype": "float32"}},
        "optimizer": {"lr": 1e-3, "schedule": "linear"},
        "redis": {"url": f"redis://u:{SECRET}@127.0.0.1:1/0", "password": SECRET},
        "token": SECRET,
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return load_config(["--config", str(folder / "config.yaml")], {})


def record(
    folder: Path,
    config: Config,
    then: Config | None = None,
    groups_of: Callable[[int], list[ScoredGroup]] = lambda step: example_groups(seed=step),
) -> None:
    """Train a run as the loop does, but without a queue: file, update, weights, journal, and one checkpoint.

    then: the configuration after the checkpoint; with it, steps have settings, as those of an older run have not.
    """
    path = folder / "runs" / "r"
    learner = Learner(config, num_steps=NUM_STEPS)
    files, checkpoints = StepFiles(path / "steps", 0), Checkpoints(path / "checkpoints", 2)
    digest = Staging(learner, folder / "weights", published_format(config)).digest
    form, settings = ("", "") if then is None else (str(published_format(config)), files.settings.write(config))
    files.journal.begin(LedgerState(run=RUN, weights={0: WeightsRecord(digest(0), 0, form=form)}))
    version = 0
    for step in range(NUM_STEPS):
        committed = files.write(step, 1, groups_of(step), settings=settings)
        result = learner.update(files.read(committed), version=version)
        version += int(result.changed)
        files.journal.append(committed, WeightsRecord(digest(version), step + 1, result.changed, form=form))
        if step + 1 == CHECKPOINT_AFTER:
            meta = CheckpointMeta(step + 1, version, 1, 0, ())
            written = checkpoints.begin(meta)
            learner.snapshot(written).write(written)
            files.journal.append(checkpoints.complete(written, meta))
            if then is not None:
                learner.use(then, num_steps=StepConfigs(then, RUN.dataset_length, files.settings).num_steps(then))
                digest = Staging(learner, folder / "weights", published_format(then)).digest
                form, settings = str(published_format(then)), files.settings.write(then)
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def verdicts(output: str) -> list[tuple[str, bool]]:
    """For each line of a step or start: its name, and whether its digest equals the recorded one."""
    found = re.findall(r"^(start|step +\d+) .*?(equal|DIFFERS|DAMAGED)", output, re.MULTILINE)
    return [(" ".join(name.split()), verdict == "equal") for name, verdict in found]


def equal_from(start: int, end: int = NUM_STEPS) -> list[tuple[str, bool]]:
    """Those of the steps with the ids [start, end)."""
    return [("start", True), *((f"step {step + 1}", True) for step in range(start, end))]
