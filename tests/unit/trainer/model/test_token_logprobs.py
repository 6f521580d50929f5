"""Log-probabilities, entropy and gradients of a chunk of logits against float64."""

import pytest
import torch
from torch import Tensor

from penstock_trainer.model.token_logprobs import logprobs_of_logits


@pytest.fixture
def logits() -> Tensor:
    return 4 * torch.randn(9, 50, generator=torch.Generator().manual_seed(0))


ROW_U = torch.tensor([0, 0, 2, 3, 3, 3, 8])
TOKEN_U = torch.tensor([1, 7, 0, 49, 5, 6, 9])


@pytest.mark.parametrize("block_bytes", [1, 4 * 50 * 4, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_equals_full_logits_in_float64(
    logits: Tensor, block_bytes: int, temperature: float, entropy_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock_trainer.model.token_logprobs.CPU_BLOCK_BYTES", block_bytes)
    exact = logits.double().requires_grad_()
    logprobs_RV = torch.log_softmax(exact / temperature, -1)
    expected = (logprobs_RV[ROW_U, TOKEN_U], -(logprobs_RV.exp() * logprobs_RV).sum(-1))
    loss = expected[0].sin().sum() + (0.3 * expected[1].cos().sum() if entropy_gradient else 0)
    loss.backward()

    leaf = logits.clone().requires_grad_()
    logprobs_U, entropy_R = logprobs_of_logits(leaf * 1, ROW_U, TOKEN_U, temperature, entropy_gradient)
    assert entropy_R.requires_grad == entropy_gradient
    loss = logprobs_U.sin().sum() + (0.3 * entropy_R.cos().sum() if entropy_gradient else 0)
    loss.backward()

    for ours, theirs in zip((logprobs_U, entropy_R, leaf.grad), (*expected, exact.grad), strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_chunk_goes_backward_once(logits: Tensor) -> None:
    leaf = logits.requires_grad_()
    logprobs_U, _ = logprobs_of_logits(leaf * 1, ROW_U, TOKEN_U, 1.0, False)
    logprobs_U.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs_U.sum().backward()
