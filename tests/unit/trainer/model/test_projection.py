"""The vocabulary projection in chunks, against full logits in float64; and its peak memory."""

import pytest
import torch
from torch import Tensor, nn

from penstock_trainer.model.token_logprobs import Projection, is_plain, projected_logprobs

R, D, V = 9, 6, 50
ROW_U = torch.tensor([0, 0, 2, 3, 3, 3, 8])
TOKEN_U = torch.tensor([1, 7, 0, 49, 5, 6, 9])


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(R, D, generator=torch.Generator().manual_seed(0)).requires_grad_()


def make_head(bias: bool) -> nn.Linear:
    head = nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=torch.Generator().manual_seed(1)))
    return head


def loss_of(logprobs_U: Tensor, entropy_R: Tensor, entropy_gradient: bool) -> Tensor:
    return logprobs_U.sin().sum() + (0.3 * entropy_R.cos().sum() if entropy_gradient else 0)


def close(ours: Tensor | None, theirs: Tensor | None, tolerance: float = 1e-5) -> bool:
    assert ours is not None
    assert theirs is not None
    return bool((ours - theirs).norm() < tolerance * theirs.norm())


@pytest.mark.parametrize("chunk_rows", [1, 4, 9, 100])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_full_logits_in_float64(hidden: Tensor, chunk_rows: int, entropy_gradient: bool, bias: bool) -> None:
    head, exact = make_head(bias), make_head(bias)
    exact.load_state_dict(head.state_dict())
    exact.double()
    exact_hidden = hidden.detach().double().requires_grad_()
    logprobs_RV = torch.log_softmax(exact(exact_hidden) / 0.7, -1)
    expected = (logprobs_RV[ROW_U, TOKEN_U], -(logprobs_RV.exp() * logprobs_RV).sum(-1))
    loss_of(*expected, entropy_gradient).backward()

    projection = Projection(chunk_rows, torch.float32, 0.7, entropy_gradient)
    logprobs_U, entropy_R = projected_logprobs(hidden, head, ROW_U, TOKEN_U, projection)
    assert entropy_R.requires_grad == entropy_gradient
    loss_of(logprobs_U, entropy_R, entropy_gradient).backward()
    assert close(logprobs_U, expected[0])
    assert close(entropy_R, expected[1])
    assert close(hidden.grad, exact_hidden.grad)
    assert close(head.weight.grad, exact.weight.grad)
    if bias:
        assert close(head.bias.grad, exact.bias.grad)


def test_bfloat16_products_are_those_of_autocast_summed_in_float32(hidden: Tensor) -> None:
    head = make_head(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs_RV = torch.log_softmax(head(hidden).float(), -1)
    expected_U = logprobs_RV[ROW_U, TOKEN_U]
    expected_U.sin().sum().backward()
    expected = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    projection = Projection(4, torch.bfloat16, 1.0, False)
    logprobs_U, _ = projected_logprobs(hidden, head, ROW_U, TOKEN_U, projection)
    logprobs_U.sin().sum().backward()
    assert close(logprobs_U, expected_U, 1e-6)
    assert close(hidden.grad, expected[0], 1e-2)
    assert close(head.weight.grad, expected[1], 1e-2)
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_a_frozen_weight_gets_no_gradient_and_nothing_is_kept_without_one(hidden: Tensor) -> None:
    head = make_head(bias=False).requires_grad_(False)
    projection = Projection(4, torch.float32, 1.0, False)
    projected_logprobs(hidden, head, ROW_U, TOKEN_U, projection)[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    with torch.no_grad():
        assert not projected_logprobs(hidden, head, ROW_U, TOKEN_U, projection)[0].requires_grad


def test_gradients_add_up_over_micro_batches(hidden: Tensor) -> None:
    head = make_head(bias=False)
    projection = Projection(4, torch.float32, 1.0, False)
    for _ in range(2):
        projected_logprobs(hidden, head, ROW_U, TOKEN_U, projection)[0].sum().backward()
    twice = head.weight.grad
    head.weight.grad = None
    projected_logprobs(hidden, head, ROW_U, TOKEN_U, projection)[0].sum().backward()
    assert twice is not None
    assert head.weight.grad is not None
    torch.testing.assert_close(twice, 2 * head.weight.grad)


def test_an_adapted_or_hooked_head_is_not_plain() -> None:
    class Adapted(nn.Linear):
        pass

    assert is_plain(make_head(bias=True))
    assert not is_plain(Adapted(2, 2))
    hooked = make_head(bias=False)
    hooked.register_forward_hook(lambda *_: None)
    assert not is_plain(hooked)
