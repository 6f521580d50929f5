"""Received buckets of weights, against the sent ones; test_transports_sglang has real groups."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock_rollout.engine.sglang.inside import receive
from tests.patience import ANSWER_SECONDS

SHAPES: dict[str, list[tuple[int, ...]]] = {"a": [(2, 3), (), (5,)], "b": [(40, 7)], "c": [(3,)]}
UPDATER = SimpleNamespace(_model_update_group={"g": "the group", "h": "another"})


class Trainer:
    """Sends buckets in the order of the calls of `send`, one for each receive."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.num_received = 0
        self.came = threading.Condition()

    def send(self, weights: list[Any]) -> None:
        self.sent.append(torch.cat([weight.reshape(-1).view(torch.uint8) for weight in weights]))

    def broadcast(self, flat: Any, *, src: int, group: str) -> None:
        assert src == 0
        if not self.sent:
            raise RuntimeError("Connection closed by peer")
        flat.copy_(self.sent.pop(0))
        with self.came:
            self.num_received += 1
            self.came.notify_all()

    def until_received(self, number: int) -> bool:
        with self.came:
            return self.came.wait_for(lambda: self.num_received >= number, timeout=ANSWER_SECONDS)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(torch.distributed, "broadcast", made.broadcast)
    return made


def ask(hook: Any, bucket: str, group: str = "g") -> list[tuple[str, Any]]:
    names = [f"{bucket}{number}" for number in range(len(SHAPES[bucket]))]
    received: list[tuple[str, Any]] = hook(
        None, UPDATER, names=names, dtypes=["bfloat16"] * len(names), shapes=SHAPES[bucket], group_name=group
    )
    assert [name for name, _ in received] == names
    return received


def weights_of(bucket: str) -> list[Any]:
    return [torch.randn(shape).bfloat16() for shape in SHAPES[bucket]]


def test_every_bucket_arrives_whole_and_stays_while_the_next_one_comes(trainer: Trainer) -> None:
    (hook,) = receive.hooks().values()
    for turn in range(3):
        version = {bucket: weights_of(bucket) for bucket in SHAPES}
        for weights in version.values():
            trainer.send(weights)
        for number, bucket in enumerate(SHAPES, start=1):
            received = ask(hook, bucket)
            is_ahead = turn > 0 and bucket != "c"
            assert trainer.until_received(3 * turn + number + is_ahead)
            assert all(torch.equal(left, right) for (_, left), right in zip(received, version[bucket], strict=True))
        assert trainer.num_received == 3 * (turn + 1)  # after the last bucket, no thread waits for another


def test_what_fails_ahead_fails_the_request_that_asks_for_it(trainer: Trainer) -> None:
    (hook,) = receive.hooks().values()
    for bucket in (*SHAPES, "a"):
        trainer.send(weights_of(bucket))
    for bucket in (*SHAPES, "a"):
        ask(hook, bucket)
    with pytest.raises(RuntimeError, match="Connection closed"):
        ask(hook, "b")


def test_another_group_begins_anew(trainer: Trainer) -> None:
    (hook,) = receive.hooks().values()
    for bucket in ("a", "b", "c", "a"):
        trainer.send(weights_of(bucket))
        ask(hook, bucket, "g" if bucket != "c" else "h")
    trainer.send(weights_of("b"))
    ask(hook, "b")


def test_a_bucket_of_another_size_than_before_is_refused(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    (hook,) = receive.hooks().values()
    for bucket in ("a", "b", "a", "b"):
        trainer.send(weights_of(bucket))
    for bucket in ("a", "b", "a"):
        ask(hook, bucket)
    monkeypatch.setitem(SHAPES, "b", [(41, 7)])
    with pytest.raises(RuntimeError, match="expected a bucket of 560 bytes, as in the push before; asked for 574"):
        ask(hook, "b")
