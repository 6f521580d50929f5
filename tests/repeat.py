"""`python -m tests.repeat`: repeats the tests under load and in random orders, and counts how often each fails.

Each run has its own seed, which decides the order of the modules; all seeds follow from the first one. The output, the
results and the folders of failed tests of each run are kept in one folder, whose path is printed.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.load import busy_processes


@dataclass(frozen=True)
class Run:
    """The results of one run of the tests."""

    number: int
    seed: int
    seconds: float
    num_tests: int
    failed: tuple[str, ...]
    log: Path


def main() -> int:
    """Repeat the tests; returns 0 if no test ever failed."""
    arguments, passed_on = make_parser().parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="penstock-tests-"))
    print(
        f"{arguments.runs} runs under {arguments.load} busy processes; SEED={arguments.seed}; logs: {folder}",
        flush=True,
    )
    runs: list[Run] = []
    for each in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` ignores the first, here and in the tests
        signal.signal(each, signal.default_int_handler)
    try:
        with busy_processes(arguments.load):
            for number in range(1, arguments.runs + 1):
                seed = arguments.seed + number - 1
                runs.append(run_tests(folder, number, seed, arguments.workers, passed_on))
                print(line_of(runs[-1]), flush=True)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C or SIGTERM", flush=True)
    print("\n".join(summary(runs)), flush=True)
    return 0 if len(runs) == arguments.runs and not any(run.failed for run in runs) else 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.repeat", description="Runs the tests again and again.", epilog="All else goes to pytest."
    )
    parser.add_argument("--runs", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the first run")
    parser.add_argument("--workers", default="2", help="processes that run tests (default: %(default)s)")
    return parser


def run_tests(folder: Path, number: int, seed: int, workers: str, passed_on: Sequence[str]) -> Run:
    log, results = folder / f"run-{number}.log", folder / f"run-{number}.xml"
    command = [sys.executable, "-m", "pytest", "--numprocesses", workers, "--order-seed", str(seed)]
    command += [f"--junit-xml={results}", f"--basetemp={folder / f'run-{number}'}", *passed_on]
    start = time.monotonic()
    with log.open("wb") as output:
        exit_code = ended(command, output)
    num_tests, failed = read_results(results)
    if exit_code and not failed:
        failed = (f"the run itself (pytest ended with code {exit_code})",)
    return Run(number, seed, time.monotonic() - start, num_tests, failed, log)


def ended(command: Sequence[str], output: BinaryIO) -> int:
    """Run a command; returns its exit code. Ctrl-C reaches it once, through us, and it ends what it has started."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def read_results(path: Path) -> tuple[int, tuple[str, ...]]:
    """The number of tests and the names of those that failed, from a JUnit report; none if there is no report."""
    if not path.exists():
        return 0, ()
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return len(cases), tuple(sorted({test_of(case.attrib) for case in failed}))


def test_of(case: Mapping[str, str]) -> str:
    """The name that pytest gives the test."""
    module = case.get("classname", "").replace(".", "/")
    return f"{module}.py::{case['name']}" if module else case["name"]


def line_of(run: Run) -> str:
    verdict = f"{len(run.failed)} failed" if run.failed else "passed"
    return f"run {run.number}: {verdict} of {run.num_tests} tests in {run.seconds:.0f} s, seed {run.seed}"


def summary(runs: Sequence[Run]) -> list[str]:
    """The tests that ever failed, the most frequent failure first."""
    failures: dict[str, list[Run]] = {}
    for run in runs:
        for test in run.failed:
            failures.setdefault(test, []).append(run)
    if not runs:
        return ["No run has ended."]
    if not failures:
        return [f"No test failed in {len(runs)} runs."]
    lines = [f"Failed in {len(runs)} runs:"]
    for test, among in sorted(failures.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"  {len(among)} of {len(runs)}  {test}")
        lines += [f"          seed {run.seed}: {run.log}" for run in among]
    return lines


if __name__ == "__main__":
    sys.exit(main())
