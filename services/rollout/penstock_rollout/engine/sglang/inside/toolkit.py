"""Lets SGLang compile kernels with the CUDA compiler that pip has installed next to it.

SGLang and FlashInfer compile kernels at their first use. They look for a CUDA toolkit in CUDA_HOME, on PATH and in
/usr/local/cuda, and for `ninja` on PATH. A host that has only a driver has neither; the headers of a toolkit may be of
another CUDA than torch. The packages of pip have all parts of the right one, in one folder. But it lacks the names that
linkers look for: it has lib/libcudart.so.13, not lib64/libcudart.so.

Owns a folder of links that has these names. Its path is the same at each start, since compiled kernels are found again
by it. Runs inside SGLang's environment, before SGLang starts.
"""

import ctypes
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

DRIVER = "libcuda.so.1"
COMPILER, HEADERS = "nvidia-cuda-nvcc", "nvidia-cuda-runtime"
SHARED = re.compile(r"(lib.+?\.so)[.\d]*")

log = logging.getLogger(__name__)


def variables(environ: Mapping[str, str], packages: Path, programs: Path) -> dict[str, str]:
    """The variables that are to be set. A CUDA_HOME or CUDA_PATH that is set stays.

    packages: the environment's site-packages. programs: the folder of its executables.
    """
    found = {"PATH": os.pathsep.join([str(programs), environ.get("PATH", os.defpath)])}
    compilers = sorted(packages.glob("nvidia/cu*/bin/nvcc"))
    if compilers and _fit_together(packages) and not (environ.get("CUDA_HOME") or environ.get("CUDA_PATH")):
        cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        try:
            found["CUDA_HOME"] = str(link_toolkit(compilers[-1].parents[1], cache / "penstock"))
        except OSError as error:
            log.warning("no folder of links to %s: %s; kernels are compiled by another nvcc", compilers[-1], error)
    return found


def link_toolkit(root: Path, cache: Path) -> Path:
    """A folder in `cache` that is a CUDA toolkit, of links to pip's at `root`. OSError if it cannot be made."""
    links = {name: root / name for name in ("bin", "include", "nvvm")}
    for path in sorted((root / "lib").iterdir()):
        if name := _linkers_name(path.name):
            links[f"lib64/{name}"] = path
    if driver := _driver():
        links["lib64/stubs/libcuda.so"] = driver
    digest = hashlib.sha256(repr(sorted((name, str(path)) for name, path in links.items())).encode()).hexdigest()[:12]
    folder = cache / f"cuda-{digest}"
    if not folder.exists():
        _link(links, folder)
    return folder


def _link(links: Mapping[str, Path], folder: Path) -> None:
    """Make the folder at once: several engines may start at the same time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix="new-"))
    try:
        for name, target in links.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).symlink_to(target)
        made.rename(folder)
    except OSError:
        shutil.rmtree(made)
        if not folder.exists():  # otherwise another engine was faster
            raise


def _fit_together(packages: Path) -> bool:
    """Whether pip's compiler and headers are of one CUDA; others refuse each other."""
    cuda = {
        each.name: each.version.split(".")[:2]
        for each in importlib.metadata.distributions(path=[str(packages)])
        if each.name in (COMPILER, HEADERS)
    }
    return COMPILER in cuda and cuda[COMPILER] == cuda.get(HEADERS)


def _linkers_name(name: str) -> str:
    """libcudart.so of libcudart.so.13; empty for what is no library."""
    shared = SHARED.fullmatch(name)
    return shared[1] if shared else name if name.endswith(".a") else ""


def _driver() -> Path | None:
    """The driver's library, wherever the host keeps it; loading it starts no context."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return None
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = (Path(line.split(maxsplit=5)[5]) for line in mapped if "/libcuda.so" in line)
    return next(paths, None)
