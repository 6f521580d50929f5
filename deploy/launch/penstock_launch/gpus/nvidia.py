"""What NVIDIA's driver shows on this host, and what of it this process may use.

Owns the call of `nvidia-smi`, which comes with every driver and into every container that is given a GPU, and the rules
of CUDA_VISIBLE_DEVICES. Starts no CUDA context: that would take memory from the processes of the run.
"""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SMI = "nvidia-smi"
SMI_TIMEOUT_SECONDS = 60  # a driver without persistence mode starts anew for each call; a lost GPU never answers
LOOK_SECONDS = 15.0  # for a person who waits: eight GPUs without persistence mode take ten
VISIBLE = "CUDA_VISIBLE_DEVICES"
PCI_DEVICES = Path("/sys/bus/pci/devices")
USED_FRACTION = 0.1  # of a GPU's memory; a desktop has less of the GPU that shows it
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Gpu:
    """A device that one process can compute on: a GPU, or an instance of a GPU that MIG divides.

    index: its GPU's number in nvidia-smi, which is the order of the PCI bus. uuid: GPU-... or MIG-.... memory_bytes:
    its memory; used_bytes: what processes have of it now. numa_node: of the host; None if the host does not say.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int
    used_bytes: int
    numa_node: int | None = None

    @property
    def is_mig(self) -> bool:
        """Whether it is a part of a GPU."""
        return self.uuid.startswith("MIG-")

    @property
    def label(self) -> str:
        """What names it alone on its host, for people: its number, or an instance's UUID."""
        return self.uuid if self.is_mig else str(self.index)

    @property
    def is_used(self) -> bool:
        """Whether processes have so much of its memory that others should not be placed there."""
        return self.used_bytes > USED_FRACTION * self.memory_bytes > 0


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver. cuda_version: the newest CUDA that it runs. problem: why it shows no GPU, if it fails."""

    version: str = ""
    cuda_version: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


def read_driver(environ: Mapping[str, str], timeout_seconds: float | None = None) -> Driver | None:
    """The driver of this host; None if nvidia-smi is not on PATH. Blocks for a second or so.

    timeout_seconds: of each of its up to two answers; None: SMI_TIMEOUT_SECONDS.
    """
    smi = shutil.which(SMI, path=environ.get("PATH"))
    if smi is None:
        return None
    seconds = SMI_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
    try:
        document = _ask(smi, seconds, "--query", "--xml-format")
        root = ElementTree.fromstring(document)
        uuids = _mig_uuids(_ask(smi, seconds, "--list-gpus")) if "<mig_device>" in document else {}
        gpus = [gpu for index, each in enumerate(root.findall("gpu")) for gpu in _gpus(index, each, uuids)]
    except (OSError, ValueError, ElementTree.ParseError, subprocess.SubprocessError) as error:
        return Driver(problem=_problem(error))
    return Driver(_text(root, "driver_version"), _text(root, "cuda_version"), tuple(gpus))


def visible(gpus: tuple[Gpu, ...], environ: Mapping[str, str]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves to this process, in its order; all if it is not set.

    As in CUDA: a name is an index, or a UUID or its beginning; the first one that names no device ends the list.
    """
    if VISIBLE not in environ:
        return list(gpus)
    chosen: list[Gpu] = []
    for name in (part.strip() for part in environ[VISIBLE].split(",")):
        gpu = find(gpus, name)
        if gpu is None or gpu in chosen:
            break
        chosen.append(gpu)
    return chosen


def has_gpu(driver: Driver | None, environ: Mapping[str, str]) -> bool:
    """Whether this process may use one."""
    return driver is not None and bool(visible(driver.gpus, environ))


def find(gpus: tuple[Gpu, ...], name: str) -> Gpu | None:
    """The device with this index, UUID or beginning of a UUID; of a divided GPU, its first instance."""
    if name.isascii() and name.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(name)), None)
    if not name.startswith(("GPU-", "MIG-")):
        return None
    found = [gpu for gpu in gpus if gpu.uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def _ask(smi: str, timeout_seconds: float, *arguments: str) -> str:
    done = subprocess.run(
        [smi, *arguments], capture_output=True, check=True, text=True, errors="replace", timeout=timeout_seconds
    )
    return done.stdout


def _problem(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {error.timeout:g} s"
    if isinstance(error, subprocess.CalledProcessError):
        said = " ".join(f"{error.stdout} {error.stderr}".split())
        return f"exit code {error.returncode}: {said[-300:]}" if said else f"exit code {error.returncode}"
    return f"its answer cannot be read: {error}"


def _gpus(index: int, element: ElementTree.Element, mig_uuids: Mapping[tuple[int, int], str]) -> list[Gpu]:
    """The GPU, or its instances if MIG divides it."""
    name, node = _text(element, "product_name"), _numa_node(element.get("id", ""))
    if _text(element, "mig_mode/current_mig") != "Enabled":
        return [Gpu(index, _text(element, "uuid"), name, *_memory(element), node)]
    instances = element.findall("mig_devices/mig_device")
    numbered = [(int(_text(each, "index")), each) for each in instances]
    return [
        Gpu(index, mig_uuids.get((index, number), ""), f"{name} MIG {number}", *_memory(each), node)
        for number, each in numbered
    ]


def _mig_uuids(listing: str) -> dict[tuple[int, int], str]:
    """By number of GPU and of instance. The XML document does not have them."""
    uuids: dict[tuple[int, int], str] = {}
    gpu = 0
    for line in listing.splitlines():
        if begins := re.match(r"GPU (\d+):", line):
            gpu = int(begins[1])
        elif instance := re.match(r"\s+MIG .*Device\s+(\d+):.*\bUUID: (MIG-[^)\s]+)", line):
            uuids[gpu, int(instance[1])] = instance[2]
    return uuids


def _memory(element: ElementTree.Element) -> tuple[int, int]:
    """Total and used bytes."""
    return _bytes(_text(element, "fb_memory_usage/total")), _bytes(_text(element, "fb_memory_usage/used"))


def _bytes(text: str) -> int:
    """Of `81559 MiB`; 0 for `[N/A]`, as of a GPU that shares the host's memory."""
    number, _, unit = text.partition(" ")
    return int(number) * UNITS[unit] if number.isdecimal() else 0


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _numa_node(bus_id: str) -> int | None:
    """Of `00000000:1B:00.0`. The kernel's names have a domain of four digits."""
    path = PCI_DEVICES / bus_id.lower().removeprefix("0000") / "numa_node"
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
