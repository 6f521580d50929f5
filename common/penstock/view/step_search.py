"""All completions of a run's step files that fit, the newest steps first: by text, reward, failure, length.

Invariant: an answer takes about `MOST_SECONDS`, however large the run is and however little fits, since training waits
for the thread that answers; it says how far it came and where the next one goes on. Texts are decoded from the recorded
ids and dropped again: there is no index, and nothing is kept but the step file that was read last.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import failure_of, rewards_of
from penstock.errors import DataError
from penstock.readable import cut, question_of
from penstock.records.samples import SampleLine
from penstock.view.groups import sampled_ids
from penstock.view.pieces import Pieces
from penstock.view.search import Wanted

MOST_SECONDS = 0.4
TEXT_CHARACTERS = 2000
AROUND_CHARACTERS = 300  # of the text on both sides of what was found


@dataclass(frozen=True)
class Place:
    """A group of a step, by its id: where a search goes on."""

    step: int
    group: int


def search_steps(
    steps: Sequence[int],
    groups_of: Callable[[int], Sequence[ScoredGroup]],
    wanted: Wanted,
    pieces: Pieces,
    start: Place | None,
    limit: int,
) -> dict[str, Any]:
    """Completions from `start` (None: the newest step) backwards. steps: ids, the newest first, with files or without.

    groups_of: of a step; DataError if its file is gone. num_steps: those that are within the bounds of `wanted`;
    num_done: of these, without those that are left to `next`; num_gone: of those of this answer, without a file.
    """
    ends = time.monotonic() + MOST_SECONDS
    some = [step for step in steps if _is_within(step, wanted)]
    found: list[SampleLine] = []
    num_read = num_gone = 0
    for done, step in enumerate(some):
        if start is not None and step > start.step:
            continue
        first = start.group if start is not None and step == start.step else 0
        if num_read + num_gone and not first and (len(found) >= limit or time.monotonic() >= ends):
            return _answer(found, num_read, num_gone, done, len(some), Place(step, 0))
        try:
            groups = groups_of(step)
        except DataError:
            num_gone += 1
            continue
        for number in range(first, len(groups)):
            if num_read and (len(found) >= limit or time.monotonic() >= ends):
                return _answer(found, num_read, num_gone, done, len(some), Place(step, number))
            num_read += len(groups[number].scores)
            found += _fitting(step, groups[number], wanted, pieces)
    return _answer(found, num_read, num_gone, len(some), len(some), None)


def _answer(
    found: list[SampleLine], num_read: int, num_gone: int, num_done: int, num_steps: int, at: Place | None
) -> dict[str, Any]:
    return {
        "lines": found,
        "num_read": num_read,
        "num_gone": num_gone,
        "num_done": num_done,
        "num_steps": num_steps,
        "next": at,
    }


def _is_within(step: int, wanted: Wanted) -> bool:
    return (wanted.step_min is None or step >= wanted.step_min) and (wanted.step_max is None or step <= wanted.step_max)


def _fitting(step: int, group: ScoredGroup, wanted: Wanted, pieces: Pieces) -> Iterator[SampleLine]:
    """The completions of a group; only those are decoded whose figures fit."""
    without_text = wanted.model_copy(update={"text": ""})
    lines = [line for line in _lines(step, group) if without_text.fits(line)]
    ids = [sampled_ids(group.group.trajectories[line.index]) for line in lines]
    for line, text in zip(lines, pieces.texts(ids), strict=True):
        if wanted.fits(replace(line, completion=text)):
            yield replace(
                line,
                prompt=cut(question_of(line.prompt), TEXT_CHARACTERS),
                completion=_around(text, wanted.text),
                answer=cut(line.answer, TEXT_CHARACTERS),
                failure=cut(line.failure, TEXT_CHARACTERS),
            )


def _lines(step: int, group: ScoredGroup) -> Iterator[SampleLine]:
    ticket, rewards = group.group.ticket, rewards_of(group)
    for index, trajectory in enumerate(group.group.trajectories):
        yield SampleLine(
            step=step,
            version=trajectory.oldest_version,
            ticket=ticket.number,
            index=index,
            prompt=ticket.prompt,
            completion="",
            answer=ticket.answer,
            reward=rewards[index],
            failure=failure_of(trajectory, group.scores[index]),
            num_tokens=trajectory.num_tokens,
            truncated=trajectory.is_truncated,
        )


def _around(text: str, needle: str) -> str:
    """What is around the first place of the needle; the beginning and the end of a text without it."""
    place = text.lower().find(needle.lower()) if needle else -1
    if place < 0 or len(text) <= TEXT_CHARACTERS:
        return cut(text, TEXT_CHARACTERS)
    first, last = max(0, place - AROUND_CHARACTERS), place + len(needle) + AROUND_CHARACTERS
    return f"[{first:,} characters] {text[first:last]} [{max(0, len(text) - last):,} characters]"
