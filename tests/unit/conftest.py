"""Fixtures for unit tests: tiny models, and a run that is recorded once; each test gets its own copy."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # tests that use neither do not import torch
    from tests.unit.trainer.offline.recorded_run import RecordedRun


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """The folder of a model without tied embeddings."""
    from tests.unit.trainer.trainer_groups import save_tiny_model

    return save_tiny_model(tmp_path / "model", "qwen3")


@pytest.fixture(params=["llama", "qwen3"])
def each_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a model with tied embeddings, and of one without."""
    from tests.unit.trainer.trainer_groups import save_tiny_model

    return save_tiny_model(tmp_path / "model", request.param)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and its model; do not change it."""
    from tests.unit.trainer.offline.recorded_run import record, write_config
    from tests.unit.trainer.trainer_groups import save_tiny_model

    folder = Path(tmp_path_factory.mktemp("recorded"))
    save_tiny_model(folder / "model")
    record(folder, write_config(folder))
    return folder


@pytest.fixture
def recorded(trained_run: Path, tmp_path: Path) -> "RecordedRun":
    """A copy of the run that the test may change."""
    from tests.unit.trainer.offline.recorded_run import RecordedRun, write_config

    for name in ("runs", "model"):
        shutil.copytree(trained_run / name, tmp_path / name)
    write_config(tmp_path)
    return RecordedRun(tmp_path)
