"""A folder with a configuration that works, and the commands of a user in it; all processes end with the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.broker.embedded import EmbeddedServer
from tests.integration.launch.user_commands import SPREAD, UserCommands


@pytest.fixture
def setup(tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer) -> Iterator[UserCommands]:
    setup = UserCommands(tmp_path, tiny_model, redis_server)
    yield setup
    setup.end()


@pytest.fixture
def user(setup: UserCommands) -> UserCommands:
    """With a configuration that has no problem for `penstock check`."""
    from tests.integration.launch.test_errors import break_sglang  # which imports transformers

    break_sglang(setup)  # it answers the probe like an environment with SGLang; nothing starts it here
    setup.document["rollout"]["engine"] |= {"dtype": "float32"}
    setup.score_by("spread", SPREAD)
    return setup
