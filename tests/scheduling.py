"""The order of the test modules, and which of them pytest-xdist gives to the same worker.

A module stays together, and so do all modules that share the pair of engines. So a module's fixtures, and the engines
of `sglang_pair`, are made only once, however many workers there are.
"""

import random
from collections import defaultdict

import pytest

ENGINES = "_sglang.py"
LONGEST = "tests/e2e/"
LONG = "tests/integration/"


def in_order(items: list[pytest.Item], seed: int | None) -> list[pytest.Item]:
    """The tests, module by module: modules that take minutes come first, so no worker has to run one alone at the end.

    Those of unit tests come last: most take a second. With a seed, the seed alone decides the order of the modules.
    """
    modules: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        modules[item.nodeid.partition("::")[0]].append(item)
    names = list(modules)
    if seed is None:
        names.sort(
            key=lambda name: (not name.startswith(LONGEST), not name.endswith(ENGINES), not name.startswith(LONG))
        )
    else:
        random.Random(seed).shuffle(names)
    return [item for name in names for item in modules[name]]


def scope_of(nodeid: str) -> str:
    """The unit that one worker gets: a module, or all modules that share the engines."""
    module = nodeid.partition("::")[0]
    return ENGINES if module.endswith(ENGINES) else module
