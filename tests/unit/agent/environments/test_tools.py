"""Tools from methods: schemas, and arguments as models write them."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from penstock.errors import ConfigError
from penstock_agent.environments.tools import ArgumentsError, MethodTool, as_text, read_docstring


def tool(function: Callable[..., Any]) -> MethodTool:
    return MethodTool(function.__name__, function, inspect.signature(function).parameters.values())


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    schema: dict[str, Any] = tool(function).schema["function"]["parameters"]
    return schema


class Place(BaseModel):
    """A place."""

    title: str
    x: int = 0


def search(
    query: str,
    limit: int = 5,
    exact: bool = False,
    score: float | None = None,
    tags: list[str] = [],  # noqa: B006 - a user's signature
    order: Literal["new", "old"] = "new",
    options: dict[str, int] | None = None,
) -> str:
    """Search the library.

    It holds books.

    Args:
        query: words that must occur,
            in any order
        limit (int): at most so many

    Returns:
        titles
    """
    return query


def test_types_defaults_and_the_docstring_make_the_schema() -> None:
    assert tool(search).schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the library.\n\nIt holds books.",
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "required": ["query"],
                "properties": {
                    "query": {"type": "string", "description": "words that must occur, in any order"},
                    "limit": {"type": "integer", "default": 5, "description": "at most so many"},
                    "exact": {"type": "boolean", "default": False},
                    "score": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
                    "tags": {"type": "array", "items": {"type": "string"}, "default": []},
                    "order": {"type": "string", "enum": ["new", "old"], "default": "new"},
                    "options": {
                        "anyOf": [{"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "null"}],
                        "default": None,
                    },
                },
            },
        },
    }


def test_names_that_pydantic_uses_itself_and_nested_models() -> None:
    def go(json: Place, title: "str | None" = None, model_config: Annotated[int, Field(description="n")] = 1) -> None:
        """Go."""

    schema = parameters(go)
    assert list(schema["properties"]) == ["json", "title", "model_config"]
    assert schema["properties"]["model_config"] == {"type": "integer", "default": 1, "description": "n"}
    assert list(schema["$defs"]["Place"]["properties"]) == ["title", "x"]
    parsed = tool(go).parse('{"json": {"title": "here"}}')
    assert parsed == {"json": Place(title="here")}


def test_without_parameters_or_docstring() -> None:
    def look() -> str:
        return ""

    assert tool(look).schema["function"]["description"] == ""
    assert parameters(look) == {"type": "object", "properties": {}, "additionalProperties": False}
    assert tool(look).parse("") == tool(look).parse("{}") == {}


def test_a_default_that_is_no_json_is_left_out() -> None:
    def look(where: Any = object) -> None: ...

    assert parameters(look)["properties"] == {"where": {}}
    assert tool(look).parse("{}") == {}


def test_arguments_get_the_types_of_the_parameters() -> None:
    parsed = tool(search).parse('{"query": "x", "limit": "3", "score": 1, "tags": ["a"]}')
    assert parsed == {"query": "x", "limit": 3, "score": 1.0, "tags": ["a"]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{", "the arguments of search are not JSON"),
        ("[" * 100_000, "the arguments of search are not JSON"),
        ("[1]", "do not fit"),
        ("null", "do not fit"),
        ("{}", "query: Field required"),
        ('{"query": 5}', "query: Input should be a valid string"),
        ('{"query": "x", "limit": "many"}', "limit: Input should be a valid integer"),
        ('{"query": "x", "order": "odd"}', "order: Input should be 'new' or 'old'"),
        ('{"query": "x", "more": 1}', "more: Extra inputs are not permitted"),
        ('{"query": "x", "tags": [1]}', "tags.0: Input should be a valid string"),
    ],
)
def test_arguments_that_do_not_fit_are_told_to_the_model(arguments: str, expected: str) -> None:
    with pytest.raises(ArgumentsError) as raised:
        tool(search).parse(arguments)
    assert expected in str(raised.value)


def test_a_parameter_that_no_model_can_fill_is_refused() -> None:
    def untyped(text, other: int) -> None: ...  # type: ignore[no-untyped-def]
    def rest(*texts: str) -> None: ...
    def named(**texts: str) -> None: ...
    def positional(text: str, /) -> None: ...
    def unknown(text: "NoSuchType") -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def without_schema(call: inspect.Signature) -> None: ...
    def callback(call: Callable[[], None]) -> None: ...

    refused: list[tuple[Callable[..., Any], str]] = [
        (untyped, "the parameter 'text' of its tool 'untyped' has no type; expected one such as str"),
        (rest, "its tool 'rest' has a parameter *texts"),
        (named, "its tool 'named' has a parameter **texts"),
        (positional, "the parameter 'text' of its tool 'positional' has no name"),
        (unknown, "the types of its tool 'unknown' cannot be read: NameError"),
        (without_schema, "a type of its tool 'without_schema' has no JSON schema"),
        (callback, "a type of its tool 'callback' has no JSON schema"),
    ]
    for function, expected in refused:
        with pytest.raises(ConfigError) as raised:
            tool(function)
        assert expected in str(raised.value)


def test_results_as_text() -> None:
    assert [as_text(value) for value in ("a", None, 1.5, True, {"a": [1]}, "\u00e9", Place(title="x"))] == [
        "a", "", "1.5", "true", '{"a":[1]}', "\u00e9", '{"title":"x","x":0}',
    ]  # fmt: skip
    assert as_text([object]).startswith('["<class')


def test_docstrings() -> None:
    assert read_docstring("Do.\n\nArgs:\n    a: one: two\n    *b: x") == ("Do.", {"a": "one: two", "b": "x"})
    assert read_docstring("Do.\nNote: this.\n\nRaises:\n    x: y") == ("Do.\nNote: this.", {})
    assert read_docstring("") == ("", {})
