"""A stand-in for `nvidia-smi`: a host with GPUs, without one.

Its answers have the form of those of real drivers (535 to 580), shortened to what is read.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class FakeGpu:
    """A GPU. mig_mib: memory of each instance, if MIG divides it."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory_mib: int = 81559
    used_mib: int = 4
    mig_mib: Sequence[int] | None = None


def host_with_gpus(
    folder: Path, gpus: Sequence[FakeGpu], environ: Mapping[str, str] | None = None, *, driver: str = "580.95.05"
) -> dict[str, str]:
    """The environment of a process on a host with these GPUs; without CUDA_VISIBLE_DEVICES unless `environ` has it."""
    xml = "".join(_gpu_xml(number, gpu) for number, gpu in enumerate(gpus))
    head = f"<driver_version>{driver}</driver_version><cuda_version>13.0</cuda_version>"
    document = f"<?xml version='1.0' ?>\n<nvidia_smi_log>{head}{xml}</nvidia_smi_log>"
    listing = "\n".join(line for number, gpu in enumerate(gpus) for line in _lines(number, gpu))
    script = f"""case "$1" in
--query) echo {shlex.quote(document)};;
--list-gpus) echo {shlex.quote(listing)};;
*) echo "not known: $*"; exit 2;;
esac"""
    return host_with_smi(folder, script, environ)


def host_with_smi(folder: Path, script: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a process that finds this shell script as nvidia-smi."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    base = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {**base, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **(environ or {})}


def gpu_uuid(number: int) -> str:
    """UUID of a fake GPU."""
    return f"GPU-{number:08x}-1111-2222-3333-444444444444"


def mig_uuid(number: int, instance: int) -> str:
    """UUID of an instance of a fake GPU."""
    return f"MIG-{number:04x}{instance:04x}-1111-2222-3333-444444444444"


def _gpu_xml(number: int, gpu: FakeGpu) -> str:
    mode = "N/A" if gpu.mig_mib is None else "Enabled"
    instances = "".join(
        f"<mig_device><index>{index}</index>{_memory(mib, 0)}</mig_device>"
        for index, mib in enumerate(gpu.mig_mib or ())
    )
    return (
        f"<gpu id='00000000:{number:02X}:00.0'><product_name>{gpu.name}</product_name><uuid>{gpu_uuid(number)}</uuid>"
        f"<mig_mode><current_mig>{mode}</current_mig></mig_mode><mig_devices>{instances or 'None'}</mig_devices>"
        f"{_memory(gpu.memory_mib, gpu.used_mib)}</gpu>"
    )


def _memory(total_mib: int, used_mib: int) -> str:
    total = f"{total_mib} MiB" if total_mib else "[N/A]"
    return f"<fb_memory_usage><total>{total}</total><used>{used_mib} MiB</used></fb_memory_usage>"


def _lines(number: int, gpu: FakeGpu) -> list[str]:
    instances = [
        f"  MIG 1g.10gb     Device  {index}: (UUID: {mig_uuid(number, index)})"
        for index, _ in enumerate(gpu.mig_mib or ())
    ]
    return [f"GPU {number}: {gpu.name} (UUID: {gpu_uuid(number)})", *instances]
