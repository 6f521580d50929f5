"""A pytest plugin that prints how long the tests take here, each failed test at once, and at the end how to go on.

`conftest` registers it in the process that reports.
"""

import re
import time
from typing import Any

import pytest

ALL_TESTS = {"tests/unit", "tests/integration", "tests/e2e"}
LAST_RUN = "penstock/last_run"
EASY_ID = re.compile(r"[\w./:\[\]-]+")
"""An id that the shell and make take as it is."""


class Reporter:
    """Observes one run of the tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._start = time.monotonic()
        self._num_tests = 0
        self._failed: dict[str, str] = {}

    @property
    def _is_full(self) -> bool:
        """Whether this run includes all tests."""
        options = self._config.option
        narrowed = options.keyword or options.markexpr or options.collectonly or options.maxfail
        narrowed = narrowed or getattr(options, "lf", False)
        return set(self._config.args) == ALL_TESTS and not narrowed

    def pytest_report_header(self) -> list[str]:
        """The header line: how long a run of all tests takes."""
        if not self._is_full:
            return []
        last: Any = self._config.cache and self._config.cache.get(LAST_RUN, None)
        if not last:
            return ["duration: about 25 minutes on two cores; none has been measured here yet"]
        minutes = max(1, round(last["seconds"] / 60))
        return [f"duration: about {minutes} min; the last run here took that for {last['num_tests']} tests"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._num_tests += report.when == "call"
        if report.failed:
            terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
            if terminal is not None and report.nodeid not in self._failed:
                terminal.write_line(f"\nFAILED {report.nodeid} (the reason follows at the end)")
            folder = dict(report.user_properties).get("folder", "")
            self._failed.setdefault(report.nodeid, str(folder))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self._is_full and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and self._config.cache:
            seconds = time.monotonic() - self._start
            self._config.cache.set(LAST_RUN, {"seconds": seconds, "num_tests": self._num_tests})

    def pytest_unconfigure(self) -> None:
        """Print last how to run each failed test alone, and where its files are."""
        if not self._failed:
            return
        lines = ["", "To run a failed test alone, in one process, and where its logs are:"]
        for nodeid, folder in self._failed.items():
            test = nodeid if EASY_ID.fullmatch(nodeid) else nodeid.partition("[")[0]
            lines.append(f'  make test TESTS="{test}" WORKERS=0')
            lines += [f"      {folder}"] if folder else []
        print("\n".join(lines), flush=True)


def note_folder(item: pytest.Item, report: pytest.TestReport) -> None:
    """Add to a failure's report the folder with the files of its test; pytest keeps it."""
    if not report.failed:
        return
    arguments = getattr(item, "funcargs", {})
    factory = arguments.get("tmp_path_factory") or getattr(item.config, "_tmp_path_factory", None)
    folder = arguments.get("tmp_path") or (factory and factory.getbasetemp())
    if folder:
        report.user_properties.append(("folder", str(folder)))
