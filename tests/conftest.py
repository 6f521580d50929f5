"""What tests of several kinds share: a tiny random model with a tokenizer of letters, and who runs what."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# On a busy machine an example takes as long as it takes: no test of a property is one of speed.
settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penstock")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Called with --numprocesses alone."""
    from tests.scheduling import ModuleScheduling

    config.option.loadscopereorder = False
    return ModuleScheduling(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of 43 tokens, one per character."""
    from benchmarks.chaos.model import make_tiny_model

    folder = Path(tmp_path_factory.mktemp("tiny-model"))
    make_tiny_model(folder)
    return folder
