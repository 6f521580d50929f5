"""Tools from methods: their OpenAI schema, and the check of the arguments that a model wrote.

A method's type hints give the types of its parameters. Its docstring gives the description, and the lines of an `Args:`
section those of the parameters. Every type that pydantic has a JSON schema for will do.
"""

import inspect
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import to_json

from penstock.errors import ConfigError

MAX_PROBLEMS = 3  # of a call's arguments that the model reads: it needs no more to write a better call
_ARGUMENTS = "Args"
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?):\s*$")
_ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


class ArgumentsError(Exception):
    """Arguments that do not fit the tool; the message is for the model."""


class MethodTool:
    """One method as a tool."""

    def __init__(self, name: str, function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> None:
        """`parameters`: without self. ConfigError that names the tool and the parameter that cannot be used."""
        self.name = name
        description, of_parameters = read_docstring(inspect.getdoc(function) or "")
        self._names: dict[str, str] = {}
        fields: dict[str, Any] = {}
        hints = _hints(name, function)
        for index, parameter in enumerate(parameters):
            _check_parameter(name, parameter, hints)
            default = ... if parameter.default is parameter.empty else parameter.default
            described = of_parameters.get(parameter.name)
            # Fields have names of their own: a parameter may be called `json`, as a method of BaseModel is.
            field = f"p{index}"
            self._names[field] = parameter.name
            details: dict[str, Any] = (
                {"description": described} if described else {}
            )  # None would hide one of the type's
            fields[field] = (hints[parameter.name], Field(default, alias=parameter.name, **details))
        self._model: type[BaseModel] = _model(name, fields)
        self.schema: dict[str, Any] = {
            "type": "function",
            "function": {"name": name, "description": description, "parameters": _parameters(name, self._model)},
        }

    def parse(self, arguments: str) -> dict[str, Any]:
        """The arguments that were given, with the types of the parameters. ArgumentsError if they do not fit."""
        try:
            given = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ArgumentsError(f"the arguments of {self.name} are not JSON: {error}") from None
        try:
            parsed = self._model.model_validate(given)
        except ValidationError as error:
            problems = [
                f"{'.'.join(str(part) for part in each['loc']) or 'arguments'}: {each['msg']}"
                for each in error.errors(include_url=False, include_input=False)
            ]
            raise ArgumentsError(
                f"the arguments of {self.name} do not fit: {'; '.join(problems[:MAX_PROBLEMS])}"
            ) from None
        return {self._names[field]: getattr(parsed, field) for field in self._names if field in parsed.model_fields_set}


def as_text(value: Any) -> str:
    """What a tool returned, as the model reads it: text as it is, nothing as an empty text, all else as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return to_json(value, fallback=str).decode()


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The description, and those of the parameters: the lines of its `Args:` section."""
    parts: dict[str, list[str]] = {"": []}
    section = ""
    for line in text.splitlines():
        if match := _SECTION.match(line):
            section = _ARGUMENTS if match[1] in ("Args", "Arguments", "Parameters") else match[1]
        parts.setdefault(section, []).append("" if match else line)
    of_parameters: dict[str, str] = {}
    current = ""
    for line in textwrap.dedent("\n".join(parts.get(_ARGUMENTS, []))).splitlines():
        if match := _ARGUMENT.match(line):
            current = match[1]
            of_parameters[current] = match[2]
        elif current and line.strip():
            of_parameters[current] = f"{of_parameters[current]} {line.strip()}".strip()
    return "\n".join(parts[""]).strip(), of_parameters


def _hints(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except Exception as error:  # the hints are the user's code, as text that is evaluated here
        raise ConfigError(f"the types of its tool {name!r} cannot be read: {type(error).__name__}: {error}") from None


def _check_parameter(name: str, parameter: inspect.Parameter, hints: dict[str, Any]) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ConfigError(f"its tool {name!r} has a parameter {parameter}; expected parameters with a name and a type")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ConfigError(
            f"the parameter {parameter.name!r} of its tool {name!r} has no name for callers; expected no /"
        )
    if parameter.name not in hints:
        raise ConfigError(
            f"the parameter {parameter.name!r} of its tool {name!r} has no type; expected one such as str, int, float, "
            "bool, list[str], dict or Literal (or a method's name that begins with _, if it is no tool)"
        )


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    try:
        model: type[BaseModel] = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    except PydanticUserError as error:
        raise ConfigError(f"a type of its tool {name!r} has no JSON schema: {str(error).splitlines()[0]}") from None
    return model


def _parameters(name: str, model: type[BaseModel]) -> dict[str, Any]:
    """Its JSON schema, without the titles that pydantic adds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a default that is no JSON is left out of the schema
            schema = _without_titles(model.model_json_schema())
    except PydanticUserError as error:
        raise ConfigError(f"a type of its tool {name!r} has no JSON schema: {str(error).splitlines()[0]}") from None
    schema.pop("description", None)
    parameters: dict[str, Any] = {"type": "object", "properties": {}, **schema}
    return parameters


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_titles(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("default", "const", "enum") else _without_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }
