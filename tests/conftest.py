"""Fixtures and hooks for all tests: a tiny random model with a tokenizer of letters, and the order of the tests."""

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from penstock.quiet import quiet_libraries
from tests.isolation import kept_state, seed_generators
from tests.reporting import Reporter, note_folder
from tests.scheduling import in_order, scope_of

quiet_libraries(os.environ)

# A shell's `&` and nohup ignore these, and the processes that tests start would inherit that: tests send both.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)

# No deadline for an example: tests of properties do not measure speed, and a busy machine is slow.
settings.register_profile("penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penstock")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order-seed", type=int, default=None, help="run the modules in an order that this decides")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(config), "penstock-reporter")


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = config.getoption("--order-seed")
    return [] if seed is None else [f"order of modules: --order-seed {seed}"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = in_order(items, config.getoption("--order-seed"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest calls this only with --numprocesses."""
    from xdist.scheduler import LoadFileScheduling

    class ModuleScheduling(LoadFileScheduling):  # type: ignore[misc]  # it comes without types
        """Run the tests in the order in which they were collected."""

        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    config.option.loadscopereorder = False
    return ModuleScheduling(config, log)


def pytest_runtest_setup() -> None:
    seed_generators()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    note_folder(item, report)
    return report


@pytest.fixture(autouse=True, scope="module")
def _as_it_was_found() -> Iterator[None]:
    with kept_state():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of 43 tokens, one per character."""
    from benchmarks.chaos.model import make_tiny_model

    folder = Path(tmp_path_factory.mktemp("tiny-model"))
    make_tiny_model(folder)
    return folder
