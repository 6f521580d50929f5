"""Which tests run when: the order of the modules, and which of them pytest-xdist gives to one worker.

A module stays together, and so do all that share the pair of engines, so fixtures of a module, and the engines of
`sglang_pair`, are made once, however many workers there are.
"""

import random
from collections import defaultdict

import pytest

ENGINES = "_sglang.py"
LONGEST = "tests/e2e/"


def in_order(items: list[pytest.Item], seed: int | None) -> list[pytest.Item]:
    """The tests, module by module: those that take minutes first, so that no worker is left alone with one at the end.

    With a seed, in an order of modules that it alone decides.
    """
    modules: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        modules[item.nodeid.partition("::")[0]].append(item)
    names = list(modules)
    if seed is None:
        names.sort(key=lambda name: (not name.startswith(LONGEST), not name.endswith(ENGINES)))
    else:
        random.Random(seed).shuffle(names)
    return [item for name in names for item in modules[name]]


def scope_of(nodeid: str) -> str:
    """What a worker is given as one: a module, or all modules that share the engines."""
    module = nodeid.partition("::")[0]
    return ENGINES if module.endswith(ENGINES) else module
