"""SGLang's own environment, for tests that start real engines."""

import pytest

from tests.sglang_environment import find_sglang_python


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The interpreter of SGLang's environment; without one the test is skipped."""
    return find_sglang_python()
