"""The wheel of this checkout, built once, and processes that can import it alone."""

from pathlib import Path

import pytest

from tests.unit.repository.containers import Containers, build_wheel, unpack


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(wheel, tmp_path_factory.mktemp("unpacked"))


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory, unpacked: Path) -> Containers:
    return Containers(tmp_path_factory.mktemp("containers"), unpacked)
