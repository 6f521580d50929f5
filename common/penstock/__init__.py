"""Penstock: asynchronous GRPO as a set of services. This is its face for Python; docs/python.md shows how to use it.

    import penstock

    config = penstock.load("my_run.yaml", {"optimizer.lr": 2e-6})
    run = penstock.launch(config)                # a process of its own, which outlives this one
    for step in run.follow():                    # or run.wait(on_step=..., on_evaluation=...)
        print(step["step"], step["reward_mean"])
    run.stop()                                   # the trainer writes its checkpoint first
    run.steps(), run.evaluations(), run.completions()    # as pandas DataFrames
    penstock.open_run("runs/demo")               # any run, whoever launched it, whatever became of it

Invariant: names are imported when they are first used, so that a service, which imports `penstock` too, waits for none
of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.api.configuration import load
    from penstock.api.launching import launch
    from penstock.api.run import Run, RunFailedError, open_run, runs
    from penstock.errors import ConfigError, PenstockError
    from penstock.records.state import RunState

__all__ = [
    "ConfigError",
    "PenstockError",
    "Run",
    "RunFailedError",
    "RunState",
    "launch",
    "load",
    "open_run",
    "runs",
]

_MODULES = {
    "ConfigError": "penstock.errors",
    "PenstockError": "penstock.errors",
    "Run": "penstock.api.run",
    "RunFailedError": "penstock.api.run",
    "RunState": "penstock.records.state",
    "launch": "penstock.api.launching",
    "load": "penstock.api.configuration",
    "open_run": "penstock.api.run",
    "runs": "penstock.api.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
