"""The GSM8K example through `penstock launch local`. tests/deploy has the other launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gsm8k_run import ROOT, RUN_SECONDS, require_two_steps, write_small_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_SECONDS)]


def test_two_steps_are_trained_on_this_host(tmp_path: Path) -> None:
    config = write_small_run(tmp_path, "gsm8k")
    command = [sys.executable, "-m", "penstock_launch", "launch", "local", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    said = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert said.returncode == 0, said.stdout
    require_two_steps(tmp_path / "runs" / "gsm8k")
