"""What the time of a step goes into, by torch's profiler: matrix products, attention, and everything else by name.

Owns the division into kinds. On a GPU times are those of kernels; on a CPU those of operators.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType  # torch.autograd does not export it
from torch.profiler import ProfilerActivity, profile

# Parts of names, in lower case: of libraries' kernels, and of torch's operators on a CPU.
MATRIX = ("gemm", "gemv", "cutlass", "nvjet", "xmma", "cublas", "splitk", "aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = ("flex_attention", "flash", "triton_tem", "_scaled_dot_product", "piecewiseattention")
NUM_TOP = 8


@dataclass(frozen=True)
class Profile:
    """Shares of the busy time: of each kind, and of the largest others by name; busy: share of the wall time."""

    matrix: float
    attention: float
    top_others: tuple[tuple[str, float], ...]
    busy: float


def profiled(step: Callable[[], Any], *, cuda: bool) -> Profile:
    """One step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()
    averages: Any = seen.key_averages()
    times = kernel_times(averages) if cuda else {each.key: each.self_cpu_time_total for each in averages}
    spans = [(each.time_range.start, each.time_range.end) for each in seen.events() or ()]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    return divided(times, wall)


def kernel_times(averages: Iterable[Any]) -> dict[str, float]:
    """Of a GPU's kernels by name. Annotations, such as the optimizer's, span kernels that count already."""
    kernels = [each for each in averages if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    return {each.key: each.self_device_time_total for each in kernels}


def divided(times: dict[str, float], wall: float) -> Profile:
    """`times` by name and `wall` in the same unit. Time that no kernel was running is in neither kind."""
    total = sum(times.values()) or 1.0
    kinds = {"matrix": 0.0, "attention": 0.0}
    others: dict[str, float] = {}
    for name, value in times.items():
        lower = name.lower()
        if any(part in lower for part in ATTENTION):
            kinds["attention"] += value
        elif any(part in lower for part in MATRIX):
            kinds["matrix"] += value
        else:
            others[name] = value
    top = sorted(others.items(), key=lambda each: -each[1])[:NUM_TOP]
    return Profile(
        kinds["matrix"] / total,
        kinds["attention"] / total,
        tuple((name, value / total) for name, value in top if value),
        min(1.0, total / wall) if wall > 0 else 0.0,
    )
