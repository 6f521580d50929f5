"""Prints the requirements in pyproject.toml: `requirements.py [EXTRA ...]`, the dependencies and those of each extra.

Lets an image install the dependencies in a layer of their own, which a change of the source does not rebuild.
"""

import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    """Read the pyproject.toml of the working directory."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(
        *project["dependencies"],
        *(line for name in extras for line in project["optional-dependencies"][name]),
        sep="\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
