"""The copy that is sent has the bytes and the digest of staged files, in any format; it writes files on demand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from penstock.contracts import Dtype, Rounding, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.errors import WeightsBusyError, WeightsError
from penstock.weights.local_folder import SHARED_MEMORY
from penstock.weights.manifest import read_manifest, verify
from penstock_trainer.model.lora import adapted, merged_weights
from penstock_trainer.weight_sync.from_copy import CopiedVersions
from penstock_trainer.weight_sync.shared_memory import SharedMemoryTransport, shared_memory
from penstock_trainer.weights.buckets import WeightCopy
from penstock_trainer.weights.files import Format, LiveWeights, Weights
from penstock_trainer.weights.staging import Staging
from tests.unit.trainer.trainer_groups import config_for, save_tiny_model, tiny_model

FORMATS: list[tuple[Dtype, Rounding]] = [
    ("float32", "nearest"),
    ("bfloat16", "nearest"),
    ("bfloat16", "dithered"),
]


class Source:
    """Weights in a dictionary of the test."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def weights(self) -> Weights:
        return self._weights

    def config_json(self, dtype: Dtype) -> bytes:
        return f'{{"dtype": "{dtype}"}}'.encode()


def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(300, 300, generator=generator),
        "norm.weight": torch.ones(17),
        "scalar": torch.tensor(2.5),
        "head.weight": torch.randn(41, 300, generator=generator),
    }


def host_memory(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


@pytest.mark.parametrize(("dtype", "rounding"), FORMATS)
def test_the_copy_is_what_staging_writes(tmp_path: Path, dtype: Dtype, rounding: Rounding) -> None:
    source, form = Source(LiveWeights(example())), Format(dtype, rounding)
    staging = Staging(source, tmp_path / "weights", form)
    identity = staging.write(1, lease=1)
    copy = WeightCopy(source, form, 50_000, host_memory)
    assert copy.fill() == identity.digest
    written = load_file(staging.folder_of(1, 1) / "model.safetensors")
    assert {name: weight.dtype for name, weight in copy.weights().items()} == dict.fromkeys(written, form.torch_dtype)
    assert all(torch.equal(copy.weights()[name], weight) for name, weight in written.items())


def test_merged_weights_of_an_adapter_are_copied(tmp_path: Path) -> None:
    """Weights that are made one by one on demand, like those of several ranks."""
    config = config_for(save_tiny_model(tmp_path / "m"), actor={"path": "m", "lora": {"rank": 2, "alpha": 8}})
    model = tiny_model()
    adapter = adapted(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    source = Source(merged_weights(model, adapter))
    copy = WeightCopy(source, Format("float32", "nearest"), 1000, host_memory)
    digest = copy.fill()
    assert digest == Staging(source, tmp_path / "weights", Format("float32", "nearest")).digest(1).digest
    assert all(torch.equal(copy.weights()[name], weight) for name, weight in source.weights().items())


def test_buckets_hold_whole_tensors_in_order() -> None:
    copy = WeightCopy(Source(LiveWeights(example())), Format("float32", "nearest"), 50_000, host_memory)
    names = [[spec.name for spec in bucket.specs] for bucket in copy.buckets]
    assert names == [["embed.weight"], ["norm.weight", "scalar", "head.weight"]]  # the first is larger than a bucket
    assert [bucket.data.numel() for bucket in copy.buckets] == [4 * 300 * 300, 4 * (17 + 1 + 41 * 300)]
    assert copy.num_bytes == sum(4 * weight.numel() for weight in example().values())


def test_renewed_memory_leaves_the_old_bytes_to_whoever_still_reads_them() -> None:
    weights = example()
    copy = WeightCopy(Source(LiveWeights(weights)), Format("float32", "nearest"), 2**20, shared_memory)
    first = copy.fill()
    late = copy.weights()
    kept = {name: weight.clone() for name, weight in late.items()}
    weights["norm.weight"].mul_(2)
    copy.renew()
    assert copy.fill() != first
    assert all(torch.equal(late[name], weight) for name, weight in kept.items())
    assert torch.equal(copy.weights()["norm.weight"], 2 * kept["norm.weight"])


def test_files_are_written_on_demand_from_the_copy(tmp_path: Path) -> None:
    weights = example()
    form = Format("bfloat16", "dithered")
    versions = CopiedVersions(
        Source(LiveWeights(weights)), tmp_path / "w", form, bucket_bytes=2**20, allocate=host_memory, keep=2
    )
    with pytest.raises(WeightsBusyError, match="no weights are staged"):
        versions.snapshot()
    assert versions.digest(4) == versions.stage(4, lease=2)
    identity = versions.stage(4, lease=2)
    assert not versions.folder_of(4, 2).exists()
    weights["norm.weight"].zero_()  # the learner continues
    files = versions.snapshot()
    assert (files.identity, files.path, files.lease) == (identity, str(versions.folder_of(4, 2)), 2)
    manifest = read_manifest(Path(files.path))
    assert manifest.identity == identity
    verify(Path(files.path), manifest)
    assert load_file(Path(files.path) / "model.safetensors")["norm.weight"].eq(1).all()
    assert versions.snapshot() == files
    versions.close()
    assert not versions.folder_of(4, 2).exists()


async def test_memory_that_was_given_up_has_no_name_left(tmp_path: Path) -> None:
    form = Format("float32", "nearest")
    transport = SharedMemoryTransport(Source(LiveWeights(example())), tmp_path, form, bucket_bytes=2**20, keep=2)
    server = ServiceRecord(ServiceKind.ROLLOUT, "r", "http://r", 1, "serving")
    announcement = Announcement(transport.stage(1, 1), "/nowhere", 1)
    given_up: list[Path] = []

    async def deliver(error: Exception) -> None:
        async with transport.delivery(server, announcement) as source:
            given_up.extend(SHARED_MEMORY / bucket.handle.lstrip("/") for bucket in source.buckets)
            raise error

    with pytest.raises(WeightsError, match="HTTP 502"):
        await deliver(WeightsError("HTTP 502: its engine died"))
    assert given_up
    assert all(path.exists() for path in given_up)  # other servers may still read
    transport.stage(2, 1)
    assert not any(path.exists() for path in given_up)
    async with transport.delivery(server, announcement) as source:
        assert all((SHARED_MEMORY / bucket.handle.lstrip("/")).exists() for bucket in source.buckets)
