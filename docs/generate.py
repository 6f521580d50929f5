"""Writes docs/configuration.md, from the docstrings in penstock.config, docs/metrics.md, and the tables of docs/gpu.md.

Owns the first two, which are never edited by hand. `make docs` runs this; `make lint` runs it with
`--check`, which changes nothing and fails if file and code differ.
"""

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs import generate_fits, generate_metrics
from penstock.config import Config
from penstock.config.changes import Change, keys_of
from penstock.config.keys import section_type

FOLDER = Path(__file__).parent
INTRODUCTION = """# Configuration

<!-- Written by docs/generate.py from penstock.config; `make docs` writes it again. -->

Keys are set in a YAML file, in environment variables and on the command line; each overrides the one before. All other
keys have the defaults listed here.

| Where | How | Example |
| --- | --- | --- |
| YAML | sections nest | `actor: {group_size: 8}` |
| Environment | `PENSTOCK_`, then the key with `__` between its parts | `PENSTOCK_ACTOR__GROUP_SIZE=8` |
| Command line | `--key value` | `--actor.group_size 8` |

You may give several files (`--config mine.yaml --config examples/presets/dapo.yaml`); the later value of a key wins. On
the command line too the later one wins. An empty variable sets nothing.

**A mapping is one value.** Whoever sets a key of type mapping sets all of it: after `--reward.functions '{math: 1.0}'`
the run has that one function, whatever a file or the default holds. One entry has a key of its own, which leaves the
other entries of earlier sources as they are: `--reward.functions.math 1.0`, `PENSTOCK_REWARD__FUNCTIONS__MATH=1.0`. (In
variables only `reward.functions` and `data.template_options` have entries, with names in lower case.) The default of a
mapping holds only if nothing sets the mapping or an entry. Sections are no mappings: their keys are set one by one.

**A text is taken as it is.** On the command line and in variables, what is given for a key of type text, secret text or
a choice of words is its value, character for character: `#`, quotes and line breaks too. An empty secret is none.
Values of all other types are YAML, which includes JSON: `--sampling.stop '["\\n"]'`. In a file, each key stands once in
its section.

An unknown key is an error that names the nearest known one. Numbers are finite: no key takes `inf` or `nan`.
`penstock config --config FILE` prints the configuration that a run would use.
"""
CHANGES = """## Changes between two starts

A run that is started again with other values goes on; what a change does depends on the key
([operations.md](operations.md#change-keys-between-two-starts)).
"""
LIMITS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}
POWER_OF_TWO_FROM = 2**20  # from here on a power of two is easier to read than its digits


def type_text(annotation: Any) -> str:
    """A type as YAML's user knows it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {type_text(arguments[0])}"
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(item) for item in arguments if item is not type(None))
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "SecretStr": "secret text",
        "Any": "anything",
    }
    name: str = annotation.__name__
    return names.get(name, name)


def number_text(value: float) -> str:
    """A number without noise: 2^30 and 1e-06 as they are meant."""
    if isinstance(value, int) and value >= POWER_OF_TWO_FROM and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def limits_text(field: FieldInfo) -> str:
    """The limits of a number."""
    parts = [
        pattern.format(number_text(getattr(item, name)))
        for item in field.metadata
        for name, pattern in LIMITS.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join(parts)


def default_text(field: FieldInfo) -> str:
    """The default as it would stand in YAML."""
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, int | float) and not isinstance(field.default, bool):
        return f"`{number_text(field.default)}`"
    return f"`{json.dumps(field.default)}`" if not isinstance(field.default, str) else f'`"{field.default}"`'


def row(key: str, field: FieldInfo) -> str:
    """One line of a table."""
    if not field.description:
        raise ValueError(f"{key} has no docstring: expected one under the field in penstock.config")
    kind = ", ".join(part for part in (type_text(field.annotation), limits_text(field)) if part)
    cells = [f"`{key}`", kind, default_text(field), field.description]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def tables(section: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """The section's table, then those of the sections in it; one that stands above is only referred to."""
    lines = [f"{'#' * (2 + prefix.count('.'))} `{prefix}`" if prefix else "## Top level", ""]
    description = (section.__doc__ or "").strip()
    if prefix:
        lines += [" ".join(description.split()), ""]
    rows, nested = [], []
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        inner = section_type(field.annotation)
        if inner is None:
            rows.append(row(key, field))
        elif inner in seen:
            nested += [
                f"{'#' * (2 + key.count('.'))} `{key}`",
                "",
                f"{field.description} Keys as in `{seen[inner]}`.",
                "",
            ]
        else:
            seen[inner] = key
            nested += tables(inner, key, seen)
    if rows:
        lines += ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return lines + nested


def document() -> str:
    """The full page."""
    lines = tables(Config, "", {})
    return "\n".join([INTRODUCTION, *lines, CHANGES, *changes()]) + "\n"


def changes() -> list[str]:
    """One item for each class of keys."""
    return [f"* {change.value} {', '.join(f'`{key}`' for key in keys_of(change))}." for change in Change]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write docs/configuration.md, docs/metrics.md and the tables of docs/gpu.md."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file differs")
    arguments = parser.parse_args()
    gpu = FOLDER / "gpu.md"
    wanted = {
        FOLDER / "configuration.md": document(),
        FOLDER / "metrics.md": generate_metrics.document(),
        gpu: generate_fits.filled(gpu.read_text(encoding="utf-8")),
    }
    for path, text in wanted.items():
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{path.name} does not match the code: run `make docs` and commit it")


if __name__ == "__main__":
    main()
