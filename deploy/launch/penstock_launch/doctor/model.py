"""The model of `actor.path`: whether its folder can be read, and how large it is."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from penstock.errors import PenstockError
from penstock.model_path import check_model_path
from penstock.weights.manifest import WEIGHT_FILES, tensor_shapes
from penstock_launch.doctor.report import Line, amount, not_looked_at, ok, problem, warning

WHAT = "model"
OTHER_WEIGHT_FILES = "*.bin"


@dataclass(frozen=True)
class Model:
    """A folder of Hugging Face. num_weights: 0 if only a file without a header of safetensors has them."""

    num_weights: int
    file_bytes: int


def read_model(path: str, key: str = "actor.path") -> Model | None:
    """The model; None for a hub name, whose files come at the start. PenstockError or OSError if it cannot be used."""
    check_model_path(path, key)
    folder = Path(path)
    if not folder.is_dir():
        return None
    try:
        json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise PenstockError(f"{folder / 'config.json'} is not JSON ({error})") from error
    tensors = sorted(folder.glob(WEIGHT_FILES))
    files = tensors or sorted(folder.glob(OTHER_WEIGHT_FILES))
    num_weights = sum(prod(shape) for file in tensors for shape in tensor_shapes(file).values())
    return Model(num_weights, sum(file.stat().st_size for file in files))


def num_weights_of(path: str) -> int:
    """0 if it is not known, for whatever reason; `model_line` has it."""
    try:
        model = read_model(path)
    except (PenstockError, OSError):
        return 0
    return model.num_weights if model is not None else 0


def model_line(path: str, key: str = "actor.path", what: str = WHAT) -> Line:
    """Of the model that a key names; empty: of a look without a configuration."""
    if not path:
        return not_looked_at(what, f"{key} comes with --config FILE")
    try:
        model = read_model(path, key)
    except (PenstockError, OSError) as error:
        advice = f"Set {key} to a complete folder of Hugging Face that this user can read, or copy the model again."
        return problem(what, str(error), advice)
    if model is None:
        return not_looked_at(what, f"{key} {path} is a name on Hugging Face's hub, fetched at the start")
    if not model.file_bytes:
        seen = f"{path} holds no {WEIGHT_FILES} and no {OTHER_WEIGHT_FILES}"
        return warning(what, seen, f"Set {key} to a folder with the weights too.")
    millions = model.num_weights / 1e6
    count = f"{millions:.{0 if millions >= 10 else 1}f} million weights, " if millions else ""
    return ok(what, f"{path}: {count}{amount(model.file_bytes)} of files")
