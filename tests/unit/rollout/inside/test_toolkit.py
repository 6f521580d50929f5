"""The folder of links with which SGLang compiles kernels on a host that has only a driver."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock_rollout.engine.sglang.inside import toolkit
from penstock_rollout.engine.sglang.inside.toolkit import link_toolkit, variables

PARTS = (
    "bin/nvcc", "include/cuda.h", "nvvm/bin/cicc", "lib/libcudart.so.13", "lib/libcudart_static.a",
    "lib/libnvrtc-builtins.so.13.0", "lib/libcheckpoint.so", "lib/readme.txt",
)  # fmt: skip


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """site-packages with pip's toolkit in it."""
    for part in PARTS:
        path = tmp_path / "site-packages" / "nvidia" / "cu13" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(part)
    installed(tmp_path / "site-packages", nvidia_cuda_nvcc="13.0.88", nvidia_cuda_runtime="13.0.96")
    return tmp_path / "site-packages"


def installed(packages: Path, **versions: str) -> None:
    """Note these packages as pip does."""
    for name, version in versions.items():
        folder = packages / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")


def test_the_links_have_the_names_that_compilers_and_linkers_look_for(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "usr" / "libcuda.so.1"
    monkeypatch.setattr(toolkit, "_driver", lambda: driver)
    root = packages / "nvidia" / "cu13"
    folder = link_toolkit(root, tmp_path / "cache")
    assert (folder / "bin" / "nvcc").read_text() == "bin/nvcc"
    assert (folder / "include" / "cuda.h").read_text() == "include/cuda.h"
    assert (folder / "nvvm" / "bin" / "cicc").read_text() == "nvvm/bin/cicc"
    assert {path.name: os.readlink(path) for path in (folder / "lib64").iterdir() if path.is_symlink()} == {
        "libcudart.so": f"{root}/lib/libcudart.so.13",
        "libcudart_static.a": f"{root}/lib/libcudart_static.a",
        "libnvrtc-builtins.so": f"{root}/lib/libnvrtc-builtins.so.13.0",
        "libcheckpoint.so": f"{root}/lib/libcheckpoint.so",
    }
    assert os.readlink(folder / "lib64" / "stubs" / "libcuda.so") == str(driver)
    assert link_toolkit(root, tmp_path / "cache") == folder


def test_other_libraries_get_another_folder(packages: Path, tmp_path: Path) -> None:
    root = packages / "nvidia" / "cu13"
    before = link_toolkit(root, tmp_path)
    (root / "lib" / "libcudart.so.13").rename(root / "lib" / "libcudart.so.14")
    after = link_toolkit(root, tmp_path)
    assert after != before
    assert (after / "lib64" / "libcudart.so").exists()


def test_engines_that_start_together_share_one_folder(packages: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        root = packages / "nvidia" / "cu13"
        folders = list(pool.map(lambda _: link_toolkit(root, tmp_path / "cache"), range(32)))
    assert len(set(folders)) == 1
    assert list((tmp_path / "cache").iterdir()) == [folders[0]]


def test_the_engine_finds_ninja_and_the_compiler(packages: Path, tmp_path: Path) -> None:
    environ = {"PATH": "/usr/bin", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = variables(environ, packages, Path("/venv/bin"))
    assert found.keys() == {"PATH", "CUDA_HOME"}
    assert found["PATH"] == "/venv/bin:/usr/bin"
    assert Path(found["CUDA_HOME"]).parent == tmp_path / "cache" / "penstock"


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_was_named_stays(packages: Path, tmp_path: Path, name: str) -> None:
    environ = {name: "/opt/cuda", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert variables(environ, packages, Path("/venv/bin")).keys() == {"PATH"}


def test_a_compiler_of_another_cuda_than_the_headers_is_not_named(packages: Path, tmp_path: Path) -> None:
    (packages / "nvidia_cuda_nvcc-13.0.88.dist-info").rename(tmp_path / "gone")
    installed(packages, nvidia_cuda_nvcc="13.5.37")
    assert variables({"XDG_CACHE_HOME": str(tmp_path)}, packages, Path("/venv/bin")).keys() == {"PATH"}


def test_without_pips_compiler_nothing_is_named(tmp_path: Path) -> None:
    assert variables({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path, Path("/venv/bin")).keys() == {"PATH"}


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    packages: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert variables({"XDG_CACHE_HOME": str(tmp_path / "cache")}, packages, Path("/venv/bin")).keys() == {"PATH"}
    assert "kernels are compiled by another nvcc" in caplog.text


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_linker_finds_the_libraries(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, root = tmp_path / "libcuda.so.1", packages / "nvidia" / "cu13"
    for library in (driver, root / "lib" / "libcudart.so.13"):
        link(library, f"-Wl,-soname,{library.name}")
    monkeypatch.setattr(toolkit, "_driver", lambda: driver)
    lib64 = link_toolkit(root, tmp_path / "cache") / "lib64"
    kernel = tmp_path / "kernel.so"
    link(kernel, "-Wl,--no-as-needed", f"-L{lib64}", f"-L{lib64}/stubs", "-lcudart", "-lcuda")
    needed = kernel.read_bytes()
    assert b"libcudart.so.13" in needed
    assert b"libcuda.so.1" in needed


def link(output: Path, *options: str) -> None:
    """Make an empty shared library."""
    output.unlink(missing_ok=True)
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-x", "none", "-o", str(output), *options], check=True)
