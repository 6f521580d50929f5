"""Which looks there are, and what they share."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.config import Config
from penstock_launch.doctor import environments
from penstock_launch.doctor.command import looks, title
from penstock_launch.doctor.environments import Environment, Torch
from penstock_launch.doctor.report import Line, render
from penstock_launch.doctor.side_by_side import look_at_all
from penstock_launch.run_folder import RunFolder
from tests.gpus import FakeGpu, host_with_gpus, host_with_smi
from tests.patience import ANSWER_SECONDS
from tests.unit.launch.doctor.test_folders import config_with

CUDA = Environment("3.11.7", True, {"torch": "2.14.1", "sglang": "0.5.21"}, Torch("13.0", num_gpus=2), kernels="")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of an empty folder, with environments that see two GPUs."""
    monkeypatch.setattr(environments, "examine", lambda *_: CUDA)
    monkeypatch.setattr(environments, "examine_sglang", lambda *_: CUDA)
    return config_with(run={"root": str(tmp_path / "runs")})


def found(config: Config, environ: dict[str, str]) -> dict[str, Line]:
    groups = look_at_all(looks(config, environ), ANSWER_SECONDS)
    assert list(render(groups))
    return {line.what: line for group in groups for line in group.lines}


def test_a_host_with_two_gpus(config: Config, tmp_path: Path) -> None:
    environ = host_with_gpus(tmp_path / "bin", (FakeGpu(), FakeGpu()), {"CC": "/usr/bin/cc"})
    lines = found(config, environ)
    assert {"GPU 0", "GPU 1", "compiled code", "SGLang's kernels"} <= lines.keys()
    assert lines["C compiler"].seen == "/usr/bin/cc, with Python.h"
    assert lines["torch of services"].seen.endswith("can use 2 GPUs")


@pytest.mark.parametrize(("device", "verdict"), [("cpu", "ok"), ("auto", "warning"), ("cuda", "problem")])
def test_a_trainer_that_has_to_train_on_a_gpu_needs_a_torch_for_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, verdict: str
) -> None:
    for_cpus = Environment("3.11.7", True, {"torch": "2.13.0+cpu"}, Torch())
    monkeypatch.setattr(environments, "examine", lambda *_: for_cpus)
    trainer = config.trainer.model_copy(update={"device": device})
    lines = found(config.model_copy(update={"trainer": trainer}), host_with_gpus(tmp_path / "bin", (FakeGpu(),)))
    assert lines["torch of services"].verdict == verdict


def test_without_a_gpu_nothing_is_compiled(config: Config, tmp_path: Path) -> None:
    lines = found(config, host_with_smi(tmp_path / "bin", "exit 9"))
    assert lines["NVIDIA driver"].verdict == "problem"
    assert not {"GPU 0", "compiled code", "C compiler"} & lines.keys()


def test_what_a_launch_would_refuse_is_a_problem(config: Config, tmp_path: Path, tiny_model: Path) -> None:
    actor = config.actor.model_copy(update={"path": str(tiny_model)})
    servers = config.rollout.model_copy(update={"num_servers": 4})
    fitting = config.model_copy(update={"actor": actor})
    environ = host_with_gpus(tmp_path / "bin", (FakeGpu(), FakeGpu()))
    assert found(config, environ)["what fits"].verdict == "not looked at"
    line = found(fitting, environ)["what fits"]
    assert (line.verdict, line.seen.partition(" of 79.6")[0]) == ("ok", "memory of GPU 0: rollout 79.6")
    line = found(fitting.model_copy(update={"rollout": servers}), environ)["what fits"]
    assert (line.verdict, line.seen) == ("problem", "the GPUs do not suffice")
    assert "`penstock config`" in line.advice
    assert "what fits" not in found(fitting, {**environ, "CUDA_VISIBLE_DEVICES": ""})
    without_file = config.actor.model_copy(update={"path": ""})
    assert "what fits" not in found(config.model_copy(update={"actor": without_file}), environ)


def test_what_a_live_run_uses_is_no_problem(
    config: Config, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = config.model_copy(update={"actor": config.actor.model_copy(update={"path": str(tiny_model)})})
    environ = host_with_gpus(tmp_path / "bin", (FakeGpu(used_mib=80000),))
    assert found(fitting, environ)["what fits"].verdict == "problem"
    monkeypatch.setattr(RunFolder, "live_launcher", lambda _: SimpleNamespace(pid=7))
    line = found(fitting, environ)["what fits"]
    assert (line.verdict, "pid 7" in line.seen) == ("not looked at", True)


def test_the_title_holds_no_values() -> None:
    text = title(["--config", "mine.yaml", "--token", "s3", "--redis.url=redis://:pw@host"])
    assert text.endswith("; configuration: mine.yaml --token --redis.url")
    assert title([]).endswith("; configuration: defaults")


def test_an_interpreter_that_fails_leaves_the_other_lines(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> Environment:
        raise TimeoutError("python: no answer within 18 s")

    monkeypatch.setattr(environments, "examine_sglang", late)
    lines = found(config, host_with_gpus(tmp_path / "bin", (FakeGpu(), FakeGpu())))
    assert (lines["SGLang"].verdict, lines["torch of services"].verdict) == ("not looked at", "ok")
    assert "no answer within 18 s" in lines["SGLang"].seen
    assert lines["C compiler"].verdict in ("ok", "problem")
