"""Names of reward functions: the built-in ones, and how a name becomes a function.

Owns the list. A name is built in, or `module:function` of the user's own (`package.module:object.attribute` too).
Checking names and sources is cheap and happens in the service; loading imports code, and happens only in worker
processes.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.errors import RewardError
from penstock.workers.source_names import functions_in, nearest, why_absent
from penstock_reward.functions.mathematics import make_math
from penstock_reward.functions.reasoning_tasks import make_reasoning_gym
from penstock_reward.functions.text import exact_match, format_regex, gsm8k, numeric

RewardFunction = Callable[..., Any]
PARAMETERS = ("prompt", "completion", "answer", "metadata")
SIGNATURE = f"({', '.join(PARAMETERS)})"
ENVIRONMENT_DESCRIPTION = "The score that the environment gave to the episode; nothing is called for it."


@dataclass(frozen=True)
class Builtin:
    """A reward that comes with Penstock; `load` imports its libraries."""

    description: str
    load: Callable[[], RewardFunction]


def first_line(described: object) -> str:
    """The first line of a docstring; empty without one."""
    return (inspect.getdoc(described) or "").partition("\n")[0]


def builtins() -> dict[str, Builtin]:
    """Every built-in reward by name."""
    plain = {function.__name__: function for function in (exact_match, numeric, gsm8k, format_regex)}
    factories = {"math": make_math, "reasoning_gym": make_reasoning_gym}
    return {
        **{name: Builtin(first_line(function), partial(_itself, function)) for name, function in plain.items()},
        **{name: Builtin(first_line(factory), factory) for name, factory in factories.items()},
    }


def _itself(function: RewardFunction) -> RewardFunction:
    return function


def check_names(names: Iterable[str], folder: str = "") -> None:
    """RewardError for the first name that no function can have. folder: of the user's modules, for a hint."""
    known = [*builtins(), ENVIRONMENT_REWARD]
    for name in names:
        module, separator, function = name.partition(":")
        if name in known or (separator and module and function):
            continue
        near = next(iter(difflib.get_close_matches(name, known, n=1)), "") or nearest(name, functions_in(folder))
        hint = f"; did you mean {near!r}?" if near else ""
        raise RewardError(
            f"reward.functions names {name!r}; expected one of {', '.join(sorted(known))}, or module:function{hint}"
        )


def check_sources(names: Iterable[str], folder: str) -> None:
    """RewardError for the first of the user's functions whose import is certain to fail; nothing is imported."""
    for name in names:
        if ":" in name and (reason := why_absent(name, folder)):
            raise not_loaded(name, reason, folder)


def not_loaded(name: str, reason: str, folder: str) -> RewardError:
    """The error of a function that cannot be loaded."""
    return RewardError(
        f"reward.functions names {name!r}, which cannot be loaded: {reason}; expected a built-in name, or "
        f"module:function with the module under reward.modules_path ({folder!r})"
    )


def load(name: str) -> RewardFunction:
    """Import a function; any exception of the import passes through, RewardError if it cannot be called."""
    builtin = builtins().get(name)
    if builtin is not None:
        return builtin.load()
    module_name, _, path = name.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise RewardError(f"it is a {type(found).__name__}; expected a function {SIGNATURE}")
    try:
        inspect.signature(found).bind(**dict.fromkeys(PARAMETERS))
    except TypeError as error:
        raise RewardError(f"its parameters are {inspect.signature(found)} ({error}); expected {SIGNATURE}") from None
    except ValueError:
        pass  # a callable written in C without a signature: the first call shows it
    return found  # type: ignore[no-any-return]
