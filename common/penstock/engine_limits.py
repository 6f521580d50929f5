"""How long a sequence (prompt plus completion) an engine generates to its end.

Shared by the trainer, which refuses longer prompts before a run begins, and the rollout service, which has the engine's
own figures. SGLang accepts longer ones, and cuts their completions without a word.
"""

RESERVED_TOKENS = 6
"""Of the shorter of context and key-value cache, SGLang generates into all but 2, and reads prompts of all but 7: a
completion that an abort cut goes on as a prompt, up to its last token."""


def longest_sequence(context_length: int, cache_tokens: int | None, page_tokens: int = 1) -> int:
    """Tokens. `cache_tokens`: of the key-value cache, None if unknown; it is given out in pages of `page_tokens`.

    >>> longest_sequence(256, None), longest_sequence(256, 100), longest_sequence(256, 128, 16)
    (250, 94, 96)
    """
    longest = context_length - RESERVED_TOKENS
    if cache_tokens is None:
        return longest
    return min(longest, cache_tokens - max(RESERVED_TOKENS, 2 * page_tokens))  # a page may be begun at either end
