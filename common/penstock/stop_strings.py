"""Strings that end a completion: a completion ends with the token that completes one of them in its text.

Owns what a text shows of a completion that one ended. Invariant: tokens keep the string, text never does. The policy
sampled its tokens, so they are trained; reward functions read what comes before it. A token may hold more text than the
end of the string (`"\\n"` ends at the token of two newlines, too): that is left out as well. Pure.
"""

from collections.abc import Sequence


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the string that ended it; all of it without one. Of several, the first of `stop` that is in it.

    >>> before_stop("7\\n\\n", ["END", "\\n"]), before_stop("7 of", ["\\n"])
    ('7', '7 of')
    """
    found = next((each for each in stop if each in text), None)
    return text if found is None else text[: text.index(found)]
