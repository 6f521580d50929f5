"""Finds the answer in a completion: after its thinking, between tags, in a box.

Owns these marks, which all built-in rewards read in the same way. Invariant: linear time for any text.

    <think>...</think> The cost is <answer>\\boxed{42}</answer>
                                                   --
"""

import re
from dataclasses import dataclass

_THINKING = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_ANSWER = re.compile(r"<(/?)answer>", re.IGNORECASE)
_END_TOKENS = re.compile(r"(?:\s|<\|[A-Za-z_]{1,32}\|>|</s>|<eos>|<end_of_turn>)+\Z")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s*([0-9]+(?:\.[0-9]+)?)")
_BETWEEN = re.compile(r"[\s$]*(?:,|,?\s*(?:and|or|\\text\{\s*(?:and|or)\s*\}))[\s$]*")
_MAX_BETWEEN = 40  # characters between boxes that form one answer
_MAX_DEPTH = 8  # boxes within boxes


@dataclass(frozen=True)
class Given:
    """The part of a completion that holds its answer; `boxed`: the text is exactly the content of a box."""

    text: str
    boxed: bool = False


def given_answer(completion: str) -> Given:
    """The answer that a completion gives: the last box within the last answer tag, after the thinking.

    A missing mark is skipped: without tags the last box of the text, without boxes the text.
    """
    text = tagged(spoken(completion))
    found = boxed(text)
    for _ in range(_MAX_DEPTH):
        inner = None if found is None else boxed(found)
        if inner is None:
            break
        found = inner
    return Given(text) if found is None else Given(found, boxed=True)


def spoken(completion: str) -> str:
    """The text after the thinking; empty if the thinking never ends. Without such tags the full text."""
    text = _END_TOKENS.sub("", completion[-200:])
    text = completion[:-200] + text
    tags = list(_THINKING.finditer(text))
    if not tags:
        return text.strip()
    return text[tags[-1].end() :].strip() if tags[-1][1] else ""


def tagged(text: str) -> str:
    """The content of the last answer tag that is closed and not empty.

    A tag that the prompt opened, or that a stop text cut off, may lack its other half. Without tags the full text.
    """
    tags = list(_ANSWER.finditer(text))
    if not tags:
        return text.strip()
    for first, second in zip(reversed(tags[:-1]), reversed(tags[1:]), strict=True):
        inside = text[first.end() : second.start()].strip()
        if not first[1] and second[1] and inside:
            return inside
    last = tags[-1]
    if not last[1]:
        return text[last.end() :].strip()
    return text[: last.start()].strip() if len(tags) == 1 else ""


def boxed(text: str) -> str | None:
    """Content of the last complete box; boxes joined by a comma, "and" or "or" are one answer. None without a box."""
    boxes = _boxes(text)
    if not boxes:
        bare = _BARE_BOX.findall(text)
        return bare[-1] if bare else None
    contents = [text[boxes[-1][1] : boxes[-1][2]]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        between = text[before[2] + 1 : after[0]]
        if len(between) > _MAX_BETWEEN or not _BETWEEN.fullmatch(between):
            break
        contents.insert(0, text[before[1] : before[2]])
    return ", ".join(each.strip() for each in contents)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Start of the command, start and end of the content, of each outermost complete box."""
    boxes: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int] | None] = []
    for match in _BRACE.finditer(text):
        if match["box"]:
            opened.append((match.start(), match.end()))
        elif match["open"]:
            opened.append(None)
        elif match["close"] and opened:
            box = opened.pop()
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:
                    boxes.pop()
                boxes.append((*box, match.start()))
    return boxes
