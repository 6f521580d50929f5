"""The model of the fake engine: tokens and log-probabilities as pure functions."""

VOCABULARY = 100


def next_token(tokens: list[int], seed: int) -> int:
    """The next token; it depends on all tokens before, so a completion continued by another server has the same end."""
    return (sum(tokens) * 31 + len(tokens) + seed * 7) % VOCABULARY


def token_logprob(token: int, weight_version: str) -> float:
    """The log-probability by a version's weights; only the version's number counts."""
    number = int(weight_version.partition("-")[0]) if weight_version[0].isdecimal() else 99
    return -1.0 - token / 100 - number / 10


def prompt_logprobs(token_ids: list[int] | tuple[int, ...], weight_version: str) -> tuple[float, ...]:
    """The log-probabilities of all tokens but the first."""
    return tuple(token_logprob(token, weight_version) for token in token_ids[1:])
