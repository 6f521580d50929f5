"""Every command in a document is run here, or checked by its real parser and marked with the reason why it is not run.

A command of a new kind fails `test_a_command_is_run_or_marked`: add it to RUN if it takes no second, else to NOT_RUN.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from penstock.config.load import load_config
from penstock.config.sources import parse_arguments
from penstock.errors import ConfigError
from penstock_launch.__main__ import run
from penstock_launch.command_line import make_parser, split_words
from tests.unit.repository.doc_commands import Command, commands_of
from tests.unit.repository.test_doc_links import documents
from tests.unit.repository.test_repository import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Run here, in a folder with the README's configuration.
RUN = ("penstock --version", "penstock completion", "penstock config", "penstock init", "penstock keys")
# Only checked: what each begins with, and why it is not run here. A path: the test that runs it, or the like.
NOT_RUN = {
    "penstock bundle": "needs a run: tests/integration/trainer",
    "penstock cancel": "needs a run: tests/integration/launch",
    "penstock check": "imports torch: tests/integration/launch/test_check.py",
    "penstock compare": "needs two runs: tests/unit/launch/commands/test_runs.py",
    "penstock dead": "needs a run: tests/integration/launch",
    "penstock doctor": "takes seconds: tests/integration/launch/test_doctor.py",
    "penstock envs": "installs SGLang: tests/unit/launch/envs",
    "penstock export": "needs a run: tests/integration/trainer",
    "penstock launch local": "trains: tests/e2e, tests/integration/launch/test_init.py",
    "penstock launch ray": "needs Ray: tests/deploy",
    "penstock launch slurm": "needs Slurm: tests/deploy",
    "penstock replay": "needs a run: tests/integration/trainer",
    "penstock samples": "needs a run: tests/unit/launch/commands/test_samples.py",
    "penstock status": "needs a run: tests/integration/launch",
    "penstock view": "serves until Ctrl-C: tests/deploy/test_view_browser.py",
    "cd": "only leads to the next command",
    "export": "only prepares the next command",
    "curl": "needs a service that runs: tests/integration/reward, tests/integration/trainer",
    "docker compose": "needs a container engine: tests/deploy",
    "echo": "needs an engine: tests/e2e/test_agents.py",
    "answer=": "a program of an agent: tests/unit/agent",
    "case": "a program of an agent: tests/unit/agent",
    "make chaos": "a quarter of an hour: tests/e2e/test_chaos_short.py",
    "make demo": "trains for minutes: tests/e2e",
    "make demo-agent": "trains for minutes: tests/e2e",
    "make env": "writes secrets: tests/unit/repository/test_compose_files.py",
    "make envs": "installs for minutes: tests/unit/repository/test_environments.py",
    "make scale": "a quarter of an hour: tests/e2e/test_scale.py",
    "make test": "runs what this is a part of",
    "pip install": "asks the package index: tests/unit/repository/test_installed_wheel.py",
    "prometheus": "needs Prometheus: tests/deploy",
    "python3 -m venv": "makes an environment: tests/unit/repository/test_installed_wheel.py",
    "python agent.py": "needs an engine: tests/e2e/test_agents.py",
    "python chat.py": "the program itself runs: tests/unit/repository/test_tutorial.py",
    "python -m examples.curriculum.kill": "needs a run: tests/unit/repository/test_curriculum_example.py",
    "python -m benchmarks.": "measures for minutes: tests/unit/benchmarks",
    "ray": "needs Ray: tests/deploy",
}
# Names of a reader's own files: the README's configuration stands for them.
OWN_FILES = ("F", "FILE", "my_run.yaml", "mine.yaml", "guess.yaml", "config.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: what the README shows, under the names that the documents use."""
    folder = tmp_path_factory.mktemp("reader")
    readme = (ROOT / "README.md").read_text()
    for language, name in re.findall(r"^```(?:python|yaml)\n# ((my_\w+\.\w+))$", readme, re.MULTILINE):
        text = readme.partition(f"# {language}\n")[2].partition("```")[0]
        for each in OWN_FILES if name == "my_run.yaml" else (name,):
            (folder / each).write_text(text)
    (folder / "my_prompts.jsonl").write_text(json.dumps({"prompt": "2+5=", "answer": "7"}) + "\n")
    (folder / "path/to/model").mkdir(parents=True)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "deploy").symlink_to(ROOT / "deploy")
    assert {"my_run.yaml", "my_rewards.py"} <= {path.name for path in folder.iterdir()}
    return folder


COMMANDS = list(commands_of(documents()))
PARSER = make_parser()


def begins(command: Command, start: str) -> bool:
    """Whether it begins with these words, or with this part of a word if it ends with a sign."""
    return f"{command.text} ".startswith(start if start.endswith(("=", ".")) else f"{start} ")


def test_commands_are_found() -> None:
    text = "`make x A=1` `make [x]`\n\n```\n$ A=1 penstock a > b && make b  # c\nso\n```\n```\nno command\n```\n"
    found = [(str(each), each.in_block) for each in commands_of({"d.md": text})]
    assert found == [("d.md:4: penstock a", True), ("d.md:4: make b", True), ("d.md:1: make x A=1", False)]
    assert len([each for each in COMMANDS if each.in_block]) > 60
    assert len([each for each in COMMANDS if not each.in_block]) > 100


