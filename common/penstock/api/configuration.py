"""`penstock.load`: a configuration for Python."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.config import Config
from penstock.config.load import load_files

File = str | os.PathLike[str]


def load(files: File | Sequence[File], keys: Mapping[str, Any] | None = None) -> Config:
    """The configuration of `files`, PENSTOCK_* variables and `keys`; the later wins, as on the command line.

    files: a YAML file, or several. keys: dotted keys and their values, such as `{"optimizer.lr": 2e-6}`.
    ConfigError, with the key, what was seen and what was expected.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else files
    return load_files([Path(path) for path in paths], keys or {})
