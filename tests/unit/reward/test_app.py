"""The HTTP answers of the reward service, with a fake for the pool."""

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from penstock.config import RewardSection
from penstock_reward.app import make_reward_app
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.processes.pool import Pool
from penstock_reward.scoring.scoring import Scoring

OK = Outcome(1.0, 0.01)
TIMEOUT = Outcome(None, 10.0, "timeout", "killed after 10 s")


class FakeRunner:
    """Answers calls by a rule."""

    def __init__(self, rule: Callable[[Call], Outcome] = lambda call: OK) -> None:
        self.rule = rule

    async def run(
        self,
        prompt: str,
        completions: Sequence[str],
        answer: str,
        metadata: dict[str, Any],
        calls: Sequence[Call],
        *,
        on_outcome: Callable[[Call, Outcome], None],
        is_test: bool = False,
    ) -> list[Outcome]:
        outcomes = [self.rule(call) for call in calls]
        for call, outcome in zip(calls, outcomes, strict=True):
            on_outcome(call, outcome)
        return outcomes


def client(runner: FakeRunner, token: SecretStr | None = None, **keys: Any) -> httpx.AsyncClient:
    section = RewardSection(**{"max_attempts": 1, **keys})
    metrics = RewardMetrics()
    pool = Pool(section)
    app = make_reward_app(section, Scoring(section, runner, metrics), pool, metrics.registry, token, pool.not_ready)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://reward")


async def test_http_scores_one_or_many() -> None:
    runner = FakeRunner(lambda call: OK if call.completion == 0 else TIMEOUT)
    async with client(runner) as http:
        many = await http.post("/v1/score", json={"completions": ["a", "b"], "answer": "a"})
        one = await http.post(
            "/v1/score", json={"completion": "", "answer": "a", "reward": "math", "metadata": {"x": 1}}
        )
    assert many.status_code == one.status_code == 200
    assert many.json() == {
        "scores": [
            {"value": 1.0, "failure": ""},
            {"value": None, "failure": "exact_match: killed after 10 s"},
        ]
    }
    assert one.json() == {"scores": [{"value": 1.0, "failure": ""}]}


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"answer": "a"}, "expected either `completion`"),
        ({"answer": "a", "completion": "a", "completions": ["a"]}, "expected either `completion`"),
        ({"answer": "a", "completions": []}, "expected either `completion`"),
        ({"completion": "a"}, "answer: Field required"),
        ({"completion": "a", "answer": "a", "rewrd": "math"}, "rewrd"),
        ({"completion": "a", "answer": "a", "reward": "maths"}, "unknown reward 'maths'"),
        ({"completion": "a", "answer": "a", "reward": "a\0b"}, "unknown reward"),
    ],
)
async def test_http_refuses_what_it_cannot_score(body: dict[str, Any], detail: str) -> None:
    async with client(FakeRunner()) as http:
        answer = await http.post("/v1/score", json=body)
    assert answer.status_code == 422
    assert detail in answer.json()["detail"]


async def test_http_knows_the_score_of_the_environment_and_scores_no_text_with_it() -> None:
    async with client(FakeRunner(), functions={"environment": 1.0, "math": 0.5}) as http:
        listed = (await http.get("/v1/rewards")).json()["rewards"]
        refused = await http.post("/v1/score", json={"answer": "a", "completion": "a"})
        other = await http.post("/v1/score", json={"answer": "a", "completion": "a", "reward": "math"})
    [named] = [each for each in listed if each["name"] == "environment"]
    assert (named["weight"], named["builtin"], named["breaker"]) == (1.0, True, "closed")
    assert "environment" in named["description"]
    assert refused.status_code == 422
    assert "expected a reward that names another function" in refused.json()["detail"]
    assert other.status_code == 200


async def test_http_refuses_metadata_that_no_message_can_hold() -> None:
    section, metrics = RewardSection(), RewardMetrics()
    pool = Pool(section)
    app = make_reward_app(section, Scoring(section, pool, metrics), pool, metrics.registry, None, pool.not_ready)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://reward") as http:
        answer = await http.post("/v1/score", json={"completion": "a", "answer": "a", "metadata": {"x": 10**30}})
    assert answer.status_code == 422
    assert "metadata cannot be packed" in answer.json()["detail"]


async def test_http_answers_504_when_every_call_timed_out() -> None:
    async with client(FakeRunner(lambda call: TIMEOUT)) as http:
        answer = await http.post("/v1/score", json={"completions": ["a", "b"], "answer": "a"})
    assert answer.status_code == 504
    assert answer.json()["error"] == "timeout"
    assert "reward.timeout_seconds" in answer.json()["detail"]


async def test_http_needs_the_token_to_run_rewards_and_only_then() -> None:
    body = {"completion": "a", "answer": "a"}
    async with client(FakeRunner(), SecretStr("secret")) as http:
        assert (await http.post("/v1/score", json=body)).status_code == 401
        wrong = {"Authorization": "Bearer guess"}
        assert (await http.post("/v1/score", json=body, headers=wrong)).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert (await http.post("/v1/score", json=body, headers=right)).status_code == 200
        assert (await http.get("/v1/rewards")).status_code == 200
        assert (await http.get("/health")).status_code == 200
        ready = await http.get("/ready")
    assert ready.status_code == 503  # the pool of this test was never opened
    assert "0 of 1 reward workers" in ready.json()["detail"]


async def test_http_lists_the_rewards() -> None:
    async with client(FakeRunner(), functions={"exact_match": 1.0, "mine:f": 0.5}) as http:
        rewards = {each["name"]: each for each in (await http.get("/v1/rewards")).json()["rewards"]}
    assert rewards["exact_match"]["weight"] == 1.0
    assert rewards["exact_match"]["description"].startswith("1 if the whole completion is the answer")
    assert rewards["mine:f"] == {
        "name": "mine:f",
        "weight": 0.5,
        "builtin": False,
        "description": "",
        "breaker": "closed",
    }
    assert rewards["math"]["weight"] is None
