"""The tools that run the tests: orders of modules, load, and the reading of a run's results."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.load import busy_processes
from tests.patience import START_SECONDS
from tests.repeat import Run, read_results, summary
from tests.scheduling import in_order, scope_of

ROOT = Path(__file__).parents[3]
IDS = [
    *("tests/unit/test_a.py::one", "tests/unit/test_a.py::two", "tests/unit/test_b.py::one"),
    *("tests/integration/test_c_sglang.py::one", "tests/integration/test_d.py::one", "tests/e2e/test_e.py::one"),
]


def order(seed: int | None) -> list[str]:
    items = cast(list[pytest.Item], [SimpleNamespace(nodeid=each) for each in IDS])
    return [item.nodeid for item in in_order(items, seed)]


def test_long_modules_run_first() -> None:
    assert order(None) == [IDS[5], IDS[3], IDS[4], *IDS[:3]]


def test_a_seed_decides_the_order_of_the_modules_and_keeps_each_together() -> None:
    orders = {tuple(order(seed)) for seed in range(20)}
    assert len(orders) > 10
    assert order(7) == order(7)
    for found in orders:
        assert sorted(found) == sorted(IDS)
        assert found.index(IDS[1]) == found.index(IDS[0]) + 1


def test_modules_that_share_the_engines_are_one_to_a_worker() -> None:
    assert scope_of("tests/integration/test_c_sglang.py::one") == scope_of("tests/integration/test_x_sglang.py::two")
    assert scope_of(IDS[0]) == scope_of(IDS[1]) != scope_of(IDS[2])


def test_busy_processes_end_with_the_block_and_with_their_parent() -> None:
    with busy_processes(2) as running:
        assert all(each.poll() is None for each in running)
    assert all(each.poll() is not None for each in running)
    script = "from tests.load import busy_processes\nimport os\nwith busy_processes(1) as [busy]:\n"
    script += "    print(busy.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    # Both share one standard output: it ends only when both have ended.
    command = [sys.executable, "-c", script]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=START_SECONDS, check=False)
    assert int(killed.stdout) > 0


def run(number: int, *failed: str) -> Run:
    return Run(number, 10 + number, 1.0, 5, failed, Path(f"run-{number}.log"))


def test_each_test_that_ever_failed_is_told_with_its_rate() -> None:
    assert summary([run(1), run(2)]) == ["No test failed in 2 runs."]
    lines = summary([run(1, "a.py::x"), run(2, "a.py::x", "b.py::y"), run(3)])
    assert [line.strip() for line in lines if " of " in line] == ["2 of 3  a.py::x", "1 of 3  b.py::y"]
    assert lines[-1].strip() == "seed 12: run-2.log"


def test_a_failed_run_names_its_tests_and_says_how_to_run_them_alone(tmp_path: Path) -> None:
    module = tmp_path / "test_some.py"
    module.write_text("def test_good():\n    pass\n\n\ndef test_bad(tmp_path):\n    assert tmp_path is None\n")
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}"]
    command += ["-p", "tests.conftest", "-p", "no:cacheprovider", f"--junit-xml={report}", "--order-seed", "3"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'base'}", str(module)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert read_results(report) == (2, ("test_some.py::test_bad",))
    command_line, folder = done.stdout.splitlines()[-2:]
    assert command_line.strip() == 'make test TESTS="test_some.py::test_bad" WORKERS=0'
    assert Path(folder.strip()).is_dir()
    progress, *_ = done.stdout.partition("= FAILURES =")
    assert "FAILED test_some.py::test_bad (" in progress, "named only at the end"
