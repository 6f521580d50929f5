"""The model of the fake engine: tokens and log-probabilities as pure functions."""

VOCABULARY = 100


def next_token(tokens: list[int], seed: int) -> int:
    """Depends on all that came before, so that a completion which goes on somewhere else ends as it would have."""
    return (sum(tokens) * 31 + len(tokens) + seed * 7) % VOCABULARY


def token_logprob(token: int, weight_version: str) -> float:
    """By the weights of a version, of which only the number counts."""
    number = int(weight_version.partition("-")[0]) if weight_version[0].isdecimal() else 99
    return -1.0 - token / 100 - number / 10


def prompt_logprobs(token_ids: list[int] | tuple[int, ...], weight_version: str) -> tuple[float, ...]:
    """Of all tokens but the first."""
    return tuple(token_logprob(token, weight_version) for token in token_ids[1:])
