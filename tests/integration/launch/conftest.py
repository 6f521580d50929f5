"""A folder with a configuration that works, and the commands of a user in it; all processes end with the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.broker.embedded import EmbeddedServer
from tests.integration.launch.user_commands import UserCommands


@pytest.fixture
def setup(tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer) -> Iterator[UserCommands]:
    setup = UserCommands(tmp_path, tiny_model, redis_server)
    yield setup
    setup.end()
