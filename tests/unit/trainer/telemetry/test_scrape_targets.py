"""The file in which Prometheus finds the services of a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from penstock.config import RunSection
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock_trainer.telemetry.scrape_targets import ScrapeTargets

TRAINER = ServiceRecord(ServiceKind.TRAINER, "trainer-1", "http://127.0.0.1:8001", 1, "training")
ROLLOUT = ServiceRecord(ServiceKind.ROLLOUT, "rollout-1", "http://[::1]:8002", 2, "serving")


@pytest.fixture
def targets(tmp_path: Path) -> ScrapeTargets:
    return ScrapeTargets(RunSection(name="mine", root=str(tmp_path)))


def read(targets: ScrapeTargets) -> Any:
    return json.loads(targets.path.read_text())


def test_each_service_is_a_target_with_run_and_kind(targets: ScrapeTargets, tmp_path: Path) -> None:
    targets.write([ROLLOUT, TRAINER])
    assert targets.path == tmp_path / "mine.targets.json"
    assert read(targets) == [
        {"targets": ["[::1]:8002"], "labels": {"job": "rollout", "run": "mine"}},
        {"targets": ["127.0.0.1:8001"], "labels": {"job": "trainer", "run": "mine"}},
    ]
    targets.write([TRAINER])
    assert [entry["labels"]["job"] for entry in read(targets)] == ["trainer"]


def test_an_unchanged_file_is_not_written_again(targets: ScrapeTargets) -> None:
    targets.write([TRAINER])
    before = targets.path.stat()
    targets.write([TRAINER])
    assert targets.path.stat().st_ino == before.st_ino
    assert [path.name for path in targets.path.parent.iterdir()] == [targets.path.name]


def test_the_end_of_the_run_removes_it_for_good(targets: ScrapeTargets) -> None:
    targets.write([TRAINER])
    targets.remove()
    targets.write([ROLLOUT])
    assert not targets.path.exists()
    targets.remove()


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    targets = ScrapeTargets(RunSection(name="mine", root=str(tmp_path / "missing")))
    with caplog.at_level(logging.WARNING):
        targets.write([TRAINER])
        targets.write([TRAINER])
    assert len(caplog.records) == 1
    assert "mine.targets.json" in caplog.text
