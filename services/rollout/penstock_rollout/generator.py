"""Completions on one engine, over any number of updates that cut them.

Invariant: what is returned was sampled to its end, each piece by the weights that it names, and none of it by weights
that the canary may still reject: then it waits until the canary has decided.

    request --> engine --> all finished? --> of unverified weights? wait for the canary --> answers
                   ^            | cut by an update, or by the trainer's turn on the GPU
                   '-- the rest, once weights are served again
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.contracts import Completion, Sampling, ServerState
from penstock.errors import EngineAbortedError, EngineDiedError, WeightsError
from penstock_rollout.engine.draft import Draft
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.types import EngineAbsentError, GroupAnswer, completions
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.updater import WeightUpdater

log = logging.getLogger(__name__)

ASLEEP = "the engine sleeps: it is the trainer's turn on the GPU (trainer.take_turns)"


@dataclass(frozen=True)
class Generated:
    """One answer per seed. waited_seconds: spent waiting for weights to go on with."""

    answers: GroupAnswer
    waited_seconds: float
    life: int
    """Of the engine, when it began."""
    num_prompt_tokens: int = 0


class Generator:
    """Generates on one engine, for tickets and for calls alike."""

    def __init__(self, engine: Engine, weights: WeightUpdater, metrics: RolloutMetrics) -> None:
        self._engine = engine
        self._weights = weights
        self._metrics = metrics

    @property
    def not_ready(self) -> str | None:
        """Why neither a ticket nor a call can be taken; None if one can."""
        weights = self._weights
        if (reason := self._engine.not_ready) is not None:
            return reason
        if weights.state is ServerState.ASLEEP:
            return ASLEEP
        if weights.state is ServerState.PAUSED:
            return "generation is paused; POST /v1/resume resumes it"
        if weights.state is ServerState.FENCED:
            return f"nothing is taken until the announced weights are served; the last update failed: {weights.fenced}"
        if not weights.loaded:
            return "no weights were loaded yet; expected the trainer to push or announce a version"
        return None

    async def generate(
        self,
        prompt_ids: tuple[int, ...],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        training: bool,
        with_experts: bool = False,
    ) -> Generated:
        """One completion per seed, with the experts of its tokens if they are asked for; a lost engine is reported.

        EngineDiedError: it died while it ran this. EngineAbortedError: it ended one for no known reason.
        """
        life = self._engine.life
        try:
            return await self._generate(prompt_ids, seeds, sampling, life, training, with_experts)
        except EngineDiedError as error:
            self._engine.report(life, str(error))
            if life == self._weights.condemned_life and not isinstance(error, EngineAbsentError):
                raise EngineAbsentError(str(error)) from error  # it was ended for its weights
            raise

    async def _generate(
        self,
        prompt_ids: tuple[int, ...],
        seeds: Sequence[int],
        sampling: Sampling,
        life: int,
        training: bool,
        with_experts: bool,
    ) -> Generated:
        if (reason := self._engine.not_ready) is not None:  # lost since this was taken: no death to count against it
            raise EngineAbsentError(reason)
        weights, generation = self._weights, self._engine.client.generation
        draft = Draft(
            prompt_ids,
            seeds,
            sampling,
            one_version_per_answer=weights.aborts_requests,
            with_experts=with_experts,
        )
        waited_seconds = 0.0
        while True:
            if weights.sleeps:
                waited_seconds += await self._settled()
            num_interruptions = weights.num_interruptions
            with weights.generating(), self._metrics.running(training=training):
                draft.add(await generation.complete(draft.requests(), sampling))
            if draft.finished:
                break
            if weights.num_interruptions == num_interruptions:
                raise EngineAbortedError("the engine aborted it")
            waited_seconds += await self._settled()
        if seams := draft.seams():
            draft.end_at_seams(await generation.detokenize(seams))
        answers = draft.group(await generation.detokenize(draft.shown_tokens()) if draft.was_cut else None)
        if any(span.weight_version == weights.unverified for answer in answers for span in answer.spans):
            await weights.settled()
        return Generated(answers, waited_seconds, life, len(prompt_ids))

    async def _settled(self) -> float:
        """Wait for the weights with which a completion goes on; returns for how many seconds."""
        start = time.monotonic()
        await self._weights.settled()
        if self._weights.identity is None and not self._weights.paused:
            raise EngineAbsentError("the weights that cut it could not be loaded")
        return time.monotonic() - start

    def completions(self, generated: Generated) -> tuple[Completion, ...]:
        """What was generated, with the policies that made it. WeightsError if they are unknown: then no weights count
        as served any more, unless the engine was given up for its weights, as it was if the canary rejected them.
        """
        try:
            return completions(generated.answers, self._weights.known, generated.num_prompt_tokens)
        except WeightsError as error:
            if generated.life != self._weights.condemned_life:
                log.error("%s: loading the announced weights again", error)
                self._weights.forget()
            raise
