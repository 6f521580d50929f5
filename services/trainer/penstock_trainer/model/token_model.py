"""The interface between an update and the computation of log-probabilities."""

from typing import Protocol

from torch import Tensor

from penstock_trainer.batching.packing import Pack


class TokenModel(Protocol):
    """Log-probabilities and entropy of a pack: a model on one rank, or its shards on many."""

    def token_logprobs(self, pack: Pack, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]: ...
