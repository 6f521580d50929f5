"""Letters of multiple choice: the letter of an answer, and the letter that a completion chooses.

Owns the rule. Invariant: a letter counts only if it is all of the answer, labels it, or is named as the answer; a
completion that names two chooses none.
"""

import re

MAX_CHARS = 2000  # of the end of a text, which holds its answer
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|rm|bf)(?![A-Za-z])|[{}$*_`()\[\]\\\s]")
_FONT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
_LETTER = r"[(\[{*_`$\s]*(?P<letter>[A-Z])(?![A-Za-z0-9'\u2019+=^/])[)\]}*_`$.]*"
_SECOND = re.compile(r"\s*(?:,|or|and|/|&)\s*[(\[*$]*[A-Z](?![A-Za-z'\u2019])")
_LABEL = re.compile(r"\s*[(\[*_]*(?P<letter>[A-Z])[*_]*\s*[).:\]][*_]*(?=\s|$)")
_NAMED = re.compile(
    r"\banswer(?:\s+(?:choice|option|letter))?\s*(?:is|:|=|would be|must be)*[:\s]*"
    r"(?:(?:option|choice|letter)\s*)?" + _LETTER,
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?:(?:correct|right|best)\s+(?:option|choice|letter)\s*(?:is|:|=)*|(?:choose|pick|select)(?:\s+option)?)[:\s]*"
    + _LETTER,
    re.IGNORECASE,
)
_IS_CORRECT = re.compile(
    r"(?<![A-Za-z])(?:option|choice|answer)?\s*[(*]*(?P<letter>[A-Z])[)*]*\s+is\s+(?:the\s+)?(?:correct|right)\b",
    re.IGNORECASE,
)


def choice_letter(answer: str) -> str:
    """The letter that an answer is: A, (B), \\text{C}; empty if it is something else."""
    bare = _DRESS.sub("", answer).rstrip(".")
    return bare if len(bare) == 1 and "A" <= bare <= "Z" else ""


def chosen_letter(text: str) -> str:
    """The letter that a completion's answer chooses; empty if it chooses none, or more than one."""
    text = _FONT.sub(r"\1", text[-MAX_CHARS:]).replace("\\ ", " ")
    bare = _DRESS.sub("", text).strip().strip(".,:;").upper()
    if len(bare) == 1:
        return bare if "A" <= bare <= "Z" else ""
    for pattern in (_NAMED, _CHOSEN, _IS_CORRECT):
        found = [match for match in pattern.finditer(text) if match["letter"].isupper()]
        if found:
            return "" if _SECOND.match(text, found[-1].end()) else found[-1]["letter"]
    last_line = text.strip().rpartition("\n")[2]
    alone = _DRESS.sub("", last_line).strip().strip(".,:;")
    if len(alone) == 1 and "A" <= alone <= "Z":
        return alone
    label = _LABEL.match(last_line)
    return label["letter"] if label else ""
