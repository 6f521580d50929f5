"""Ctrl-C at any moment of a command, its imports included."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import penstock_launch.__main__  # noqa: F401 - its import must leave Python's own handler
from tests.patience import ANSWER_SECONDS

IMPORTED = """
import pathlib, time
pathlib.Path({marker!r}).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_during_the_imports_ends_it_quietly(tmp_path: Path, ignored: bool) -> None:
    """A library that takes for ever stands in the place of one that the command imports."""
    marker = tmp_path / "marker"
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(IMPORTED.format(marker=str(marker)))
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock_launch", "keys", "lr"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    try:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not marker.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            return
        output, errors = process.communicate(timeout=ANSWER_SECONDS)
        assert (process.returncode, output, errors) == (130, "", "")
    finally:
        process.kill()
        process.communicate()


def test_afterwards_ctrl_c_is_an_exception_again() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
