"""CPU time from the start of a process to its end, if it only imports what it runs: Python's own way, and Penstock's.

Owns the comparison of `penstock.runtime.lasting` with imports outside of it; the two ways take turns. CPU time, user's
and system's: other work on the machine matters less to it than to seconds. About two minutes.

    .venv/bin/python -m benchmarks.start_up
"""

import argparse
import os
import subprocess
import sys

PROCESSES = {
    "trainer": "penstock_trainer.wiring",
    "rollout service": "penstock_rollout.__main__",
    "reward service": "penstock_reward.__main__",
    "agent service": "penstock_agent.__main__",
    "`penstock`": "penstock_launch.__main__",
}
OUTSIDE = "import {module}"
WITHIN = "from penstock.runtime.lasting import lasting\nwith lasting():\n    import {module}"


def cpu_seconds(script: str) -> float:
    """Of a process that runs the script, and ends."""
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{script!r} ended with {process.returncode}; expected 0")
    return usage.ru_utime + usage.ru_stime


def compare(module: str, repeats: int) -> tuple[float, float]:
    """The least of several: outside of `lasting`, and within it."""
    scripts = [each.format(module=module) for each in (OUTSIDE, WITHIN)]
    seconds = [[cpu_seconds(script) for script in scripts] for _ in range(repeats)]
    outside, within = (min(column) for column in zip(*seconds, strict=True))
    return outside, within


def main() -> None:
    """Print a row for each process."""
    parser = argparse.ArgumentParser(description="CPU time of a process that starts and ends.")
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print("| Process | CPU s, outside | within | ratio |\n| --- | ---: | ---: | ---: |")
    for name, module in PROCESSES.items():
        outside, within = compare(module, repeats)
        print(f"| {name} | {outside:.2f} | {within:.2f} | {within / outside:.2f} |", flush=True)


if __name__ == "__main__":
    main()
