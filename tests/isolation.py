"""Puts back what a module of tests changed in its process, so that modules may run in any order."""

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator

SEED = 0


def seed_generators() -> None:
    """Seed all random numbers, so that a test draws the same ones whatever ran before it."""
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)


@contextlib.contextmanager
def kept_state() -> Iterator[None]:
    """Put back the environment, the module path, logging and torch's settings, as a module found them."""
    environment, path = dict(os.environ), list(sys.path)
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
    levels = {logger: (logger.level, logger.propagate) for logger in (logging.root, *loggers)}
    handlers = list(logging.root.handlers)
    with _kept_torch():
        yield
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    logging.captureWarnings(False)
    logging.disable(logging.NOTSET)
    for logger, (level, propagate) in levels.items():
        logger.setLevel(level)
        logger.propagate = propagate
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).disabled = False
    for handler in list(logging.root.handlers):
        if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
            logging.root.removeHandler(handler)


@contextlib.contextmanager
def _kept_torch() -> Iterator[None]:
    """Before torch is imported, its settings are unknown; then its defaults are what the module found."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    yield
    if torch := sys.modules.get("torch"):
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        if threads is not None:
            torch.set_num_threads(threads)
