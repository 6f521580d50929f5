"""What a command does not wait for."""

import subprocess
import sys

from tests.patience import START_SECONDS

LOADED = "import sys, penstock_launch.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
SLOW = {"datasets", "fastapi", "numpy", "pandas", "torch", "transformers", "uvicorn"}


def test_the_command_line_imports_no_large_library() -> None:
    loaded = subprocess.check_output([sys.executable, "-c", LOADED], text=True, timeout=START_SECONDS).split()
    assert "penstock_launch" in loaded
    assert not SLOW & set(loaded)
