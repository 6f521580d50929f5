"""The machine: interpreter, cores, memory, limits."""

import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping

import psutil

from penstock.runtime.connections import MAX_CONNECTIONS, connections_within, raised_file_limit
from penstock_launch.doctor.cgroup import Limits
from penstock_launch.doctor.report import Line, amount, ok, problem, warning

FEWEST_CORES = 2  # README: an engine and a trainer work side by side
LEAST_MEMORY_BYTES = 4e9  # less than an engine of the smallest model, a trainer and torch's libraries take
FEWEST_PROCESSES = 4096  # docker-compose.yml gives each container as many; threads count


def python_line() -> Line:
    """The interpreter and the platform."""
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    seen = f"{platform.python_version()} ({sys.executable}), {system}"
    if sys.platform != "linux":
        return problem("Python", seen, "Run Penstock on Linux: SGLang and the supervision of processes need it.")
    return ok("Python", seen)


def read_cores() -> tuple[int, int]:
    """The cores that this process may run on, and those of the machine."""
    return len(os.sched_getaffinity(0)), os.cpu_count() or 1


def cores_line(usable: int, there: int, quota: float | None) -> Line:
    """quota: of the control group, in cores."""
    seen = f"{usable} of {there}" + (f", and a quota of {quota:g}" if quota is not None else "")
    if min(usable, quota or usable) < FEWEST_CORES:
        advice = "Give this process two cores or more (docker: --cpus, Slurm: --cpus-per-task, or taskset)."
        return warning("CPU cores", seen, advice)
    return ok("CPU cores", seen)


def memory_line(total: int, available: int, limit: int | None) -> Line:
    """Of the host, and the limit of the control group, in bytes."""
    seen = f"{amount(available)} of {amount(total)} are free"
    if limit is not None:
        seen += f", of which a control group lets this process use {amount(limit)}"
    if min(available, limit or available) < LEAST_MEMORY_BYTES:
        advice = (
            "End other processes, or raise the limit (docker: --memory, Slurm: --mem); docs/operations.md has sizes."
        )
        return warning("memory", seen, advice)
    return ok("memory", seen)


def files_line(soft: int, hard: int) -> Line:
    """The limit of open files, as getrlimit reports it."""
    raised = raised_file_limit(soft, hard)
    connections = connections_within(raised)
    shown = "no limit" if raised == resource.RLIM_INFINITY else str(raised)
    seen = f"{shown}: each service accepts {connections} connections"
    if connections < MAX_CONNECTIONS:
        advice = f"Raise the hard limit to {4 * MAX_CONNECTIONS} or more: ulimit -Hn, or docker's --ulimit nofile."
        return warning("open files", f"{seen} instead of {MAX_CONNECTIONS}", advice)
    return ok("open files", seen)


def processes_line(limit: int, group_limit: int | None) -> Line:
    """limit: of processes and threads of this user, as getrlimit reports it; group_limit: of the control group."""
    limits = [each for each in (limit, group_limit) if each is not None and each != resource.RLIM_INFINITY]
    if not limits:
        return ok("processes", "no limit")
    seen = f"at most {min(limits)} processes and threads"
    if min(limits) < FEWEST_PROCESSES:
        advice = f"Raise it to {FEWEST_PROCESSES} or more: ulimit -u, or docker's --pids-limit."
        return warning("processes", seen, advice)
    return ok("processes", seen)


def memory_now(limits: Limits) -> Line:
    """As it is now."""
    memory = psutil.virtual_memory()
    return memory_line(memory.total, memory.available, limits.memory_bytes)


MACHINE_LINES: Mapping[str, Callable[[Limits], Line]] = {
    "Python": lambda limits: python_line(),
    "CPU cores": lambda limits: cores_line(*read_cores(), limits.cores),
    "memory": memory_now,
    "open files": lambda limits: files_line(*resource.getrlimit(resource.RLIMIT_NOFILE)),
    "processes": lambda limits: processes_line(resource.getrlimit(resource.RLIMIT_NPROC)[0], limits.num_processes),
}
"""As each is now."""
