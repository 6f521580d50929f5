"""Writes docs/configuration.md, from the docstrings in penstock.config, docs/metrics.md, and the tables of docs/gpu.md.

Owns the first two, which are never edited by hand. `make docs` runs this; `make lint` runs it with
`--check`, which changes nothing and fails if file and code differ.
"""

import argparse
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs import generate_fits, generate_metrics
from penstock.config import Config
from penstock.config.changes import Change, keys_of
from penstock.config.keys import entry_section, section_type
from penstock.config.reference.described import ANY_NAME, described, described_keys

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
variables only `reward.functions`, `data.train_sets` and options have entries, with names in lower case.) The default of
a mapping holds only if nothing sets the mapping or an entry. Sections are no mappings: their keys are set one by one.

**A text is taken as it is.** On the command line and in variables, what is given for a key of type text, secret text or
a choice of words is its value, character for character: `#`, quotes and line breaks too. An empty secret is none.
Values of all other types are YAML, which includes JSON: `--sampling.stop '["\\n"]'`. In a file, each key stands once in
its section.

An unknown key is an error that names the nearest known one, also for
[names of other libraries](#names-of-other-libraries). Numbers are finite: no key takes `inf` or `nan`.

| Command | Prints |
| --- | --- |
| `penstock keys WORD` | keys with the word in their name, in their meaning, or in what another library calls them |
| `penstock config --config FILE` | the configuration that a run would use |
| `penstock config --config FILE --changed` | what differs from the defaults, as such a file, without secrets |
| `penstock config --schema` | the JSON schema of such a file, with which editors complete keys and mark wrong ones |
"""
CHANGES = """## Changes between two starts

A run that is started again with other values goes on; what a change does depends on the key
([operations.md](operations.md#change-keys-between-two-starts)).
"""
OTHERS = """## Names of other libraries

What TRL, verl, AReaL and OpenRLHF call these keys, and how a value converts if it does. The error about an unknown key
of such a name has our key: in YAML (for all of a file at once), in the environment and on the command line. The last
parts of a name are enough: `rollout.n`. Names that are the same are left out.
"""


def row(key: str, field: FieldInfo) -> str:
    """One line of a table."""
    shown = described(key, field)
    cells = [f"`{key}`", shown.kind, shown.default, shown.meaning]
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def heading(key: str) -> str:
    """The marks of a section's heading: an entry of a mapping is one level below the section of the mapping."""
    return "#" * (2 + key.replace(f".{ANY_NAME}", "").count("."))


def tables(section: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """The section's table, then those of the sections in it; one that stands above is only referred to."""
    lines = [f"{heading(prefix)} `{prefix}`" if prefix else "## Top level", ""]
    description = (section.__doc__ or "").strip()
    if prefix:
        lines += [" ".join(description.split()), ""]
    rows, nested = [], []
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        inner = section_type(field.annotation)
        if inner is None:
            rows.append(row(key, field))
            if (entry := entry_section(field.annotation)) is not None:
                nested += tables(entry, f"{key}.{ANY_NAME}", seen)
        elif inner in seen:
            nested += [
                f"{heading(key)} `{key}`",
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
    return "\n".join([INTRODUCTION, *lines, CHANGES, *changes(), "", OTHERS, *others()]) + "\n"


def changes() -> list[str]:
    """One item for each class of keys."""
    return [f"* {change.value} {', '.join(f'`{key}`' for key in keys_of(change))}." for change in Change]


def others() -> list[str]:
    """A table of all names of other libraries, in the order of our keys."""
    rows = [
        f"| `{key.name}` | {each.library} | `{each.name}` | {each.note.replace('|', '&#124;')} |"
        for key in described_keys()
        for each in key.other_names
    ]
    return ["| Key | Library | Its name | How it differs |", "| --- | --- | --- | --- |", *rows]


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
