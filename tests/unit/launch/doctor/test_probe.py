"""What an interpreter is asked, with stand-ins for torch, SGLang and its kernels on its module path."""

import os
import sys
from pathlib import Path

import pytest

from penstock_launch.doctor.environments import Environment, Torch, examine

TORCH = """
import types, warnings
version = types.SimpleNamespace(cuda={cuda!r})
def is_available():
    {look}
    return {num_gpus} > 0
def init():
    {init}
cuda = types.SimpleNamespace(is_available=is_available, device_count=lambda: {num_gpus}, init=init)
"""


def install(folder: Path, package: str, version: str, module: str, source: str) -> None:
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (folder / f"{module}.py").write_text(source)


def ask(folder: Path) -> Environment:
    return examine(sys.executable, ("torch", "sglang"), {**os.environ, "PYTHONPATH": str(folder)})


def torch(cuda: str | None = "13.0", num_gpus: int = 0, look: str = "pass", init: str = "pass") -> str:
    return TORCH.format(cuda=cuda, num_gpus=num_gpus, look=look, init=init)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (torch(None), Torch()),
        (torch(num_gpus=8), Torch("13.0", 8)),
        (torch(look="warnings.warn('driver is too old')"), Torch("13.0", 0, "driver is too old")),
        (torch(num_gpus=1, init="warnings.warn('not compatible')"), Torch("13.0", 1, "not compatible")),
        (torch(num_gpus=1, init="raise RuntimeError('all busy')"), Torch("13.0", 0, "RuntimeError: all busy")),
        ("raise ImportError('libcudart.so.13')", Torch("", 0, "ImportError: libcudart.so.13")),
    ],
)
def test_torch_is_asked_what_it_can_use(tmp_path: Path, source: str, expected: Torch) -> None:
    install(tmp_path, "torch", "9.9", "torch", source)
    found = ask(tmp_path)
    assert (found.versions["torch"], found.torch, found.crash) == ("9.9", expected, "")


@pytest.mark.parametrize(
    ("num_gpus", "kernels", "expected"),
    [(0, "", None), (1, "", ""), (1, "raise ImportError('no sm_70')", "ImportError: no sm_70")],
)
def test_kernels_are_imported_where_there_is_a_gpu(
    tmp_path: Path, num_gpus: int, kernels: str, expected: str | None
) -> None:
    install(tmp_path, "torch", "9.9", "torch", torch(num_gpus=num_gpus))
    install(tmp_path, "sglang", "9.8", "sglang", "")
    install(tmp_path, "sglang-kernel", "9.7", "sgl_kernel", kernels)
    found = ask(tmp_path)
    assert (found.versions, found.kernels) == ({"torch": "9.9", "sglang": "9.8"}, expected)


def test_a_crash_of_the_kernels_leaves_what_was_known(tmp_path: Path) -> None:
    install(tmp_path, "torch", "9.9", "torch", torch(num_gpus=1))
    install(tmp_path, "sglang", "9.8", "sglang", "")
    install(tmp_path, "sglang-kernel", "9.7", "sgl_kernel", "import os; os._exit(11)")
    found = ask(tmp_path)
    assert (found.torch, found.kernels) == (Torch("13.0", 1), None)
    assert found.crash.startswith("exit code 11")
