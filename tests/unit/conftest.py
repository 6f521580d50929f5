"""What several unit tests share: a recorded run, trained once, of which each test has its own copy."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # tests that do not ask for it do not wait for torch
    from tests.unit.replay_bench import RecordedRun


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and its model; not to be changed."""
    from tests.unit.replay_bench import record, write_config
    from tests.unit.trainer_groups import save_tiny_model

    folder = Path(tmp_path_factory.mktemp("recorded"))
    save_tiny_model(folder / "model")
    record(folder, write_config(folder))
    return folder


@pytest.fixture
def recorded(trained_run: Path, tmp_path: Path) -> "RecordedRun":
    """A copy of the run that the test may change."""
    from tests.unit.replay_bench import RecordedRun, write_config

    for name in ("runs", "model"):
        shutil.copytree(trained_run / name, tmp_path / name)
    write_config(tmp_path)
    return RecordedRun(tmp_path)
