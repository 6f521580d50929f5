"""The published bytes of one version in this host's memory, in buckets.

Owns the copy that collective and shared-memory transports send while the learner goes on: rounded, hashed and copied
while each chunk is in the processor's cache. Invariant: between two calls of `fill` the bytes are those of one version;
after `renew` a reader of the old memory still reads the full old version. A tensor is never divided: if it is larger
than `bucket_bytes`, it has a bucket of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.contracts import Dtype
from penstock.contracts.weight_sources import TensorSpec
from penstock.weights.manifest import identity_digest
from penstock_trainer.weights.files import Format, LiveWeights, Weights, digest_of
from penstock_trainer.weights.staging import WeightsSource

Allocate = Callable[[int], Tensor]  # number of bytes -> uint8 on the CPU


@dataclass(frozen=True)
class Bucket:
    """Tensors one after the other, without gaps."""

    data: Tensor
    specs: tuple[TensorSpec, ...]


class WeightCopy:
    """A copy of the weights of `source` as they are published; itself a source that staging can write."""

    def __init__(self, source: WeightsSource, form: Format, bucket_bytes: int, allocate: Allocate) -> None:
        self._source = source
        self._form = form
        self._allocate = allocate
        self._layout = tuple(_packed(source.weights(), form, bucket_bytes))
        self.buckets: tuple[Bucket, ...] = ()
        self.renew()

    @property
    def num_bytes(self) -> int:
        return sum(bucket.data.numel() for bucket in self.buckets)

    def renew(self) -> None:
        """Take new memory, because a late engine may still read the old memory. The content of the copy is lost."""
        self.buckets = tuple(
            Bucket(self._allocate(sum(self._form.num_bytes(torch.Size(spec.shape)) for spec in specs)), specs)
            for specs in self._layout
        )

    def fill(self) -> str:
        """Copy the current weights, and return the digest of all."""
        memory = {name: _memory_of(place) for name, place in self._places().items()}

        def copy(name: str, pieces: Iterator[memoryview]) -> str:
            def put(piece: memoryview, start: int) -> None:
                memory[name][start : start + len(piece)] = piece

            return digest_of(pieces, put)

        return identity_digest(dict(self._form.each(self._source.weights(), copy)))

    def weights(self) -> Weights:
        """The copied weights by name, as views of the copy."""
        return LiveWeights(
            {
                spec.name: place.view(self._form.torch_dtype).view(spec.shape)
                for bucket in self.buckets
                for spec, place in self._split(bucket)
            }
        )

    def config_json(self, dtype: Dtype) -> bytes:
        return self._source.config_json(dtype)

    def _places(self) -> dict[str, Tensor]:
        return {spec.name: place for bucket in self.buckets for spec, place in self._split(bucket)}

    def _split(self, bucket: Bucket) -> Iterator[tuple[TensorSpec, Tensor]]:
        start = 0
        for spec in bucket.specs:
            end = start + self._form.num_bytes(torch.Size(spec.shape))
            yield spec, bucket.data[start:end]
            start = end


def _packed(weights: Weights, form: Format, bucket_bytes: int) -> Iterator[tuple[TensorSpec, ...]]:
    """Tensors in their order, as many in a bucket as fit."""
    specs: list[TensorSpec] = []
    filled = 0
    for name, shape in weights.shapes.items():
        num_bytes = form.num_bytes(shape)
        if specs and filled + num_bytes > bucket_bytes:
            yield tuple(specs)
            specs, filled = [], 0
        specs.append(TensorSpec(name, form.dtype, tuple(shape)))
        filled += num_bytes
    if specs:
        yield tuple(specs)


def _memory_of(place: Tensor) -> memoryview:
    array: Any = place.numpy()  # numpy's annotations have no buffer protocol on 3.11
    return memoryview(array)
