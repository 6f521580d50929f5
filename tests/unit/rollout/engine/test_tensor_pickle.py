"""The pickle that names shared memory: torch's own unpickler reads it, and finds the tensors that were put there."""

import pickle

import torch

from penstock.contracts.weight_sources import SharedBucket, TensorSpec
from penstock_rollout.engine.sglang.tensor_pickle import pickled_tensors
from penstock_trainer.weight_sync.shared_memory import shared_memory, shared_name


def test_the_tensors_lie_where_the_bucket_says() -> None:
    tensors = {
        "matrix": torch.arange(6, dtype=torch.float32).view(2, 3).bfloat16(),
        "scalar": torch.tensor(-1.5, dtype=torch.bfloat16),
        "vector": torch.arange(5, dtype=torch.float32).bfloat16(),
        "cube": torch.randn(2, 3, 4).bfloat16(),
    }
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors.values()])
    memory = shared_memory(flat.numel())
    memory.copy_(flat)
    manager, handle, num_bytes = shared_name(memory)
    specs = tuple(TensorSpec(name, "bfloat16", tuple(tensor.shape)) for name, tensor in tensors.items())
    data = pickled_tensors(manager, SharedBucket(handle, num_bytes, specs))
    assert len(data) < 2000  # names, not bytes
    loaded = dict(pickle.loads(data))
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
    memory[:2] = 0  # it is the same memory
    assert loaded["matrix"][0, 0] == 0


def test_float32_is_named_too() -> None:
    memory = shared_memory(8)
    memory.copy_(torch.tensor([1.0, 2.0]).view(torch.uint8))
    manager, handle, num_bytes = shared_name(memory)
    bucket = SharedBucket(handle, num_bytes, (TensorSpec("w", "float32", (2,)),))
    assert dict(pickle.loads(pickled_tensors(manager, bucket)))["w"].tolist() == [1.0, 2.0]
