"""The script for bash in a real bash: commands, flags, keys, choices and files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from penstock_launch.__main__ import run
from penstock_launch.command_line import make_parser
from penstock_launch.commands.completion import SHELLS, completion_script
from tests.patience import ANSWER_SECONDS

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_penstock
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "penstock.bash"
    file.write_text(completion_script(make_parser(), "bash"))
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ini"], {"init"}),
        (["launch", "lo"], {"local"}),
        (["launch", "local", "--optimizer.l"], {"--optimizer.lr"}),
        (["launch", "local", "--config", "x", "--optimizer.beta"], {"--optimizer.beta1", "--optimizer.beta2"}),
        (["launch", "local", "--run.existing", ""], {"resume", "replace", "refuse"}),
        (["launch", "local", "--loss.dynamic_sampling", "t"], {"true"}),
        (["config", "--sc"], {"--schema"}),
        (["dead", "re"], {"retry"}),
        (["completion", "z"], {"zsh"}),
        (["keys", "--optimizer"], {""}),  # it takes words alone
    ],
)
def test_bash_completes(script: Path, words: list[str], completed: set[str]) -> None:
    command = ["bash", "--norc", "-c", ASK, "bash", str(script), "penstock", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    assert done.stderr == ""
    assert set(done.stdout.split("\n")[:-1]) == completed


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_with_the_keys(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "optimizer.lr" in capsys.readouterr().out
