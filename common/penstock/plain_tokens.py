"""Plain texts as tokens, the same in every service.

Owns the rule of which special tokens stand before a text. Invariant: none stands behind it, since more text follows.
"""

from typing import Protocol


class Tokenizer(Protocol):
    """The method of a transformers tokenizer that is used."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


def plain_token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a plain text behind those that the tokenizer begins a text with, unless it begins with them itself.

    What the tokenizer puts at the end of a text is left out: the completion follows.
    """
    own, full = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    for start in range(len(full) - len(own) + 1):
        if full[start : start + len(own)] == own:
            before = full[:start]
            return own if own[:start] == before else before + own
    return full  # its special tokens change the others
