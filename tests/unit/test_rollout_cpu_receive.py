"""Receiving buckets of weights into one buffer, against what was sent; real groups are in test_transports_sglang."""

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is in the trainer's environment")

from penstock_rollout.engine import torch_receive  # noqa: E402


def test_buckets_of_any_size_arrive_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (receive,) = torch_receive.hooks().values()
    sent: list[Any] = []

    def broadcast(flat: Any, *, src: int, group: str) -> None:
        assert (src, group) == (0, "the group")
        flat.copy_(sent[-1])

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    updater = SimpleNamespace(_model_update_group={"g": "the group"})
    memory = set()
    for shapes in ([(2, 3), (), (5,)], [(40, 7)], [(3,)]):
        tensors = [torch.randn(shape).bfloat16() for shape in shapes]
        sent.append(torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]))
        names = [f"w{number}" for number in range(len(shapes))]
        dtypes = ["bfloat16"] * len(shapes)
        received = receive(None, updater, names=names, dtypes=dtypes, shapes=shapes, group_name="g")
        assert [name for name, _ in received] == names
        assert all(torch.equal(left, right) for (_, left), right in zip(received, tensors, strict=True))
        memory.add(received[0][1].untyped_storage().data_ptr())
    assert len(memory) == 2  # it has grown once
