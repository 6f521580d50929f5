"""The reward service's HTTP side, with the scorer that also serves the queue. Parses, calls and answers.

POST /v1/score runs reward functions, so it needs the token if one is set.
"""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from penstock.config import RewardSection
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.runtime.http import make_app
from penstock_reward.functions.registry import ENVIRONMENT_DESCRIPTION, builtins
from penstock_reward.processes.pool import Pool
from penstock_reward.scoring.breaker import BreakerState
from penstock_reward.scoring.scoring import Scoring

MAX_COMPLETIONS = 1024  # of one request; a group is far smaller
MAX_SCORE_BYTES = 2**25  # so many completions of 8000 tokens


class ScoreRequest(BaseModel):
    """One prompt's completions: `completions`, or one `completion`."""

    model_config = ConfigDict(extra="forbid")

    answer: str
    prompt: str = ""
    completion: str | None = None
    completions: Annotated[list[str], Field(max_length=MAX_COMPLETIONS)] = []
    reward: str = ""
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_form(self) -> "ScoreRequest":
        if (self.completion is None) == (not self.completions):
            raise ValueError("expected either `completion`, a text, or `completions`, a list of at least one")
        return self

    @property
    def texts(self) -> list[str]:
        return self.completions if self.completion is None else [self.completion]


class ScoreAnswer(BaseModel):
    """A value, or null and the reason why there is none."""

    value: float | None
    failure: str


class ScoreResponse(BaseModel):
    """One score per completion, in order."""

    scores: list[ScoreAnswer]


class RewardAnswer(BaseModel):
    """A function that rows and requests may name. weight: null if only they use it. breaker: its state."""

    name: str
    weight: float | None
    builtin: bool
    description: str
    breaker: BreakerState


def make_reward_app(
    section: RewardSection,
    scoring: Scoring,
    pool: Pool,
    registry: CollectorRegistry,
    token: SecretStr | None,
    not_ready: Callable[[], str | None],
) -> FastAPI:
    """The app of the reward service. not_ready: why it cannot work now; None if it can."""
    app = make_app(
        "penstock reward",
        not_ready=not_ready,
        metrics=registry,
        token=token,
        body_bytes={"/v1/score": MAX_SCORE_BYTES},
    )

    @app.post("/v1/score")
    async def score(request: ScoreRequest) -> ScoreResponse:
        scoring.weights(request.reward)  # an unknown name is the caller's error: 422
        verdicts = await scoring.score(request.prompt, request.texts, request.answer, request.reward, request.metadata)
        if all("timeout" in verdict.kinds for verdict in verdicts):
            raise TimeoutError(
                f"all {len(verdicts)} scores timed out: {verdicts[0].score.failure}; "
                "expected a faster function, or a longer reward.timeout_seconds"
            )
        return ScoreResponse(
            scores=[ScoreAnswer(value=verdict.score.value, failure=verdict.score.failure) for verdict in verdicts]
        )

    @app.get("/v1/rewards")
    async def rewards() -> dict[str, list[RewardAnswer]]:
        described = {name: each.description for name, each in builtins().items()}
        known = {**described, ENVIRONMENT_REWARD: ENVIRONMENT_DESCRIPTION}
        names = [*section.functions, *(name for name in known if name not in section.functions)]
        return {
            "rewards": [
                RewardAnswer(
                    name=name,
                    weight=section.functions.get(name),
                    builtin=name in known,
                    description=known.get(name) or pool.descriptions.get(name, ""),
                    breaker=scoring.breakers.of(name).state,
                )
                for name in names
            ]
        }

    return app
