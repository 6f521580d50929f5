"""The tokens of one completion or episode: id, text, log-probability, mask, and the weights that the engine asserted.

Pure. Owns the order: the prompt, then what was sampled; of an episode its nodes. Invariant: a token that was not
sampled has no log-probability, no version and is not trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.contracts import Completion, ScoredGroup, VersionSpan, unpack_float32, unpack_int32
from penstock.contracts.outcomes import rewards_of
from penstock.view.pieces import Pieces

MOST_TOKENS = 4000  # of an answer
WARM_UP = 8  # tokens decoded before the first one of an answer, so that a character is not cut in two


@dataclass(frozen=True)
class Segment:
    """Tokens of one origin. role: of the message; parent: the segment that they continue, None: none.

    logprobs: None: they were not sampled. loss_mask: one byte a token; None: each is trained.
    """

    kind: str
    role: str
    parent: int | None
    ids: list[int]
    logprobs: list[float] | None = None
    spans: tuple[VersionSpan, ...] = ()
    loss_mask: bytes | None = None

    def is_trained(self, place: int) -> bool:
        """Whether a token has a loss, before masks of the batch."""
        return self.kind == "sampled" and (self.loss_mask is None or self.loss_mask[place] != 0)


def segments_of(group: ScoredGroup, index: int) -> list[Segment]:
    """The segments of a trajectory, in their order."""
    trajectory, ticket = group.group.trajectories[index], group.group.ticket
    if isinstance(trajectory, Completion):
        ids, logprobs = unpack_int32(trajectory.token_ids), unpack_float32(trajectory.logprobs)
        return [
            Segment("prompt", "", None, unpack_int32(ticket.prompt_ids)),
            Segment("sampled", "", 0, ids, logprobs, trajectory.spans, trajectory.loss_mask),
        ]
    return [
        Segment(
            kind="context" if node.logprobs is None else "auxiliary" if node.auxiliary else "sampled",
            role=node.role,
            parent=None if node.parent < 0 else node.parent,
            ids=unpack_int32(node.token_ids),
            logprobs=None if node.logprobs is None else unpack_float32(node.logprobs),
            spans=node.spans,
        )
        for node in trajectory.nodes
    ]


def token_page(
    group: ScoredGroup,
    index: int,
    pieces: Pieces,
    *,
    offset: int,
    limit: int,
    version: int | None,
    max_lag: int | None,
    log_ratios: Sequence[float | None] | None = None,
) -> dict[str, Any]:
    """Tokens [offset, offset + limit) as columns. version: under training; max_lag: older tokens are masked.

    log_ratios: of each sampled token.
    """
    segments = segments_of(group, index)
    ids = [each for segment in segments for each in segment.ids]
    end = min(offset + min(limit, MOST_TOKENS), len(ids))
    begin = max(0, offset - WARM_UP)
    decoded = pieces.of(ids[begin:end])
    rows = list(_rows(segments))[offset:end]
    has_reward = rewards_of(group)[index] is not None
    ratios = list(_at_tokens(segments, log_ratios or []))
    starts, start = [], 0
    for number, each in enumerate(segments):
        starts.append({"start": start, "kind": each.kind, "role": each.role, "parent": each.parent, "number": number})
        start += len(each.ids)
    return {
        "total": len(ids),
        "offset": offset,
        "ids": ids[offset:end],
        "pieces": None if decoded is None else decoded[offset - begin :],
        "special": pieces.special(ids[offset:end]),
        "no_text": pieces.reason,
        "segments": starts,
        "logprobs": [logprob for logprob, _, _ in rows],
        "log_ratios": ratios[offset:end],
        "largest_log_ratio": _farthest(ratios),
        "versions": [None if span is None else span.policy.number for _, span, _ in rows],
        "trained": [
            has_reward and trained and span is not None and not _is_stale(span, version, max_lag)
            for _, span, trained in rows
        ],
        "asserted": {str(span.policy.number): span.policy.digest for segment in segments for span in segment.spans},
    }


def _at_tokens(segments: Sequence[Segment], of_sampled: Sequence[float | None]) -> Iterator[float | None]:
    """A value for each token; None for one that was not sampled."""
    values = iter(of_sampled)
    for segment in segments:
        for _ in segment.ids:
            yield None if segment.logprobs is None else next(values, None)


def _farthest(values: Sequence[float | None]) -> dict[str, Any] | None:
    """The value that is farthest from 0, and its token; None without any."""
    known = ((abs(value), place) for place, value in enumerate(values) if value is not None)
    place = max(known, key=lambda each: each[0], default=(0.0, None))[1]
    return None if place is None else {"token": place, "value": values[place]}


def _is_stale(span: VersionSpan, version: int | None, max_lag: int | None) -> bool:
    return version is not None and max_lag is not None and version - span.policy.number > max_lag


def _rows(segments: Sequence[Segment]) -> Iterator[tuple[float | None, VersionSpan | None, bool]]:
    for segment in segments:
        if segment.logprobs is None:
            yield from [(None, None, False)] * len(segment.ids)
            continue
        spans = (span for span in segment.spans for _ in range(span.end - span.start))
        for place, (logprob, span) in enumerate(zip(segment.logprobs, spans, strict=True)):
            yield logprob, span, segment.is_trained(place)
