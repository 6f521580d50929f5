"""Weights become published bytes: several at once, in order, with few in memory."""

import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from penstock_trainer.weights.files import MOST_THREADS, Format, LiveWeights
from penstock_trainer.weights.rounding import CHUNK_LENGTH

PLAIN = Format("float32", "nearest")


class MadeWeights(LiveWeights):
    """Weights that are made on demand; `most`: the largest number in memory at once."""

    def __init__(self, number: int) -> None:
        super().__init__({f"w{place}": torch.empty(0) for place in range(number)})
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = torch.full((CHUNK_LENGTH + int(name[1:]),), float(name[1:]))
        self.made.append(weakref.ref(weight))
        self.most = max(self.most, sum(each() is not None for each in self.made))
        return weight


def test_weights_are_published_several_at_once_in_order_and_are_not_piled_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    weights = MadeWeights(40)
    together = threading.Barrier(2)

    def use(name: str, pieces: Iterator[memoryview]) -> bytes:
        if name in ("w0", "w1"):
            together.wait(10)
        return b"".join(pieces)

    published = list(PLAIN.each(weights, use))
    expected = [
        (f"w{place}", torch.full((CHUNK_LENGTH + place,), float(place)).numpy().tobytes()) for place in range(40)
    ]
    assert published == expected
    assert weights.most <= MOST_THREADS + 3


def test_an_error_of_one_weight_ends_the_publishing() -> None:
    def use(name: str, pieces: Iterator[memoryview]) -> None:
        if name == "w3":
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        dict(PLAIN.each(MadeWeights(40), use))
