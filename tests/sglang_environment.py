"""SGLang's own environment, for tests that start real engines."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find_sglang_python() -> str:
    """The interpreter of SGLang's environment; without one the test is skipped."""
    python = os.environ.get("PENSTOCK_TEST_SGLANG_PYTHON", str(ROOT / ".venv-sglang" / "bin" / "python"))
    if not Path(python).exists():
        pytest.skip(f"no SGLang environment at {python}: `make envs` makes it")
    return python
