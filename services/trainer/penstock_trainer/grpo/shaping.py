"""Changes to rewards before they become advantages."""


def overlong_penalty(num_tokens: int, *, max_new_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """What to add to the reward of a completion of `num_tokens` tokens: 0 down to -penalty over the last tokens.

    DAPO (arXiv 2503.14476), equation 13: 0 up to max_new_tokens - buffer, then linear, -penalty at max_new_tokens.
    `buffer_tokens` 0 switches it off. Deviation: the paper's penalty is 1.
    """
    if not buffer_tokens:
        return 0.0
    excess = num_tokens - (max_new_tokens - buffer_tokens)
    return -penalty * min(max(excess, 0) / buffer_tokens, 1.0)
