"""Checks a configured model path before an engine or torch spends time on it.

Owns the rule that distinguishes a folder from a hub name.
"""

from pathlib import Path

from penstock.absent_path import looked_for
from penstock.errors import ConfigError


def check_model_path(path: str, key: str) -> None:
    """ConfigError naming `key` if `path` is neither a model folder nor a possible hub name.

    `models/mine` is a folder if `models` is one here: as a hub name its owner would be called `models`.
    """
    folder = Path(path)
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    looks_local = looks_local or (len(folder.parts) > 1 and folder.parent.is_dir())
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{key} is {path!r}, a folder without config.json: expected a Hugging Face model folder")
    if not path or (looks_local and not folder.is_dir()):
        raise ConfigError(
            f"{key} is {path!r}, which does not exist: expected a Hugging Face model folder "
            f"(config.json, model.safetensors, tokenizer files) or a hub name; {looked_for(path)}"
        )
