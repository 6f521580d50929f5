"""What the doctor says of the two environments, with stand-ins for interpreters."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.config import EngineSection
from penstock.errors import EngineStartError
from penstock_launch import envs
from penstock_launch.doctor import environments
from penstock_launch.doctor.environments import (
    TORCH,
    Environment,
    ProbeError,
    Torch,
    examine,
    examine_sglang,
    packages_line,
    sglang_lines,
    torch_line,
)
from penstock_launch.doctor.report import Line
from penstock_launch.gpus.nvidia import Driver, Gpu
from penstock_rollout.engine.sglang.server import TESTED_VERSIONS

ROOT = Path(__file__).parents[4]
REQUIREMENTS = ("redis<9,>=7.3", "torch>=2.7; extra == 'trainer'", "peft>=0.17; extra == 'lora'")
ASKED = {"redis": "8.0.0", "torch": "2.13.0+cpu", "peft": "0.18"}
GPU = Gpu(0, "GPU-0", "H100", 80 * 2**30, 0)
DRIVER = Driver("580.95.05", "13.0", (GPU,))
OLD = Driver("535.10", "12.2", (GPU,))
CPU = Environment("3.11.7", True, {"sglang": TESTED_VERSIONS[0], "torch": "2.13.0+cpu"}, Torch())
CUDA = Environment(
    "3.11.7", True, {"sglang": TESTED_VERSIONS[0], "torch": "2.14.1+cu130"}, Torch("13.0", num_gpus=1), kernels=""
)


def cuda(**changes: Any) -> Environment:
    return msgspec.structs.replace(CUDA, **changes)


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def answering(folder: Path, *answers: Environment, then: str = "") -> str:
    lines = "\n".join(f"echo '{json.dumps(msgspec.to_builtins(answer))}'" for answer in answers)
    return interpreter(folder, f"{lines}\n{then}")


def engine_of(**keys: Any) -> EngineSection:
    return EngineSection.model_validate(keys)


def lines_of(answer: Callable[[], Environment], driver: Driver | None = None, **keys: Any) -> list[Line]:
    return list(sglang_lines(engine_of(**keys), answer, driver, {}))


def test_packages_as_asked() -> None:
    line = packages_line(REQUIREMENTS, ("trainer",), {**ASKED, "transformers": "5.1"}.get)
    assert line.verdict == "ok"
    assert line.seen == "all 2 as pyproject.toml asks, torch 2.13.0+cpu, transformers 5.1 among them"


@pytest.mark.parametrize(
    ("change", "extras", "seen"),
    [
        ({"redis": "9.1"}, (), "redis<9,>=7.3: 9.1 is installed"),
        ({"torch": None}, ("trainer",), "torch>=2.7 (extra trainer) is missing"),
        ({"peft": None}, ("trainer", "lora"), "peft>=0.17 (extra lora) is missing"),
    ],
)
def test_packages_that_are_not(change: dict[str, Any], extras: tuple[str, ...], seen: str) -> None:
    line = packages_line(REQUIREMENTS, extras, {**ASKED, **change}.get)
    assert (line.verdict, line.seen) == ("problem", seen)
    assert "make envs" in line.advice


def test_this_interpreter_answers(tmp_path: Path) -> None:
    found = examine(sys.executable, ("msgspec", "no-such-package"), os.environ)
    assert found.python == sys.version.split()[0]
    assert found.versions == {"msgspec": msgspec.__version__, "no-such-package": ""}
    assert (found.torch, found.crash, found.late) == (None, "", "")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("echo broken >&2; exit 3", "exit code 3: broken"),
        ("echo hello", "it prints nothing that can be read"),
    ],
)
def test_an_interpreter_without_an_answer(tmp_path: Path, answer: str, reason: str) -> None:
    python = interpreter(tmp_path, answer)
    with pytest.raises(ProbeError, match=re.escape(f"{python}: {reason}")):
        examine(python, (), os.environ)


def test_an_interpreter_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="cannot be started"):
        examine(str(tmp_path / "gone"), (), os.environ)


def test_what_an_interpreter_answered_before_it_crashed_or_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = msgspec.structs.replace(CPU, torch=None)
    crashed = examine(answering(tmp_path, first, then="echo libcuda >&2; exit 9"), (), os.environ)
    assert (crashed.versions, crashed.torch, crashed.crash) == (CPU.versions, None, "exit code 9: libcuda\n")
    line = torch_line("torch", crashed, None, {}, "auto")
    assert (line.verdict, line.seen) == ("problem", "2.13.0+cpu: exit code 9: libcuda\n")
    monkeypatch.setattr(environments, "PROBE_SECONDS", 2)
    hung = examine(answering(tmp_path, first, then="exec sleep 600"), (), os.environ)
    line = torch_line("torch", hung, None, {}, "auto")
    assert (line.verdict, line.seen) == ("not looked at", "2.13.0+cpu: no answer within 2 s")
    with pytest.raises(TimeoutError, match="no answer within 2 s"):
        examine(interpreter(tmp_path, "exec sleep 600"), (), os.environ)


@pytest.mark.parametrize(
    ("found", "driver", "verdict", "words"),
    [
        (CPU, None, "ok", "built for CPUs"),
        (CPU, Driver(problem="exit code 9"), "ok", "built for CPUs"),
        (CUDA, None, "ok", "built for CUDA 13.0"),
        (CUDA, DRIVER, "ok", "can use 1 GPU"),
        (cuda(torch=Torch("13.0", 1, "H100 is not compatible")), DRIVER, "problem", "code for this GPU"),
        (cuda(torch=Torch("13.0", 1, "is deprecated")), DRIVER, "warning", "is deprecated"),
        (cuda(torch=Torch("13.0", 0, "Error 802: system not yet initialized")), DRIVER, "problem", "fabricmanager"),
        (CPU, DRIVER, "warning", "make envs"),
        (cuda(torch=Torch("13.0", 0)), DRIVER, "problem", "Restart the host"),
        (cuda(torch=Torch("13.0", 0, "driver too old")), OLD, "problem", "Update the driver"),
        (cuda(torch=Torch("12.8", 0)), OLD, "problem", "torch.cuda.init()"),
        (cuda(torch=Torch("", 0, "ImportError: libcudart")), DRIVER, "problem", "ImportError: libcudart"),
        (CUDA, Driver("580", "13.0", (GPU, Gpu(1, "GPU-1", "H100", 1, 0))), "warning", "can use 1 of 2 GPUs"),
        (cuda(versions={"torch": ""}, torch=None), DRIVER, "problem", "make envs"),
    ],
)
def test_torch_fits_the_driver(found: Environment, driver: Driver | None, verdict: str, words: str) -> None:
    line = torch_line(TORCH, found, driver, {}, "auto")
    assert line.verdict == verdict, line
    assert words in f"{line.seen} {line.advice}"


def test_cuda_gives_a_process_one_instance_of_a_divided_gpu() -> None:
    instances = tuple(Gpu(0, f"MIG-{number}", "H100 MIG", 10 * 2**30, 0) for number in range(7))
    assert torch_line("torch", CUDA, Driver("580", "13.0", instances), {}, "auto").verdict == "ok"


def test_a_gpu_that_is_not_visible_is_none() -> None:
    assert torch_line("torch", CPU, DRIVER, {"CUDA_VISIBLE_DEVICES": ""}, "auto").verdict == "ok"


def test_sglang_as_tested() -> None:
    lines = lines_of(lambda: CPU)
    assert [(line.what, line.verdict) for line in lines] == [("SGLang", "ok"), ("torch of SGLang", "ok")]
    assert "as tested" in lines[0].seen


def test_sglang_for_gpus_has_kernels() -> None:
    assert [line.verdict for line in lines_of(lambda: CUDA, DRIVER)] == ["ok", "ok", "ok"]
    line = lines_of(lambda: cuda(kernels="ImportError: no sm_120"), DRIVER)[-1]
    assert (line.verdict, "no sm_120" in line.seen) == ("problem", True)
    assert lines_of(lambda: cuda(kernels=None, crash="exit code -11: "), DRIVER)[-1].verdict == "problem"
    assert lines_of(lambda: cuda(kernels=None, late="no answer within 18 s"), DRIVER)[-1].verdict == "not looked at"


def test_the_cpu_form_on_a_host_with_a_gpu() -> None:
    assert [line.verdict for line in lines_of(lambda: CPU, DRIVER)] == ["ok", "warning"]
    line = lines_of(lambda: CPU, DRIVER, device="cuda")[-1]
    assert (line.verdict, line.advice) == ("problem", "penstock envs --cuda makes it anew, for CUDA.")
    assert lines_of(lambda: CPU, DRIVER, device="cpu")[-1].verdict == "ok"


def test_another_version_of_sglang_is_a_warning() -> None:
    line = lines_of(lambda: cuda(versions={"sglang": "0.9.0", "torch": "2.14.1"}))[0]
    assert line.verdict == "warning"
    assert f"tested with {' and '.join(TESTED_VERSIONS)}" in line.seen
    assert line.advice == "penstock envs, or install one of these."


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    texts = [path.read_text() for path in Path(envs.__file__).parent.glob("sglang*.txt")]
    assert {version for text in texts for version in re.findall(r"^sglang==(\S+)$", text, re.M)} == set(TESTED_VERSIONS)


def test_a_missing_interpreter_is_refused_as_the_service_does(tmp_path: Path) -> None:
    section = engine_of(python=str(tmp_path / "gone"))
    (line,) = sglang_lines(section, lambda: examine_sglang(section, os.environ), None, {})
    assert line.verdict == "problem"
    assert f"rollout.engine.python: '{tmp_path / 'gone'}' is no executable" in line.seen
    assert "penstock envs" in line.advice


def test_an_interpreter_without_sglang_is_refused_as_the_service_does(tmp_path: Path) -> None:
    python = answering(tmp_path, msgspec.structs.replace(CPU, versions={"sglang": "", "torch": ""}, torch=None))
    section = engine_of(python=python)
    with pytest.raises(EngineStartError, match=r"has no package `sglang`.*penstock envs"):
        examine_sglang(section, os.environ)


def test_a_broken_interpreter_is_named(tmp_path: Path) -> None:
    section = engine_of(python=interpreter(tmp_path, "exit 1"))
    (line,) = sglang_lines(section, lambda: examine_sglang(section, os.environ), None, {})
    assert line.verdict == "problem"
    assert section.python in line.seen


def test_variables_of_this_python_do_not_reach_sglangs(tmp_path: Path) -> None:
    answer = json.dumps(msgspec.to_builtins(CPU))
    python = interpreter(tmp_path, f"[ -z \"$PYTHONPATH$PYTHONHOME\" ] && echo '{answer}'")
    environ = {**os.environ, "PYTHONPATH": "/x", "PYTHONHOME": "/y"}
    assert examine_sglang(engine_of(python=python), environ).versions == CPU.versions


def test_a_server_of_somebody_else_is_not_looked_at() -> None:
    def no_call() -> Environment:
        raise AssertionError("not to be asked")

    (line,) = lines_of(no_call, url="http://host:1")
    assert line.verdict == "not looked at"
