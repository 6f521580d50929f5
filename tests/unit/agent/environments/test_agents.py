"""What an episode of an agent with its own client is worth."""

import math

import pytest

from penstock.contracts import Score
from penstock.contracts.vocabulary import Cut
from penstock_agent.environments.agents import settle
from penstock_agent.environments.episode import Ending
from tests.unit.agent.environments.scripted_session import ScriptedSession

CUT_SCORE = -0.5


def ending(value: float | None, fault: str = "", cut: Cut | None = None, num_turns: int = 1) -> Ending:
    session = ScriptedSession()
    session.cut, session.num_turns = cut, num_turns
    return settle(session, value, fault, CUT_SCORE)


def test_a_number_is_the_score() -> None:
    assert ending(0.5) == Ending(Score(0.5), "done")


@pytest.mark.parametrize("cut", ["max_turns", "max_tokens"])
def test_after_a_cut_a_fault_is_the_models_doing(cut: Cut) -> None:
    assert ending(None, cut=cut) == ending(None, "raised", cut) == Ending(Score(CUT_SCORE), cut)
    assert ending(1.0, cut=cut) == ending(1.0, "raised", cut) == Ending(Score(1.0), cut)


def test_a_fault_without_a_cut_is_a_failure_even_with_a_reward() -> None:
    assert ending(1.0, "KeyError: 'x'") == Ending(Score(None, "KeyError: 'x'"), "failure")


def test_a_missing_reward_is_a_failure_and_never_zero() -> None:
    assert ending(None).score.value is None
    assert ending(None).end == "failure"
    assert "gave no reward: expected PUT {base_url}/reward" in ending(None).score.failure


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_a_failure(value: float) -> None:
    assert ending(value).end == "failure"
    assert f"the reward {value}; expected a finite number" in ending(value).score.failure


def test_an_agent_that_never_calls_the_model_has_no_score() -> None:
    silent = ending(1.0, num_turns=0)
    assert (silent.score.value, silent.end) == (None, "failure")
    assert "without a call of the model; expected requests to OPENAI_BASE_URL" in silent.score.failure
    assert "http" not in silent.score.failure  # the address holds the key
    assert ending(None, "it raised", num_turns=0).score.failure == "it raised"


def test_a_first_call_that_does_not_fit_is_nothing_that_the_model_did() -> None:
    assert ending(None, "it raised", "max_tokens", 0) == Ending(
        Score(None, "the first call of the model does not fit agent.max_tokens"), "max_tokens"
    )
