"""What an episode of an agent with a client of its own is worth: an async function, or a program.

Such an agent ends with a number, with an exception, or with neither; it may have given a reward by HTTP; and the
gateway may have refused a call of it at a limit. Which of these counts is one rule for both.
"""

import math

from penstock.contracts import Score
from penstock_agent.environments.episode import ChatSession, Ending, unfitting


def settle(session: ChatSession, value: float | None, fault: str, cut_score: float) -> Ending:
    """The ending of an episode that gave `value`, or failed with `fault` (empty: it did not).

    A fault after a cut is the model's doing, since few agents expect a refusal: the episode is worth what it has given,
    or else `cut_score`. Otherwise a fault, or an episode without any reward, is a failure.
    """
    cut = session.cut
    if session.num_turns == 0:
        if cut:
            return Ending(unfitting(cut), cut)
        return Ending(Score(None, fault or f"the agent ended without a call of the model; {_EXPECTED_CALL}"), "failure")
    if fault and not cut:
        return Ending(Score(None, fault), "failure")
    if value is None and cut:
        value = cut_score
    if value is None:
        return Ending(Score(None, f"the agent gave no reward: {_EXPECTED}"), "failure")
    if not math.isfinite(value):
        return Ending(Score(None, f"the agent gave the reward {value}; expected a finite number"), "failure")
    return Ending(Score(value), cut or "done")


# The address is not shown: it holds the key.
_EXPECTED_CALL = "expected requests to OPENAI_BASE_URL with OPENAI_API_KEY (a function's base_url and api_key)"
_EXPECTED = (
    "expected PUT {base_url}/reward, a number that the function returns, or the last line of the program's output"
)
