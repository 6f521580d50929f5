"""The parts of the objective that users write: loaded by name, and tried on a few tokens before a step depends on them.

Owns the loading and the trial. Invariant: a part that cannot be called, that returns something else than its type says,
or that looks at more than its own completion is refused at start, with the key that names it.
"""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.config import LossSection
from penstock.errors import ConfigError
from penstock.workers.source_names import why_absent
from penstock_trainer import grpo

AdvantageFunction = Callable[[Tensor, Tensor], Tensor]
"""(rewards float64[B, G], is_valid bool[B, G]) -> advantages float[B, G]; what is not valid is 0 in both."""

SURROGATE, ADVANTAGE = "loss.surrogate", "loss.advantage.function"
PARAMETERS = {
    SURROGATE: "(tokens, log_ratio_N, mask_N), which returns penstock_trainer.grpo.Terms",
    ADVANTAGE: "(rewards_BG, valid_BG), which returns float[B, G]",
}
TOLERANCE = 1e-9  # of losses near 1 in float64, whose sums may be added in another order


def own_surrogate(loss: LossSection) -> grpo.Surrogate | None:
    """The user's surrogate; None if `loss.surrogate` is one of Penstock's. ConfigError if it cannot be used."""
    if not loss.has_own_surrogate:
        return None
    function: grpo.Surrogate = _loaded(SURROGATE, loss.surrogate, loss.modules_path)
    both = _tried(loss.surrogate, function, [0, 0, 0, 1, 1])
    alone = [_tried(loss.surrogate, function, part) for part in ([0, 0, 0], [1, 1])]
    apart = torch.cat([each.loss_N for each in alone])
    if not torch.allclose(both.loss_N, apart, rtol=TOLERANCE, atol=TOLERANCE):
        raise _refused(
            SURROGATE,
            loss.surrogate,
            f"its losses of two completions are {both.loss_N.tolist()} together and {apart.tolist()} apart, so that a "
            "step would depend on its micro-batches; expected losses of a completion that depend on it alone",
        )
    return function


def own_advantage(loss: LossSection) -> AdvantageFunction | None:
    """The user's advantages; None if `loss.advantage.function` is empty. ConfigError if they cannot be used."""
    name = loss.advantage.function
    if not name:
        return None
    function: AdvantageFunction = _loaded(ADVANTAGE, name, loss.modules_path)
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.25, 0.25, 0.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    found = _called(ADVANTAGE, name, function, rewards, valid)
    if not isinstance(found, Tensor) or found.shape != rewards.shape or not found.is_floating_point():
        raise _refused(ADVANTAGE, name, f"it returned {_shown(found)}; expected a tensor float[2, 3]")
    if not found[valid].isfinite().all():
        raise _refused(ADVANTAGE, name, f"it returned {found.tolist()}; expected finite numbers")
    return function


def _tried(name: str, function: grpo.Surrogate, sequences: list[int]) -> grpo.Terms:
    """What the surrogate makes of the completions 0 (with a masked token) and 1, or of one of them."""
    first, num = (0 if sequences[0] == 0 else 3), len(sequences)
    part = slice(first, first + num)
    logprobs_N = torch.tensor([-0.5, -1.0, -2.0, -0.25, -1.5], dtype=torch.float64)[part].requires_grad_()
    behaviour_N = torch.tensor([-0.75, -1.0, math.nan, -0.5, -1.0], dtype=torch.float64)[part]
    advantage_N = torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0], dtype=torch.float64)[part]
    sequence_N = torch.tensor(sequences) - sequences[0]
    tokens = grpo.Tokens(
        logprobs_N, behaviour_N, advantage_N, torch.ones_like(advantage_N), sequence_N, int(sequence_N[-1]) + 1
    )
    mask_N = grpo.usable(tokens)
    terms = _called(SURROGATE, name, function, tokens, grpo.log_ratio(logprobs_N, behaviour_N, mask_N), mask_N)
    _check_terms(name, terms, mask_N)
    different_N = torch.where(mask_N, terms.loss_N * torch.arange(1, num + 1), 0.0)  # what sums to 0 is not lost
    (gradient_N,) = torch.autograd.grad(different_N.sum(), logprobs_N, allow_unused=True)
    if gradient_N is None or not gradient_N.isfinite().all() or not gradient_N.any():
        raise _refused(SURROGATE, name, f"the gradient of its loss by tokens.logprobs_N is {gradient_N}; expected some")
    loss_N = torch.where(mask_N, terms.loss_N, 0.0).detach()
    return grpo.Terms(loss_N, terms.low_N, terms.high_N)


def _check_terms(name: str, terms: object, mask_N: Tensor) -> None:
    if not isinstance(terms, grpo.Terms):
        raise _refused(SURROGATE, name, f"it returned {_shown(terms)}; expected penstock_trainer.grpo.Terms")
    if not isinstance(terms.loss_N, Tensor) or terms.loss_N.shape != mask_N.shape or not terms.loss_N.requires_grad:
        expected = f"a tensor float[{mask_N.numel()}] with a gradient"
        raise _refused(SURROGATE, name, f"its loss_N is {_shown(terms.loss_N)}; expected {expected}")
    for field, limited_N in (("low_N", terms.low_N), ("high_N", terms.high_N)):
        if not isinstance(limited_N, Tensor) or limited_N.shape != mask_N.shape or limited_N.dtype != torch.bool:
            raise _refused(SURROGATE, name, f"its {field} is {_shown(limited_N)}; expected bool[{mask_N.numel()}]")


def _loaded(key: str, name: str, folder: str) -> Any:
    path = str(Path(folder).resolve())
    if reason := why_absent(name, path):
        raise _refused(key, name, f"it cannot be loaded: {reason}", path)
    if path not in sys.path:
        sys.path.insert(0, path)
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # of the user's module, whatever it does
        raise _refused(key, name, f"it cannot be loaded: {type(error).__name__}: {error}", path) from error
    if not callable(found):
        raise _refused(key, name, f"it is {_shown(found)}", path)
    return found


def _called(key: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # of the user's function, whatever it does
        raise _refused(key, name, f"its trial ended with {type(error).__name__}: {error}") from error


def _refused(key: str, name: str, reason: str, folder: str = "") -> ConfigError:
    where = f", with the module under loss.modules_path ({folder!r})" if folder else ""
    return ConfigError(f"{key} is {name!r}: {reason}; expected a function {PARAMETERS[key]}{where}")


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"
