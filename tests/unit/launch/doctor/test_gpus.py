"""What the doctor says of drivers and GPUs, with a stand-in for nvidia-smi. No test here has seen a GPU."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock_launch.doctor.gpus import (
    compiler_line,
    driver_line,
    driver_lines,
    gpu_lines,
    keys_for_cuda,
    read_kernel_module,
)
from penstock_launch.doctor.report import Line
from penstock_launch.gpus.nvidia import has_gpu, read_driver
from tests.gpus import FakeGpu, host_with_gpus, host_with_smi, mig_uuid

MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05"
EIGHT = (FakeGpu(),) * 8


def config(**sections: Any) -> Config:
    return Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d"}}, **sections})


def lines_of(environ: dict[str, str], *cuda_keys: str) -> list[Line]:
    return driver_lines(read_driver(environ), environ, cuda_keys)


def test_a_host_without_a_driver_uses_its_cpu() -> None:
    line = driver_line(None, "")
    assert (line.verdict, line.seen) == ("ok", "none: everything runs on the CPU")
    assert list(gpu_lines(None, {})) == []


def test_without_a_driver_the_device_cuda_is_a_problem() -> None:
    both = {"rollout": {"engine": {"device": "cuda"}}, "trainer": {"device": "cuda"}}
    line = driver_line(None, "", keys_for_cuda(config(**both)))
    assert (line.verdict, line.seen) == ("problem", "none, and rollout.engine.device and trainer.device are cuda")
    line = driver_line(None, "", keys_for_cuda(config(trainer={"device": "cuda"})))
    assert (line.verdict, line.seen) == ("problem", "none, and trainer.device is cuda")
    assert "set trainer.device to auto" in line.advice
    assert keys_for_cuda(config(trainer={"device": "cpu"})) == []


def test_a_kernel_module_without_nvidia_smi_is_a_container_without_gpus(tmp_path: Path) -> None:
    line = driver_line(None, MODULE)
    assert line.verdict == "warning"
    assert "580.95.05" in line.seen
    assert "--gpus all" in line.advice
    (tmp_path / "version").write_text(f"{MODULE}\nGCC version: 13\n")
    assert (read_kernel_module(tmp_path / "version"), read_kernel_module(tmp_path / "no")) == (MODULE, "")


def test_one_gpu(tmp_path: Path) -> None:
    lines = lines_of(host_with_gpus(tmp_path, (FakeGpu(),)))
    assert [(line.what, line.verdict, line.seen) for line in lines] == [
        ("NVIDIA driver", "ok", "580.95.05, for CUDA up to 13.0"),
        ("GPU 0", "ok", "NVIDIA H100 80GB HBM3, 79.6 GiB, 4 MiB in use"),
    ]


def test_eight_gpus_of_which_some_are_visible(tmp_path: Path) -> None:
    environ = host_with_gpus(tmp_path, EIGHT, {"CUDA_VISIBLE_DEVICES": "6,7"})
    lines = lines_of(environ)
    assert [line.what for line in lines] == [
        "NVIDIA driver",
        *(f"GPU {index}" for index in range(8)),
        "CUDA_VISIBLE_DEVICES",
    ]
    assert (lines[-1].verdict, lines[-1].seen) == ("ok", "'6,7' leaves 2 of 8")
    assert has_gpu(read_driver(environ), environ)


@pytest.mark.parametrize(("key", "verdict"), [("", "warning"), ("trainer.device", "problem")])
def test_a_variable_that_leaves_no_gpu(tmp_path: Path, key: str, verdict: str) -> None:
    environ = host_with_gpus(tmp_path, EIGHT, {"CUDA_VISIBLE_DEVICES": "9"})
    line = lines_of(environ, *filter(None, [key]))[-1]
    assert line.verdict == verdict
    assert "'9' leaves 0 of 8" in line.seen
    assert "Unset CUDA_VISIBLE_DEVICES" in line.advice
    assert not has_gpu(read_driver(environ), environ)


def test_a_gpu_in_use_is_a_warning_if_it_is_ours(tmp_path: Path) -> None:
    busy = (FakeGpu(used_mib=30000), FakeGpu(used_mib=8000))  # the second by less than a tenth, as for the placement
    assert [line.verdict for line in lines_of(host_with_gpus(tmp_path, busy))] == ["ok", "warning", "ok"]
    environ = host_with_gpus(tmp_path, busy, {"CUDA_VISIBLE_DEVICES": "1"})
    assert [line.verdict for line in lines_of(environ)] == ["ok", "ok", "ok", "ok"]


def test_instances_are_shown_with_their_uuid(tmp_path: Path) -> None:
    lines = lines_of(host_with_gpus(tmp_path, (FakeGpu(mig_mib=(9728, 19968)), FakeGpu())))
    assert [line.what for line in lines] == ["NVIDIA driver", "GPU 0", "GPU 0", "GPU 1"]
    assert lines[1].seen.endswith(f"MIG 0, 9.5 GiB, 0 MiB in use, {mig_uuid(0, 0)}")


def test_memory_that_the_driver_does_not_know(tmp_path: Path) -> None:
    assert "the host's memory" in lines_of(host_with_gpus(tmp_path, (FakeGpu(memory_mib=0),)))[1].seen


def test_a_driver_without_gpus_is_a_problem(tmp_path: Path) -> None:
    (line,) = lines_of(host_with_gpus(tmp_path, ()))
    assert (line.verdict, "shows no GPU" in line.seen) == ("problem", True)
    assert "nvidia-smi mig" in line.advice


@pytest.mark.parametrize(
    ("script", "seen", "advice"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            "Driver/library version mismatch",
            "Restart the host",
        ),
        (
            'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9',
            "couldn't communicate",
            "modprobe nvidia",
        ),
        ("echo 'No devices were found'; exit 6", "exit code 6", "--gpus all"),
        ("exec sleep 600", "no answer within 0.2 s", "dmesg"),
        ("exit 14", "exit code 14", "Run nvidia-smi"),
    ],
)
def test_a_driver_that_fails_has_a_remedy(tmp_path: Path, script: str, seen: str, advice: str) -> None:
    driver = read_driver(host_with_smi(tmp_path, script), 0.2 if "sleep" in script else None)
    line = driver_line(driver, MODULE)
    assert line.verdict == "problem"
    assert seen in line.seen
    assert advice in line.advice


def test_triton_compiles_c() -> None:
    assert compiler_line("/usr/bin/gcc", {"a": True, "b": True}).verdict == "ok"
    assert compiler_line("/usr/bin/gcc", {}).verdict == "not looked at"
    missing = compiler_line(None, {"a": True})
    assert (missing.verdict, missing.advice) == ("problem", "Install gcc, or set CC.")
    without = compiler_line("/usr/bin/gcc", {"a": True, "b": False})
    assert without.verdict == "problem"
    assert "Python.h for b" in without.seen
    assert "python3-dev" in without.advice