def test_a_command_is_run_or_marked() -> None:
    copied = [each for each in COMMANDS if each.in_block]
    assert [str(each) for each in copied if not any(begins(each, start) for start in (*RUN, *NOT_RUN))] == []


@pytest.mark.parametrize("start", [*RUN, *NOT_RUN])
def test_a_mark_is_used_and_names_tests_that_exist(start: str) -> None:
    assert any(begins(each, start) for each in COMMANDS)
    assert [path for path in re.findall(r"tests/[\w./]+", NOT_RUN.get(start, "")) if not (ROOT / path).exists()] == []


def wrong_penstock(command: Command, arguments: tuple[str, ...], folder: Path) -> str | None:
    """What is wrong with it: a word that the parser refuses, a file that is not there, a key or value that is none."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            _, rest = PARSER.parse_known_args(arguments)
    except SystemExit as ended:
        incomplete = not command.in_block and "arguments are required" in said.getvalue()
        return None if ended.code == 0 or incomplete else said.getvalue()
    plain, settings = split_words(rest)
    if plain and arguments[0] != "dead" and not (arguments[0] == "status" and len(plain) == 1):
        return f"{plain} are no arguments"
    paths, pairs = parse_arguments(settings, needs_file=False)
    here = [(folder / path.name if path.name in OWN_FILES else ROOT / path) for path in paths or [Path("my_run.yaml")]]
    if missing := [path for path in here if not path.exists()]:
        return f"no such files: {missing}"
    words = [word for path in here for word in ("--config", str(path))]
    words += [word for key, value in pairs for word in (f"--{key}", value)]
    try:
        load_config(words, {})
    except ConfigError as error:
        return str(error)
    return None


def wrong_make(words: tuple[str, ...]) -> str | None:
    """A target or a variable that the Makefile does not have, or a test that is not there."""
    for word in words:
        name, sets, value = word.partition("=")
        if not re.search(rf"\$\({name}\)|^{name} \?=" if sets else rf"^{name}:", MAKEFILE, re.MULTILINE):
            return f"the Makefile has no {name}"
        if name == "TESTS" and not (ROOT / value).exists():
            return f"no such test: {value}"
    return None


def wrong_module(module: str, arguments: tuple[str, ...]) -> str | None:
    """A module that is not there, or a flag that none of its files defines."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return f"no module {module}"
    origin = Path(found.origin)
    files = sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
    source = "".join(path.read_text() for path in files)
    flags = [
        word.partition("=")[0] for word in arguments if word.startswith("--") and not module.startswith("penstock")
    ]
    return next((f"{module} has no {flag}" for flag in flags if f'"{flag}"' not in source), None)


def wrong_pip(words: tuple[str, ...]) -> str | None:
    """An extra or a file that does not exist."""
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        if unknown := set(extras.split(",")) - set(EXTRAS):
            return f"no such extras: {unknown}"
    files = [word for word in words if word.endswith(".txt")]
    return next((f"no such file: {word}" for word in files if not (ROOT / word).exists()), None)


def wrong(command: Command, folder: Path) -> str | None:
    match command.text.split():
        case ["make", *_]:
            return wrong_make(command.words[1:])
        case ["python", "-m", module, *_]:
            return wrong_module(module, command.words[3:])
        case ["pip", *_]:
            return wrong_pip(command.words[1:])
        case ["docker", "compose", *_] if missing := [
            word for word in command.words if word.endswith((".yml", ".yaml")) and not (ROOT / word).exists()
        ]:
            return f"no such files: {missing}"
    return None if command.penstock is None else wrong_penstock(command, command.penstock, folder)


def test_a_command_is_what_its_parser_takes(folder: Path) -> None:
    faults = [f"{command}\n    {fault}" for command in COMMANDS if (fault := wrong(command, folder))]
    assert faults == [], "\n".join(faults)


@pytest.mark.parametrize(
    "line",
    [
        "penstock lunch local --config my_run.yaml",
        "penstock launch local --config examples/none.yaml",
        "penstock launch local --config my_run.yaml --optimizer.rl 1",
        "penstock launch local --config my_run.yaml --actor.group_size many",
        "penstock export --config my_run.yaml",
        "docker compose exec trainer penstock stats --config my_run.yaml",
        "docker compose --file docker-compose.yaml up",
        "make demos",
        "make test TEST=tests/unit",
        "python -m benchmarks.none",
        "python -m benchmarks.gpu loop --output results",
        "pip install 'penstock[traner]'",
    ],
)
def test_a_wrong_command_is_found(folder: Path, line: str) -> None:
    assert wrong(Command("here", tuple(shlex.split(line)), in_block=True), folder)


# In a sentence `penstock config` is only a name.
NAMES = ("penstock config", "penstock config --changed")
RUNS = sorted({each.text for each in COMMANDS if any(begins(each, start) for start in RUN)} - set(NAMES))


@pytest.mark.parametrize("text", RUNS)
def test_a_command_that_takes_no_second_runs(
    text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    try:
        code = run(shlex.split(text)[1:])
    except SystemExit as ended:  # --version
        code = int(ended.code or 0)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.out
