"""The user's object: what `module:name` is, and how an episode uses it.

Runs only in worker processes, because it imports the user's code. Invariant: an object that loads can play an episode,
as far as its signatures show.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.errors import ConfigError, DataError
from penstock_agent.environments.tools import MethodTool

RESERVED = ("reset", "step", "get_reward", "close")
"""Methods of a class that are no tools."""
FUNCTION_PARAMETERS = ("row", "base_url", "api_key")
FORMS = (
    "expected a class with reset and step, a class with public methods as tools, or a function "
    f"({', '.join(FUNCTION_PARAMETERS)})"
)


@dataclass(frozen=True)
class UserObject:
    """A class or a function, ready for use. tools: by name, in the order of the class."""

    kind: Literal["steps", "tools", "function"]
    make: Callable[..., Any]
    description: str
    tools: dict[str, MethodTool] = field(default_factory=dict)

    @property
    def has_get_reward(self) -> bool:
        return self.kind != "function" and _method(self.make, "get_reward") is not None


def load(name: str) -> UserObject:
    """Import `module:name`. Any exception of the import passes through; ConfigError if it has no usable form."""
    module_name, _, path = name.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{getattr(found, '__name__', found)} has no {part!r}")
        found = getattr(found, part)
    description = (inspect.getdoc(found) or "").partition("\n")[0]
    if inspect.isclass(found):
        return _load_class(found, description)
    if not callable(found):
        raise ConfigError(f"it is a {type(found).__name__}; {FORMS}")
    _check_call(found, "its parameters are", **dict.fromkeys(FUNCTION_PARAMETERS))
    return UserObject("function", found, description)


def _load_class(found: type, description: str) -> UserObject:
    if inspect.isabstract(found):
        raise ConfigError("it is an abstract class; expected one that can be made")
    _check_call(found, "its __init__ needs more than self:")
    for name, num_arguments in (("step", 1), ("close", 0)):
        if (method := _method(found, name)) is not None:
            _check_call(method, f"its {name} has the parameters", *[None] * num_arguments)
    if (method := _method(found, "get_reward")) is not None and not takes_text(method):
        _check_call(method, "its get_reward has the parameters")
    has_reset = (reset := _method(found, "reset")) is not None
    if reset is not None and any(each.kind is each.POSITIONAL_ONLY for each in reset.parameters.values()):
        raise ConfigError("its reset has parameters without names; expected names of columns, or **row")
    if _method(found, "step") is not None:
        if not has_reset:
            raise ConfigError("it has step and no reset; expected reset(**row), which begins an episode")
        return UserObject("steps", found, description)
    tools = {name: MethodTool(name, function, rest) for name, function, rest in _public_methods(found)}
    if not tools:
        raise ConfigError(f"it has neither step nor public methods; {FORMS}")
    if _method(found, "get_reward") is not None and not has_reset:
        raise ConfigError("it has get_reward and no reset; expected reset(**row), which begins an episode")
    return UserObject("tools", found, description, tools)


def accepted_columns(reset: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """The columns of the row that `reset` has parameters for. DataError that names a column that the row lacks."""
    parameters = inspect.signature(reset).parameters.values()
    missing = [
        each.name
        for each in parameters
        if each.name not in row
        and each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if missing:
        raise DataError(f"needs {missing[0]!r}, which the row lacks; it has {', '.join(row) or 'nothing'}")
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return row
    return {each.name: row[each.name] for each in parameters if each.name in row}


def takes_text(method: Callable[..., Any] | inspect.Signature) -> bool:
    """Whether `get_reward` reads the model's last text."""
    signature = method if isinstance(method, inspect.Signature) else inspect.signature(method)
    try:
        signature.bind("")
    except TypeError:
        return False
    return True


def _method(found: Any, name: str) -> inspect.Signature | None:
    """The signature of a method, without self; None if the class has no such method."""
    if not callable(getattr(found, name, None)):
        return None
    return _signature(found, name)


def _signature(found: Any, name: str) -> inspect.Signature:
    signature = inspect.signature(getattr(found, name))
    if isinstance(inspect.getattr_static(found, name), staticmethod | classmethod):
        return signature  # without self, or bound already
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _public_methods(found: type) -> list[tuple[str, Callable[..., Any], list[inspect.Parameter]]]:
    """Name, function and parameters without self, in the order in which the class and its bases define them."""
    names = dict.fromkeys(
        name
        for each in reversed(found.__mro__[:-1])  # without `object`
        for name, value in vars(each).items()
        if not name.startswith("_")
        and name not in RESERVED
        and inspect.isroutine(value)
        and callable(getattr(found, name))
    )
    return [(name, getattr(found, name), list(_signature(found, name).parameters.values())) for name in names]


def _check_call(target: Any, what: str, *arguments: Any, **named: Any) -> None:
    """ConfigError unless it can be called so."""
    try:
        signature = target if isinstance(target, inspect.Signature) else inspect.signature(target)
    except ValueError:
        return  # written in C without a signature: the first call shows it
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        expected = ", ".join(named) or ("one text" if arguments else "none")
        raise ConfigError(f"{what} {signature} ({error}); expected {expected}") from None
