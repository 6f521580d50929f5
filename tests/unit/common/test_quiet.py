"""Libraries print nothing by themselves: no progress bar, no warning between the lines of a log."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from penstock.quiet import SWITCHES, quiet_libraries
from penstock.runtime.logs import setup_logging
from tests.patience import START_SECONDS

LOADS = """
import os, sys
if sys.argv[2] == "quiet":
    from penstock.quiet import quiet_libraries
    quiet_libraries(os.environ)
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
Dataset.from_list([{"text": "a"}] * 10).map(lambda row: row)
list(tqdm(range(3)))
"""


@pytest.mark.parametrize(("how", "speaks"), [("quiet", False), ("as they are", True)])
def test_models_and_datasets_are_loaded_without_a_word(
    tiny_model: Path, tmp_path: Path, how: str, speaks: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", LOADS, str(tiny_model), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout + done.stderr) is speaks, done.stderr


def test_what_a_user_has_set_stays() -> None:
    environment = {"TRANSFORMERS_VERBOSITY": "debug"}
    quiet_libraries(environment)
    assert environment == {**SWITCHES, "TRANSFORMERS_VERBOSITY": "debug"}


def test_what_a_library_warns_of_is_a_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("trainer", "r", "info")
    with warnings.catch_warnings(record=False):
        warnings.simplefilter("always")
        warnings.warn("that is deprecated", FutureWarning, stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["warning"]
    assert "that is deprecated" in lines[0]["event"]
