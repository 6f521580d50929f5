"""The model of a bundle: its name, and a fingerprint of its weights as they are loaded.

Owns the fingerprint: it depends on names and float32 values alone, so that a copy in another folder, a hub name or
another split into files is the same model.
"""

from pathlib import Path

from transformers.utils.hub import cached_file

from penstock.contracts import Contract
from penstock.errors import ConfigError
from penstock.model_path import check_model_path
from penstock.weights.manifest import identity_digest
from penstock_trainer.model.loading import load_model
from penstock_trainer.weights.files import Format, digests, published_weights

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")


class ModelReference(Contract, frozen=True):
    """A model: `path` as it was configured; `included`: its files are in the bundle."""

    path: str
    fingerprint: str
    included: bool


def model_reference(path: str, key: str, *, included: bool) -> ModelReference:
    """The reference to a model; ConfigError if it does not exist, or cannot be included."""
    fingerprint = _fingerprint(path, key)
    if included:
        model_files(path, key)
    return ModelReference(path, fingerprint, included)


def check_model(path: str, key: str, reference: ModelReference) -> None:
    """ConfigError if the model of `path` is not that of the bundle."""
    wanted = f"{reference.path} with fingerprint {reference.fingerprint}"
    try:
        check_model_path(path, key)
        found = _fingerprint(path, key)
    except ConfigError as error:
        raise ConfigError(f"{error}; the bundle refers to the model {wanted}: give its folder as --{key}") from error
    if found != reference.fingerprint:
        raise ConfigError(
            f"{key} is {path!r} with fingerprint {found}: expected {wanted}; give the folder of that model as --{key}"
        )


def model_files(path: str, key: str = "actor.path") -> list[Path]:
    """The files that loading a model needs; ConfigError if its weights are not safetensors."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(str(cached_file(path, CONFIG_FILE))).parent  # a hub name, which has been loaded before
    weights = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in weights):
        raise ConfigError(
            f"{key} is {path!r}, which holds no safetensors: expected them, since a bundle holds no pickle; "
            "convert it, or leave --with-model out"
        )
    return [folder / CONFIG_FILE, *weights]


def _fingerprint(path: str, key: str) -> str:
    return identity_digest(digests(published_weights(load_model(path, key)), Format("float32", "nearest")))
