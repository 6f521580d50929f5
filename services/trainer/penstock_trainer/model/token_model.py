"""The interface between an update and the computation of log-probabilities."""

from typing import Protocol

from torch import Tensor

from penstock_trainer.batching.packing import Pack


class TokenModel(Protocol):
    """Log-probabilities and entropy of a pack: a model on one rank, or its shards on many.

    shares_prefixes: whether sequences of a pack may share rows; else each has its own.
    """

    @property
    def shares_prefixes(self) -> bool: ...

    def token_logprobs(self, pack: Pack, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]: ...

    def expert_use(self) -> tuple[tuple[int, ...], ...]:
        """[layers][experts]: how many rows of the last pack each expert got; empty without experts."""
        ...
