"""The scripts in real shells: commands, flags, keys and choices."""

import shutil
import subprocess
from pathlib import Path

import pytest

from penstock_launch.__main__ import run
from penstock_launch.command_line import make_parser
from penstock_launch.commands.completion import SHELLS, completion_script
from tests.patience import ANSWER_SECONDS

# Each prints what is completed at the end of a line, a word a line. Arguments: the script (zsh: its folder), the line.
IN_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_penstock
printf '%s\\n' "${COMPREPLY[@]}"
"""
# Only a terminal has completions in zsh: this gives it one, and prints what is added to them.
IN_ZSH = r"""
zmodload zsh/zpty
zpty inner zsh -f -i
inner() { zpty -w inner "$1" }
inner "PROMPT= RPROMPT= ; fpath=(${(q)1} \$fpath); autoload -Uz compinit; compinit -u -D"
inner 'compadd() {
  if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return; fi
  local -a hits; builtin compadd -A hits "$@"; print -rl -- "HIT:"${^hits}; builtin compadd "$@" }'
inner 'ended() { print -r -- ENDED; exit }; comppostfuncs=(ended); bindkey "^I" complete-word'
inner 'print READY'
zpty -r inner line '*READY*READY*'
zpty -n -w inner "$2"$'\t'
zpty -r inner line '*ENDED*'
print -r -- "$line" | tr -d '\r' | sed -n 's/^.*HIT://p'
zpty -d inner
"""
IN_FISH = "source $argv[1]; complete -C $argv[2] | string split --fields 1 \\t"

CASES = [
    (["ini"], {"init"}),
    (["launch", "lo"], {"local"}),
    (["launch", "local", "--optimizer.l"], {"--optimizer.lr"}),
    (["launch", "local", "--config", "x", "--optimizer.beta"], {"--optimizer.beta1", "--optimizer.beta2"}),
    (["launch", "local", "--run.existing", ""], {"resume", "replace", "refuse"}),
    (["launch", "local", "--loss.dynamic_sampling", "t"], {"true"}),
    (["config", "--sc"], {"--schema"}),
    (["check", "--gen"], {"--generate"}),
    (["dead", "re"], {"retry"}),
    (["completion", "z"], {"zsh"}),
    (["keys", "--optimizer"], set()),  # it takes words alone
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By shell; a parser is completed once."""
    folder, files = tmp_path_factory.mktemp("completion"), {}
    for shell, name in zip(SHELLS, ("penstock.bash", "_penstock", "penstock.fish"), strict=True):
        files[shell] = folder / name
        files[shell].write_text(completion_script(make_parser(), shell))
    return files


def completed(command: list[str]) -> set[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    assert done.stderr == ""
    return set(done.stdout.splitlines()) - {""}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_bash_completes(scripts: dict[str, Path], words: list[str], expected: set[str]) -> None:
    assert completed(["bash", "--norc", "-c", IN_BASH, "bash", str(scripts["bash"]), "penstock", *words]) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_zsh_completes(scripts: dict[str, Path], words: list[str], expected: set[str]) -> None:
    line = " ".join(["penstock", *words])
    assert completed(["zsh", "-f", "-c", IN_ZSH, "zsh", str(scripts["zsh"].parent), line]) == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_fish_completes(scripts: dict[str, Path], words: list[str], expected: set[str]) -> None:
    line = " ".join(["penstock", *words])
    assert completed(["fish", "--no-config", "-c", IN_FISH, str(scripts["fish"]), line]) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_with_the_keys(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert "optimizer.lr" in capsys.readouterr().out
