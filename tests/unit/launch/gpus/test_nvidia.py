"""What is read of NVIDIA's driver, and what CUDA_VISIBLE_DEVICES leaves of it."""

from pathlib import Path

import pytest

import penstock_launch.gpus.nvidia as nvidia
from penstock_launch.gpus.nvidia import Driver, Gpu, read_driver, visible
from tests.gpus import MIB, FakeGpu, gpu_uuid, host_with_gpus, host_with_smi, mig_uuid

TWO = (FakeGpu(), FakeGpu(name="NVIDIA L4", memory_mib=23034, used_mib=1000))
DIVIDED = (FakeGpu(mig_mib=(9728, 19968)), FakeGpu())


def driver_of(environ: dict[str, str]) -> Driver:
    driver = read_driver(environ)
    assert driver is not None
    return driver


def gpus_of(folder: Path, gpus: tuple[FakeGpu, ...]) -> tuple[Gpu, ...]:
    return driver_of(host_with_gpus(folder, gpus)).gpus


def test_a_host_without_a_driver_has_none(tmp_path: Path) -> None:
    assert read_driver({"PATH": str(tmp_path)}) is None


def test_the_gpus_of_a_host(tmp_path: Path) -> None:
    driver = driver_of(host_with_gpus(tmp_path, TWO))
    assert (driver.version, driver.cuda_version, driver.problem) == ("580.95.05", "13.0", "")
    assert driver.gpus == (
        Gpu(0, gpu_uuid(0), "NVIDIA H100 80GB HBM3", 81559 * MIB, 4 * MIB),
        Gpu(1, gpu_uuid(1), "NVIDIA L4", 23034 * MIB, 1000 * MIB),
    )


def test_a_divided_gpu_counts_as_its_instances(tmp_path: Path) -> None:
    gpus = gpus_of(tmp_path, DIVIDED)
    assert [(gpu.index, gpu.uuid, gpu.memory_bytes) for gpu in gpus] == [
        (0, mig_uuid(0, 0), 9728 * MIB),
        (0, mig_uuid(0, 1), 19968 * MIB),
        (1, gpu_uuid(1), 81559 * MIB),
    ]
    assert [gpu.is_mig for gpu in gpus] == [True, True, False]


def test_a_divided_gpu_without_instances_is_none(tmp_path: Path) -> None:
    assert gpus_of(tmp_path, (FakeGpu(mig_mib=()),)) == ()


def test_memory_that_the_driver_does_not_know_is_0(tmp_path: Path) -> None:
    assert gpus_of(tmp_path, (FakeGpu(memory_mib=0),))[0].memory_bytes == 0


def test_the_numa_node_is_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, node in ((0, "1"), (1, "-1")):
        path = tmp_path / f"0000:{number:02x}:00.0" / "numa_node"
        path.parent.mkdir()
        path.write_text(f"{node}\n")
    monkeypatch.setattr(nvidia, "PCI_DEVICES", tmp_path)
    assert [gpu.numa_node for gpu in gpus_of(tmp_path / "bin", TWO)] == [1, None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        (" 1 , 0 ", ["1", "0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,7,1", ["0"]),
        ("0,-1,1", ["0"]),
        ("0,0", ["0"]),
        ("GPU-00000001", ["1"]),
        ("GPU-", []),
        (gpu_uuid(1), ["1"]),
    ],
)
def test_only_visible_gpus_are_there(tmp_path: Path, value: str | None, expected: list[str]) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [str(gpu.index) for gpu in visible(gpus_of(tmp_path, TWO), environ)] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [mig_uuid(0, 0), mig_uuid(0, 1), gpu_uuid(1)]),
        ("0", [mig_uuid(0, 0)]),
        (mig_uuid(0, 1), [mig_uuid(0, 1)]),
        (f"{mig_uuid(0, 1)},1", [mig_uuid(0, 1), gpu_uuid(1)]),
    ],
)
def test_instances_are_visible_by_uuid(tmp_path: Path, value: str | None, expected: list[str]) -> None:
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert [gpu.uuid for gpu in visible(gpus_of(tmp_path, DIVIDED), environ)] == expected


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            "exit code 18: Failed to initialize NVML: Driver/library version mismatch",
        ),
        ("exit 9", "exit code 9"),
        ("echo nonsense", "its answer cannot be read: syntax error: line 1, column 0"),
    ],
)
def test_a_driver_that_fails_has_a_problem_and_no_gpus(tmp_path: Path, script: str, problem: str) -> None:
    assert driver_of(host_with_smi(tmp_path, script)) == Driver(problem=problem)


def test_a_driver_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "SMI_TIMEOUT_SECONDS", 0.2)
    assert driver_of(host_with_smi(tmp_path, "exec sleep 600")).problem == "no answer within 0.2 s"
