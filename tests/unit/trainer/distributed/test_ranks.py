"""A trainer that was given GPUs and sees none says so, instead of computing on the CPU."""

import pytest
import torch

from penstock.errors import ConfigError
from penstock_trainer.distributed.ranks import require_named_gpus


@pytest.fixture
def sees(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build of torch for CUDA on a host without a usable GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize("named", ["1", "0,1", "GPU-51d0", "MIG-8f2c"])
def test_a_named_gpu_that_is_not_seen_is_refused(sees: pytest.MonkeyPatch, named: str) -> None:
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES is '{named}'.*nvidia-smi.*CUDA 13.0.*TRAINER_GPUS"):
        require_named_gpus({"CUDA_VISIBLE_DEVICES": named})


@pytest.mark.parametrize("environ", [{}, *({"CUDA_VISIBLE_DEVICES": none} for none in ("", "-1", "NoDevFiles"))])
def test_no_gpu_is_missed_if_none_is_named(sees: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    require_named_gpus(environ)


def test_a_gpu_that_is_seen_is_enough(sees: pytest.MonkeyPatch) -> None:
    sees.setattr(torch.cuda, "is_available", lambda: True)
    require_named_gpus({"CUDA_VISIBLE_DEVICES": "3"})


def test_a_build_for_cpus_ignores_what_is_named(sees: pytest.MonkeyPatch) -> None:
    """A cluster may name GPUs for every job, and this one has chosen the CPU when it was installed."""
    sees.setattr(torch.version, "cuda", None)
    require_named_gpus({"CUDA_VISIBLE_DEVICES": "0"})
