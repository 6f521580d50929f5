"""The canary of each version: the log-probabilities of a few fixed tokens, computed by the trainer.

Owns the choice of the tokens and the tolerance for an engine. Invariant: the tokens are those of the run's first
prompt, so they are the same in every life of the trainer, and like those of other requests to the engine.

The float32 masters are used without rounding. If the engine has bfloat16, rounding them changes the mean
log-probability of a token by about as much as the engine's own arithmetic does (SmolLM2-135M: 0.05 and 0.06 nats),
which the tolerance covers, and a rounded copy of the model would cost its memory.
"""

import math
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from penstock.config import Config
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement
from penstock.errors import NonFiniteError, WeightsBusyError

FLOAT32_TOLERANCE = 0.002  # nats; measured: 5e-6 on a CPU. A GPU may multiply in TF32
BFLOAT16_TOLERANCE = 0.25  # measured: 0.1 with words drawn at random, whose logits are large; another tensor: above 0.5
UNSENT_TOKENS = 16  # computed in any case, so that weights which give no numbers are detected without a canary too

SequenceLogprobs = Callable[[Sequence[int]], tuple[float, ...]]


class CanaryMaker:
    """Makes the canary of the current weights."""

    def __init__(self, logprobs: SequenceLogprobs, prompt_ids: Sequence[int], config: Config) -> None:
        """`prompt_ids`: the run's first prompt, repeated if it is short."""
        self._is_sent = config.weights.canary_tokens > 0
        num_tokens = config.weights.canary_tokens or UNSENT_TOKENS
        self._logprobs = logprobs
        self._token_ids = tuple(prompt_ids[i % len(prompt_ids)] for i in range(num_tokens))
        is_float32 = config.actor.dtype == config.rollout.engine.dtype == "float32"
        self._newest: tuple[int, Canary | None] = (-1, None)  # version and canary
        self._tolerance = config.weights.canary_tolerance or (FLOAT32_TOLERANCE if is_float32 else BFLOAT16_TOLERANCE)

    def make(self, version: int) -> Canary | None:
        """The canary of the current weights, which are those of `version`; None if `weights.canary_tokens` is 0.

        NonFiniteError if their log-probabilities are not finite.
        """
        measured = self._measure(version)
        canary = measured if self._is_sent else None
        self._newest = (version, canary)
        return canary

    def beside(self, files: Announcement) -> Announcement:
        """The files of the newest version, with its canary; WeightsBusyError before the canary is computed."""
        version, canary = self._newest
        if version != files.identity.number:
            raise WeightsBusyError(f"version {files.identity.number} is staged and has no canary yet; try again")
        return replace(files, canary=canary)

    def _measure(self, version: int) -> Canary:
        logprobs = self._logprobs(self._token_ids)
        if not all(map(math.isfinite, logprobs)):
            shown = ", ".join(f"{each:g}" for each in logprobs[:4])
            raise NonFiniteError(
                f"version {version} of the weights gives log-probabilities {shown} to the first prompt: expected "
                "finite ones. The weights are broken, and are neither pushed nor saved: lower optimizer.lr, or begin a "
                "new run from an earlier checkpoint"
            )
        return Canary(self._token_ids, logprobs, self._tolerance)
