"""`penstock envs`: which form it makes, and the lines that it ends with."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from penstock.config import Config, EngineSection
from penstock.errors import ConfigError, PenstockError
from penstock_launch.command_line import make_parser
from penstock_launch.envs import command
from penstock_launch.envs.command import make_envs
from penstock_launch.envs.environment import HERE
from tests.gpus import FakeGpu, host_with_gpus
from tests.unit.launch.envs.stand_in import StandIn

Envs = Callable[..., int]


@pytest.fixture
def host(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


@pytest.fixture
def envs(host: StandIn) -> Envs:
    def run(*words: str, environ: Mapping[str, str] = os.environ) -> int:
        folder = ["--folder", str(host.folder / "sglang"), "--python", str(host.python)]
        return make_envs(make_parser().parse_args(["envs", *folder, *words]), environ)

    return run


@pytest.fixture
def with_gpu(tmp_path: Path) -> Mapping[str, str]:
    return host_with_gpus(tmp_path / "bin", [FakeGpu()])


def test_it_ends_with_the_line_for_the_configuration(
    envs: Envs, host: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert envs("--cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--rollout.engine.python" in lines[-4]
    given = yaml.safe_load("\n".join(lines[-3:]))
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}, **given}
    python = Config.model_validate(document).rollout.engine.python
    assert python == str(host.folder / "sglang" / "bin" / "python")


def test_without_a_folder_it_makes_the_one_that_a_run_looks_for() -> None:
    arguments = make_parser().parse_args(["envs"])
    assert str(arguments.folder / "bin" / "python") == EngineSection().python


def test_a_gpu_decides_unless_there_is_an_environment(
    envs: Envs, host: StandIn, with_gpu: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    mark = host.folder / "sglang" / ".ready"
    assert envs(environ={"PATH": ""}) == 0
    assert mark.read_text() == "cpu\n"
    assert envs(environ=with_gpu) == 0
    assert mark.read_text() == "cpu\n"
    assert "`--cuda` makes it anew" in capsys.readouterr().out
    assert envs("--cuda", environ=with_gpu) == 0
    assert envs(environ={"PATH": ""}) == 0
    assert mark.read_text() == "cuda\n"


def test_a_new_environment_on_a_host_with_a_gpu_is_for_cuda(
    envs: Envs, host: StandIn, with_gpu: Mapping[str, str]
) -> None:
    assert envs(environ=with_gpu) == 0
    assert (host.folder / "sglang" / ".ready").read_text() == "cuda\n"


@pytest.mark.parametrize("version", [None, "2.0.0", ""])
def test_another_torch_than_that_of_the_trainer_is_named(
    version: str | None, envs: Envs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [locked] = re.findall(r"^torch==(\S+)", (HERE / "sglang-cuda.txt").read_text(), re.MULTILINE)
    here = f"{locked}+cu130" if version == "" else version
    monkeypatch.setattr(command, "installed", lambda package: here)
    envs("--cuda")
    assert (f"`pip install torch=={locked}`" in capsys.readouterr().out) == (here == "2.0.0")


def test_what_is_wrong_is_said_in_one_line(envs: Envs, host: StandIn, tmp_path: Path) -> None:
    old = StandIn(tmp_path, "3.10.2")
    with pytest.raises(ConfigError, match=r"needs Python >= 3\.11; found Python 3\.10\.2 .*--python"):
        envs("--cpu", "--python", str(old.python))
    (host.folder / "broken").touch()
    with pytest.raises(PenstockError, match="the same command goes on") as raised:
        envs("--cpu")
    assert raised.value.exit_code == 1
