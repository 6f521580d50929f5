"""The hardware and the versions of what ran on it, and what a GPU can compute at most."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from penstock_launch.gpus.nvidia import read_driver

# Dense bfloat16 products with float32 sums, in TFLOP/s, from NVIDIA's data sheets. The first name that is part of the
# GPU's own counts.
PEAK_TFLOPS = {
    "GB200": 2450.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "A40": 150.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L4": 121.0,
    "4090": 165.0,
    "3090": 71.0,
}
PACKAGES = ("torch", "triton", "transformers", "penstock", "numpy", "safetensors")


def peak_tflops(name: str) -> float | None:
    """Of the GPU of that name; None if it is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def gpu_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def facts(*, cpu: bool) -> dict[str, Any]:
    """What a reader of the figures must know."""
    gpus = [] if cpu else [torch.cuda.get_device_properties(each) for each in range(torch.cuda.device_count())]
    return {
        "device": "cpu" if cpu else "cuda",
        "gpus": [each.name for each in gpus],
        "gpu_gib": [round(each.total_memory / 2**30, 1) for each in gpus],
        "driver": "" if cpu else _driver(),
        "cuda": torch.version.cuda or "",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _driver() -> str:
    driver = read_driver(os.environ)
    return driver.version if driver else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
