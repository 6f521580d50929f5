"""Writes weights as safetensors files, under the names of the model's files.

Owns the path from float32 masters to published bytes. Invariant: published weights are finite. Each chunk is rounded,
hashed and written while it is in the processor's cache, so no second copy of the model exists. Several threads each
process one weight, because one core does not use the full memory bandwidth.
"""

import json
import os
import struct
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from penstock.config import Config
from penstock.contracts import Dtype, Rounding
from penstock.errors import ConfigError, NonFiniteError
from penstock.weights.manifest import TensorEntry
from penstock_trainer.weights.rounding import CHUNK_LENGTH, Dither, is_finite, published_chunks

WEIGHTS_NAME = "model.safetensors"
SAFETENSORS_DTYPE: dict[Dtype, str] = {"float32": "F32", "bfloat16": "BF16"}


MOST_THREADS = 4  # more would wait for the interpreter and for memory
MOST_BYTES = 1 << 30  # of weights in progress, which a sharded model gathers for it; a single one may be larger
MASTER_BYTES = 4

T = TypeVar("T")
Use = Callable[[str, Iterator[memoryview]], T]


class Weights(Mapping[str, Tensor]):
    """Weights by name, in the order of writing."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, torch.Size]:
        """Names and shapes, without reading a weight."""


class LiveWeights(Weights):
    """Weights that exist as tensors."""

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
    """The published weights of a model that is sharded or adapted: each is made when it is read.

    A master that is published in parts, as the experts of a layer are, is made once for all of them, and each part is
    let go when it is read. So read them in their order, and before the weights change.
    """

    def __init__(self, model: PreTrainedModel, masters: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
        """`masters`: master weights, used for the published shapes only. `make`: name of a weight -> its value."""
        self._model = model
        self._make = make
        shapes = {name: torch.empty(each.shape, device="meta") for name, each in masters.items()}
        self._shapes = {name: each.shape for name, each in _published(model, shapes).items()}
        self._parts: dict[str, Tensor] = {}  # of the last master, those that are still to be read
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
        if name not in self._parts:
            master = self._masters[name]
            self._parts = _published(self._model, {master: self._make(master)})
        return self._parts.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class Format:
    """The type of published weights, and the rounding from masters to it."""

    dtype: Dtype
    rounding: Rounding

    @classmethod
    def of(cls, text: str) -> "Format":
        """The inverse of `str`."""
        dtype, rounding = text.split()
        return cls(cast(Dtype, dtype), cast(Rounding, rounding))

    def __str__(self) -> str:
        """As `bfloat16 dithered`."""
        return f"{self.dtype} {self.rounding}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def num_bytes(self, shape: torch.Size) -> int:
        return shape.numel() * self.torch_dtype.itemsize

    def each(self, weights: Weights, use: Use[T], length: int = CHUNK_LENGTH) -> Iterator[tuple[str, T]]:
        """Each name with the result of `use` on it and the published bytes, in order; several at once, in threads.

        The bytes come in pieces of `length` elements, each valid until the next one. NonFiniteError if a weight is not
        finite.
        """
        own = threading.local()

        def publish(name: str, weight: Tensor) -> T:
            if not hasattr(own, "dither"):
                own.dither = Dither(weight.device) if self.rounding == "dithered" else None
            chunks = published_chunks(weight, self.torch_dtype, own.dither, length)
            return use(name, map(_bytes_of, _finite(name, chunks)))

        num_threads = min(MOST_THREADS, os.cpu_count() or 1)
        begun: deque[tuple[str, int, Future[T]]] = deque()
        with ThreadPoolExecutor(num_threads, "publish") as threads:
            for name, shape in weights.shapes.items():
                num_bytes = MASTER_BYTES * shape.numel()
                while begun and (
                    len(begun) > num_threads or sum(size for _, size, _ in begun) + num_bytes > MOST_BYTES
                ):
                    first, _, result = begun.popleft()
                    yield first, result.result()
                begun.append((name, num_bytes, threads.submit(publish, name, weights[name])))
            for first, _, result in begun:
                yield first, result.result()


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
    """Like `master_weights`, but fetches one tensor at a time; the full state of an adapted model takes 10 ms."""

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


def published_format(config: Config) -> Format:
    """The format of the pushed weights of a run."""
    return Format(config.rollout.engine.dtype, config.rounding)


def digests(weights: Weights, form: Format) -> dict[str, str]:
    """xxh3_64 of each published weight's bytes, without writing any."""
    return dict(form.each(weights, lambda _, pieces: digest_of(pieces, lambda *_: None)))


def write_weights(path: Path, weights: Weights, form: Format, *, durable: bool) -> dict[str, TensorEntry]:
    """Write one safetensors file, over its old content; the manifest's entries of its tensors."""
    dtype, shapes = SAFETENSORS_DTYPE[form.dtype], weights.shapes
    header = _header(shapes, form)
    starts = dict(zip(shapes, accumulate(map(form.num_bytes, shapes.values()), initial=len(header)), strict=False))
    path.touch()
    with path.open("r+b", buffering=0) as file:
        number = file.fileno()
        write_at(number, memoryview(header), 0)

        def write(name: str, pieces: Iterator[memoryview]) -> TensorEntry:
            digest = digest_of(pieces, lambda piece, start: write_at(number, piece, starts[name] + start))
            return TensorEntry(file=path.name, dtype=dtype, shape=tuple(shapes[name]), digest=digest)

        entries = dict(form.each(weights, write))
        file.truncate(len(header) + sum(map(form.num_bytes, shapes.values())))
        if durable:
            os.fsync(number)
    return entries


def _finite(name: str, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The chunks of a weight; NonFiniteError at the first that is not finite."""
    for chunk in chunks:
        if not is_finite(chunk):
            seen = chunk[~torch.isfinite(chunk)]
            raise NonFiniteError(
                f"{name} holds {seen[0].item():g}, and at least {seen.numel()} such values: expected finite weights. "
                "They are neither pushed nor saved: lower optimizer.lr, or begin a new run from an earlier checkpoint"
            )
        yield chunk


def _bytes_of(values: Tensor) -> memoryview:
    array: Any = values.contiguous().view(torch.uint8).numpy()  # numpy's annotations have no buffer protocol on 3.11
    return memoryview(array)


def digest_of(pieces: Iterator[memoryview], use: Callable[[memoryview, int], None]) -> str:
    """xxh3_64 of all pieces; `use` gets each piece with the number of bytes before it."""
    digest, start = xxhash.xxh3_64(), 0
    for piece in pieces:
        digest.update(piece)
        use(piece, start)
        start += len(piece)
    return digest.hexdigest()


def write_at(number: int, data: memoryview, start: int) -> None:
    """Write all of `data` to a file descriptor; one system call may write only a part."""
    while data:
        written = os.pwrite(number, data, start)
        data, start = data[written:], start + written


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
