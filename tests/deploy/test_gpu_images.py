"""The images for GPUs, without a GPU: they are built, and what they compile is executed in a container like compose's.

Needs a container engine; without one it is skipped with the reason. In place of SGLang's image of 20 GB stands one that
holds no more of SGLang than its name. The trainer's image is the real one: a download of 3.3 GB.
"""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.deploy.topology import Topology, clone, why_not

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(3600)]

BUILD_SECONDS = 3600
RUN_SECONDS = 300
TARGETS = {"rollout": "penstock-rollout-gpu", "trainer": "penstock-trainer-gpu"}
STAND_IN = """
FROM python:3.11-slim
RUN info="$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/sglang-0.dist-info" \\
    && mkdir -p "$info" && printf 'Metadata-Version: 2.1\\nName: sglang\\nVersion: 0\\n' > "$info/METADATA"
"""
# Inductor writes C++ for a CPU, as it writes Triton for a GPU; both lie in the same caches.
COMPILE = """
import torch
assert torch.version.cuda, torch.__version__
twice = torch.compile(lambda x: 2 * x + 1)
assert twice(torch.ones(64)).tolist() == [3.0] * 64
"""
# As Triton's driver compiles its launcher, with Python.h.
LAUNCHER = """
from triton.runtime.build import compile_module_from_src
source = '''
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stub", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_stub(void) { return PyModule_Create(&definition); }
'''
assert compile_module_from_src(source, "stub").__name__ == "stub"
"""


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    if reason := why_not():
        pytest.skip(f"the images for GPUs are not built: {reason}")
    folder = tmp_path_factory.mktemp("gpu-images") / "penstock"
    name = f"penstock-test-{os.getpid()}"
    clone(folder, COMPOSE_FILE="docker-compose.yml:compose.gpu.yaml", SGLANG_IMAGE=f"{name}-sglang")
    (folder.parent / "Dockerfile").write_text(STAND_IN)
    docker(
        "build", "--quiet", "--tag", f"{name}-sglang", "--file", str(folder.parent / "Dockerfile"), str(folder.parent)
    )
    docker("volume", "create", name)
    try:
        yield Topology(folder, name)
    finally:
        docker("volume", "rm", name)


def docker(*arguments: str) -> str:
    """The output; AssertionError with it if the command fails."""
    ran = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert ran.returncode == 0, f"{' '.join(arguments)}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def container(topology: Topology, service: str, *arguments: str) -> list[str]:
    """A container as compose makes it, but for the GPU: read-only, nothing executable in /tmp, a volume for caches."""
    limits = ["--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp:mode=1777,size=1g", "--init"]
    cache = ["--volume", f"{topology.project}:/penstock/cache"]
    return ["run", "--rm", *limits, *cache, *arguments[:-1], TARGETS[service], *arguments[-1:]]


@pytest.mark.parametrize("service", TARGETS)
def test_an_image_is_built_and_starts(topology: Topology, service: str) -> None:
    topology.compose("build", "--quiet", service, timeout_seconds=BUILD_SECONDS)
    command = ["docker", *container(topology, service, "--config=absent.yaml")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "absent.yaml" in ran.stderr


def python(topology: Topology, service: str, script: str, *arguments: str) -> str:
    """The output of a Python script in the image."""
    run = container(topology, service, *arguments, "--entrypoint", "python", "")[:-1]
    return docker(*run, "-c", script)


def test_sglang_has_its_python(topology: Topology) -> None:
    run = container(topology, "rollout", "--entrypoint", "/opt/sglang/bin/python", "")[:-1]
    shown = docker(*run, "-c", "from importlib.metadata import version; print(version('sglang'))")
    assert shown == "0\n"


@pytest.mark.parametrize("script", [COMPILE, LAUNCHER], ids=["inductor", "triton"])
def test_what_the_trainer_compiles_is_executed(topology: Topology, script: str) -> None:
    python(topology, "trainer", script)
    kept = "import pathlib; print(*pathlib.Path('/penstock/cache').rglob('*.so'), sep='\\n')"
    folder = "inductor" if script is COMPILE else "triton"
    assert f"/penstock/cache/{folder}/" in python(topology, "trainer", kept)


def test_nothing_is_executed_in_tmp(topology: Topology) -> None:
    """And so the two tests above would fail with the libraries' own folders."""
    caches = ["--env", "TORCHINDUCTOR_CACHE_DIR=/tmp/inductor", "--env", "TRITON_CACHE_DIR=/tmp/triton"]
    with pytest.raises(AssertionError, match=r"failed to map segment|Operation not permitted"):
        python(topology, "trainer", LAUNCHER, *caches)
