"""Writes weights as safetensors files and knows what they are called.

Owns the path from float32 masters to published bytes: each chunk is rounded, hashed and written
while it is in the processor's cache, so that no second copy of the model exists. Called by staging
(every version) and export (the final weights).
"""

import json
import os
import struct
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from penstock.errors import ConfigError
from penstock.manifest import TensorEntry
from penstock_trainer.rounding import PLAIN_LENGTH, Dither, published_chunks

WEIGHTS_NAME = "model.safetensors"
SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16"}

Dtype = Literal["float32", "bfloat16"]
Rounding = Literal["dithered", "nearest"]


class Weights(Mapping[str, Tensor]):
    """Weights by name, in the order in which they are written."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, torch.Size]:
        """Names and shapes, without asking for a weight."""


class LiveWeights(Weights):
    """Weights that are there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class LazyWeights(Weights):
    """The published weights of a model that is sharded or adapted: each is made when it is asked for, and not kept."""

    def __init__(self, model: PreTrainedModel, masters: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        """`masters`: master weights of the published shapes, for these alone. `make`: name of one -> its value."""
        self._model = model
        self._make = make
        shapes = {name: torch.empty(each.shape, device="meta") for name, each in masters.items()}
        self._shapes = {name: each.shape for name, each in _published(model, shapes).items()}
        self._masters = {
            published: name for name, shape in shapes.items() for published in _published(model, {name: shape})
        }
        if self._masters.keys() != self._shapes.keys():
            raise ConfigError(
                f"actor.path is a {type(model).__name__}, whose files hold several of its weights as one: expected a "
                "model whose weights can be published one by one; set trainer.num_ranks to 1 and actor.lora.rank to 0"
            )

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return self._shapes

    def __getitem__(self, name: str) -> Tensor:
        master = self._masters[name]
        return _published(self._model, {master: self._make(master)})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class Format:
    """The type of published weights, and how masters become it."""

    dtype: Dtype
    rounding: Rounding

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def num_bytes(self, shape: torch.Size) -> int:
        return shape.numel() * self.torch_dtype.itemsize

    def chunks(self, weights: Weights, plain_length: int = PLAIN_LENGTH) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """Names with the bytes of their published weight, in pieces; each piece is valid until the next.

        `plain_length`: elements of a piece where nothing is converted.
        """
        dither: Dither | None = None
        for name, weight in weights.items():
            if dither is None and self.rounding == "dithered":
                dither = Dither(weight.device)
            yield name, map(_bytes_of, published_chunks(weight, self.torch_dtype, dither, plain_length))


def master_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own names and live weights; of tied ones only the first."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight.detach()
    return weights


class MasterWeights(Mapping[str, Tensor]):
    """`master_weights` for who wants one at a time: the state of a whole adapted model takes 10 ms to collect."""

    def __init__(self, model: PreTrainedModel) -> None:
        parts = {name: name.rpartition(".") for name in master_weights(model)}
        self._owners = {name: (model.get_submodule(module), leaf) for name, (module, _, leaf) in parts.items()}

    def __getitem__(self, name: str) -> Tensor:
        module, leaf = self._owners[name]
        weight: Tensor = module.state_dict(keep_vars=True)[leaf]  # of a sharded module always the shard
        return weight.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def published_weights(model: PreTrainedModel) -> Weights:
    """Names and shapes as in the model's files, which some models (experts) fuse when they are loaded."""
    return LiveWeights(_published(model, master_weights(model)))


def _published(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(revert_weight_conversion(model, weights))


def digests(weights: Weights, form: Format) -> dict[str, str]:
    """xxh3_64 of each published weight's bytes, without writing any."""
    return {name: _consume(pieces, lambda _: None) for name, pieces in form.chunks(weights)}


def write_weights(path: Path, weights: Weights, form: Format, *, durable: bool) -> dict[str, TensorEntry]:
    """Write one safetensors file, over what is there; the manifest's entries of its tensors."""
    dtype = SAFETENSORS_DTYPE[form.dtype]
    shapes = weights.shapes
    path.touch()
    with path.open("r+b", buffering=0) as file:
        write_all(file, memoryview(_header(shapes, form)))
        entries = {
            name: TensorEntry(
                file=path.name,
                dtype=dtype,
                shape=tuple(shapes[name]),
                digest=_consume(pieces, lambda piece: write_all(file, piece)),
            )
            for name, pieces in form.chunks(weights)
        }
        file.truncate()
        if durable:
            os.fsync(file.fileno())
    return entries


def _bytes_of(values: Tensor) -> memoryview:
    array: Any = values.contiguous().view(torch.uint8).numpy()  # numpy's own annotation knows no buffer on 3.11
    return memoryview(array)


def _consume(pieces: Iterator[memoryview], use: Callable[[memoryview], None]) -> str:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
        use(piece)
    return digest.hexdigest()


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write to an unbuffered file, which may take a part at a time."""
    while data:
        data = data[file.write(data) :]


def _header(shapes: Mapping[str, torch.Size], form: Format) -> bytes:
    records: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + form.num_bytes(shape)
        records[name] = {
            "dtype": SAFETENSORS_DTYPE[form.dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(records, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text
