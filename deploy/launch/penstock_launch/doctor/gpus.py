"""GPUs: what the driver shows, what of it is visible, and whether code can be compiled for them.

Pure functions of what `penstock_launch.gpus.nvidia` read.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from penstock.config import Config
from penstock_launch.doctor.report import Line, amount, not_looked_at, ok, problem, warning
from penstock_launch.gpus.nvidia import VISIBLE, Driver, Gpu, visible

WHAT = "NVIDIA driver"
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
# What nvidia-smi says, and what helps.
REMEDIES = {
    "version mismatch": "Restart the host: the driver was updated, and its kernel module is still the old one.",
    "couldn't communicate": "Load the kernel module (modprobe nvidia), or install the driver again for this kernel.",
    "no answer": "Look for Xid errors in dmesg, and restart the host: a GPU or the driver hangs.",
    "No devices were found": "Give the container a GPU (docker: --gpus all), or look for the GPU in lspci and dmesg.",
}
OTHER_REMEDY = "Run nvidia-smi: it must list the GPUs before anything else can use them."


def read_kernel_module(path: Path = KERNEL_MODULE) -> str:
    """The first line about the driver's kernel module; empty if it is not loaded."""
    try:
        return path.read_text().partition("\n")[0]
    except OSError:
        return ""


def keys_for_cuda(config: Config) -> list[str]:
    """The keys by which a process ends if it has no GPU."""
    devices = {"rollout.engine.device": config.rollout.engine.device, "trainer.device": config.trainer.device}
    return [key for key, device in devices.items() if device == "cuda"]


def driver_lines(driver: Driver | None, environ: Mapping[str, str], cuda_keys: Sequence[str]) -> list[Line]:
    """The driver and its GPUs, with the kernel module as it is now. cuda_keys: of `keys_for_cuda`."""
    return [driver_line(driver, read_kernel_module(), cuda_keys), *gpu_lines(driver, environ, cuda_keys)]


def driver_line(driver: Driver | None, kernel_module: str, cuda_keys: Sequence[str] = ()) -> Line:
    """The driver."""
    if driver is None:
        return _without_smi(kernel_module, cuda_keys)
    if driver.problem:
        remedy = next((text for sign, text in REMEDIES.items() if sign in driver.problem), OTHER_REMEDY)
        return problem(WHAT, f"nvidia-smi: {driver.problem}", remedy)
    seen = f"{driver.version}, for CUDA up to {driver.cuda_version}"
    if not driver.gpus:
        advice = (
            "Give the container a GPU (docker: --gpus all), or look for it in lspci and dmesg; if MIG divides it, make "
            "instances (nvidia-smi mig -cgi)."
        )
        return problem(WHAT, f"{seen}, but it shows no GPU", advice)
    return ok(WHAT, seen)


def _without_smi(kernel_module: str, cuda_keys: Sequence[str]) -> Line:
    if kernel_module:
        advice = (
            "In a container, start it with --gpus all (NVIDIA's Container Toolkit, NVIDIA_DRIVER_CAPABILITIES "
            "compute,utility); on a host, install the rest of the driver, nvidia-smi among it."
        )
        return warning(WHAT, f"its kernel module is loaded, but nvidia-smi is not on PATH ({kernel_module})", advice)
    if cuda_keys:
        advice = f"Install NVIDIA's driver, or set {' and '.join(cuda_keys)} to auto."
        return problem(WHAT, f"none, and {_need(cuda_keys)}", advice)
    return ok(WHAT, "none: everything runs on the CPU")


def gpu_lines(driver: Driver | None, environ: Mapping[str, str], cuda_keys: Sequence[str] = ()) -> Iterator[Line]:
    """One for each GPU or instance, and one for what CUDA_VISIBLE_DEVICES leaves."""
    if driver is None or not driver.gpus:
        return
    seen = visible(driver.gpus, environ)
    for gpu in driver.gpus:
        yield _gpu_line(gpu, gpu in seen)
    if VISIBLE in environ:
        yield _visible_line(driver.gpus, seen, environ[VISIBLE], cuda_keys)


def _gpu_line(gpu: Gpu, is_visible: bool) -> Line:
    what = f"GPU {gpu.index}"
    memory = f"{amount(gpu.memory_bytes)}, {amount(gpu.used_bytes)} in use" if gpu.memory_bytes else "the host's memory"
    shown = f"{gpu.name}, {memory}{f', {gpu.uuid}' if gpu.is_mig else ''}"
    if is_visible and gpu.is_used:
        return warning(what, shown, "End what uses it (nvidia-smi lists it), unless that is a run of yours.")
    return ok(what, shown)


def _visible_line(gpus: Sequence[Gpu], seen: Sequence[Gpu], value: str, cuda_keys: Sequence[str]) -> Line:
    shown = f"{value!r} leaves {len(seen)} of {len(gpus)}"
    if seen:
        return ok(VISIBLE, shown)
    advice = f"Unset {VISIBLE}, or set it to indices or UUIDs that nvidia-smi -L shows."
    if cuda_keys:
        return problem(VISIBLE, f"{shown}, and {_need(cuda_keys)}", advice)
    return warning(VISIBLE, f"{shown}: everything runs on the CPU", advice)


def _need(cuda_keys: Sequence[str]) -> str:
    return f"{' and '.join(cuda_keys)} {'is' if len(cuda_keys) == 1 else 'are'} cuda"


def compiler_line(compiler: str | None, headers: Mapping[str, bool]) -> Line:
    """compiler: its path. headers: by interpreter, whether it has Python.h, which Triton's code includes."""
    what = "C compiler"
    if compiler is None:
        return problem(what, "none: Triton compiles a part of each kernel's launcher", "Install gcc, or set CC.")
    without = [python for python, there in headers.items() if not there]
    if without:
        seen = f"{compiler}, but no Python.h for {' and '.join(without)}"
        return problem(what, seen, "Install the headers of that Python, such as the package python3-dev.")
    if not headers:
        return not_looked_at(what, f"{compiler}; no interpreter answered whether it has Python.h")
    return ok(what, f"{compiler}, with Python.h")
