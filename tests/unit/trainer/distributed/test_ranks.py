"""The device that a rank computes on."""

import pytest
import torch

from penstock.errors import ConfigError
from penstock_trainer.distributed.rank import RankInfo
from penstock_trainer.distributed.ranks import rank_device

SECOND = RankInfo(1, 2, 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers on a host with two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_has_the_gpu_of_its_number_on_the_host() -> None:
    assert [rank_device(wanted, SECOND) for wanted in ("auto", "cuda")] == [torch.device("cuda", 1)] * 2
    assert rank_device("auto") == torch.device("cuda", 0)


@pytest.mark.usefixtures("two_gpus")
def test_a_trainer_stays_on_the_cpu_if_it_is_told_to() -> None:
    assert rank_device("cpu", SECOND) == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 GPUs: expected one for each rank; lower trainer\.num_ranks"):
        rank_device("auto", RankInfo(2, 3, 2))


def test_without_a_gpu_only_a_trainer_that_needs_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rank_device("auto", SECOND) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainer\.device is cuda, .* sees no GPU: .*or trainer\.device cpu"):
        rank_device("cuda", SECOND)
