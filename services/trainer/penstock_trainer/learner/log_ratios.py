"""The log-ratio of each token that an update computed: the trainer's log-probability minus the sampler's, for readers.

Owns which values these are, and their way from the packs of all ranks back to the tokens of each trajectory. The
trainer's log-probability is that of the token's first forward pass in its update, at the sampling temperature:

    the first mini-batch            the weights that the step trains, before any change of the update
    a further one, loss.proximal    the same weights, of the pass that computes the old log-probabilities
      recomputed
    a further one, otherwise        the weights after the mini-batches before it

No pass is added and nothing that is trained depends on them. A token that was not computed has none: it is context,
masked or auxiliary, or its completion has no gradient.

Invariant: 2 bytes a token while they wait, as float16: 3 digits, which bfloat16 weights do not give. A rank sends only
those of its own packs, once, after its last change of the weights.

Shapes: S samples, N loss tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.contracts import ScoredGroup
from penstock_trainer.batching.packing import Pack
from penstock_trainer.batching.paths import loss_places

FLOAT16 = np.dtype("<f2")
LARGEST = float(torch.finfo(torch.float16).max)


class LogRatiosPart(msgspec.Struct, frozen=True):
    """Those of one rank. samples: int32[S, 4]: group, completion, path, number of loss tokens. values: float16[N]."""

    samples: bytes
    values: bytes


class RankLogRatios:
    """Those of the packs that this rank has computed so far."""

    def __init__(self) -> None:
        self._samples: list[npt.NDArray[np.int32]] = []
        self._values: list[npt.NDArray[np.float16]] = []

    def add(self, pack: Pack, logprobs_N: Tensor) -> None:
        """Note a pack's. logprobs_N: the trainer's."""
        if not pack.num_sequences:
            return
        with torch.no_grad():
            ratio_N = logprobs_N.float() - pack.behaviour_logprobs_N.float()
            values_N = ratio_N.clamp(-LARGEST, LARGEST).half().cpu()
            num_tokens_S = torch.bincount(pack.sequence_N, minlength=pack.num_sequences).cpu().numpy()
        index = np.array(pack.indices, dtype=np.int32).reshape(-1, 2)
        self._samples.append(np.column_stack([index, np.array(pack.paths), num_tokens_S]).astype("<i4"))
        self._values.append(values_N.numpy().astype(FLOAT16, copy=False))

    def part(self) -> LogRatiosPart:
        """All of them."""
        return LogRatiosPart(
            b"".join(each.tobytes() for each in self._samples), b"".join(each.tobytes() for each in self._values)
        )


@dataclass(frozen=True)
class LogRatios:
    """Those of one update, of all ranks in their order."""

    parts: tuple[LogRatiosPart, ...] = field(default=())

    def by_trajectory(
        self, groups: Sequence[ScoredGroup], *, version: int, max_lag: int | None
    ) -> tuple[tuple[bytes, ...], ...]:
        """float16 of each sampled token of each trajectory of each group; nan: not computed. Empty: none was.

        version, max_lag: with which these groups were trained.
        """
        values = {key: found for part in self.parts for key, found in _by_sample(part)}
        computed = {key[:2] for key in values}
        return tuple(
            tuple(
                self._of(values, (b, g), group, version, max_lag) if (b, g) in computed else b""
                for g in range(len(group.scores))
            )
            for b, group in enumerate(groups)
        )

    @staticmethod
    def _of(
        values: dict[tuple[int, int, int], npt.NDArray[np.float16]],
        index: tuple[int, int],
        group: ScoredGroup,
        version: int,
        max_lag: int | None,
    ) -> bytes:
        trajectory = group.group.trajectories[index[1]]
        of_tokens = np.full(trajectory.num_tokens, np.nan, dtype=FLOAT16)
        for path, places in enumerate(loss_places(trajectory, version, max_lag)):
            if (found := values.get((*index, path))) is not None:
                of_tokens[places] = found
        return of_tokens.tobytes()


NO_LOG_RATIOS = LogRatios()


def _by_sample(part: LogRatiosPart) -> Iterator[tuple[tuple[int, int, int], npt.NDArray[np.float16]]]:
    values = np.frombuffer(part.values, dtype=FLOAT16)
    start = 0
    for b, g, path, size in np.frombuffer(part.samples, dtype="<i4").reshape(-1, 4).tolist():
        yield (b, g, path), values[start : start + size]
        start += size
