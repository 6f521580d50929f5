"""The proximal policy: the anchor that the surrogate's ratio is measured from."""

from typing import Literal

from torch import Tensor

Proximal = Literal["none", "recomputed", "approximated"]


def approximate_proximal(logprobs_N: Tensor, behaviour_N: Tensor, lag_N: Tensor) -> Tensor:
    """l_b + a (sg l - l_b), a = clamp((v - 1 - v_b) / (v - v_b), 0, 1), and 0 where v_b >= v.

    A-3PO's interpolation: with lag v - v_b the policy one version ago lies (lag - 1) / lag of the way from the sampler
    to the present policy. lag 1: the behaviour policy itself; large lags: the present policy. It saves the forward pass
    that recomputes l_p.
    """
    lag_N = lag_N.to(logprobs_N.dtype)
    share_N = ((lag_N - 1) / lag_N.clamp(min=1)).clamp(0, 1)
    return behaviour_N + share_N * (logprobs_N.detach() - behaviour_N)
