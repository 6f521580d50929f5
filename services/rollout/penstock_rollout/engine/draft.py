"""The completions of one prompt while they are generated, in pieces: an abort cuts a completion, the next request
continues it.

Invariant: each piece keeps the tokens, log-probabilities and versions that the engine gave it. So a token has the
version that sampled it, even if the engine reports only one version per answer. A completion is continued by a request
with the prompt plus the tokens so far, the remaining budget and the same seed; the weights that then serve compute its
key-value cache. A stop string whose tokens are in two pieces ends the completion, as it would have in one: the engine,
which looks only at what it sampled for a request, does not see it. Pure.

    tokens   7   END | ING | of  ...        stop string ENDING; the piece was cut at |
    kept     7   END | ING
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from penstock.contracts import Sampling
from penstock.contracts.trajectories import RoutedExperts
from penstock.errors import EngineError
from penstock.stop_strings import before_stop
from penstock_rollout.engine.types import Answer, AnsweredSpan, CompletionRequest, GroupAnswer


class Draft:
    """One completion per seed, from the first request to the last."""

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        one_version_per_answer: bool,
        with_experts: bool = False,
    ) -> None:
        """`one_version_per_answer`: if an answer has no spans, all its tokens are by the version that it names.

        `with_experts`: answers have the experts of their tokens.
        """
        self._prompt_ids = prompt_ids
        self._seeds = seeds
        self._sampling = sampling
        self._one_version = one_version_per_answer
        self._with_experts = with_experts
        self._pieces: list[list[Answer]] = [[] for _ in seeds]
        self._length: dict[int, int] = {}
        # A stop string has at most as many tokens as bytes.
        self._reach = max((len(each.encode()) for each in sampling.stop), default=0)

    @property
    def finished(self) -> bool:
        return not self._open()

    @property
    def was_cut(self) -> bool:
        """Whether any completion has several pieces. Their texts cannot simply be joined."""
        return any(len(pieces) > 1 for pieces in self._pieces)

    def requests(self) -> list[CompletionRequest]:
        """The requests still to send: full completions, or the unfinished parts."""
        made = {index: self._tokens(index) for index in self._open()}
        return [
            CompletionRequest(
                (*self._prompt_ids, *tokens),
                self._seeds[index],
                self._sampling.max_new_tokens - len(tokens),
                self._with_experts,
            )
            for index, tokens in made.items()
        ]

    def add(self, answers: GroupAnswer) -> None:
        """Add the answers to `requests`, in their order."""
        for index, answer in zip(self._open(), answers, strict=True):
            self._pieces[index].append(self._ended(index, self._with_spans(answer)))

    def seams(self) -> list[list[int]]:
        """The tokens around each cut, up to one more at a time, as the engine saw its stop strings grow. Of what is
        finished; nothing without stop strings.
        """
        return [tokens for _, _, tokens in self._seams()]

    def end_at_seams(self, texts: Sequence[str]) -> None:
        """End completions where a stop string was completed. `texts`: of `seams`, in their order."""
        for (index, end, _), text in zip(list(self._seams()), texts, strict=True):
            if any(each in text for each in self._sampling.stop):
                self._length.setdefault(index, end)

    def _seams(self) -> Iterator[tuple[int, int, list[int]]]:
        """Completion, number of its tokens up to the end of the window, and the window's tokens; in order."""
        for index, pieces in enumerate(self._pieces if self._reach else ()):
            tokens, cut = self._tokens(index), 0
            for piece in pieces[:-1]:
                cut += len(piece.token_ids)
                first = max(0, cut - self._reach)
                for end in range(max(cut, 1), min(cut + self._reach, len(tokens)) + 1):
                    yield index, end, list(tokens[first:end])

    def group(self, texts: Sequence[str] | None = None) -> GroupAnswer:
        """The full completions. `texts`: the texts of `shown_tokens`; needed if any completion was cut."""
        whole = tuple(_shortened(_joined(pieces), self._length.get(index)) for index, pieces in enumerate(self._pieces))
        if texts is None:
            return whole
        return tuple(
            replace(answer, text=before_stop(text, self._sampling.stop))
            for answer, text in zip(whole, texts, strict=True)
        )

    def shown_tokens(self) -> list[list[int]]:
        """For each completion, the tokens that its text shows, to the end of a stop string: all but a stop token."""
        return [list(each.token_ids[: -1 if self._ends_by_token(each) else None]) for each in self.group()]

    def _ends_by_token(self, answer: Answer) -> bool:
        """The engine has stop tokens of its own, too; with stop strings, they may be what ended it."""
        if answer.finish_reason != "stop":
            return False
        return not self._sampling.stop or answer.token_ids[-1] in self._sampling.stop_token_ids

    def _open(self) -> list[int]:
        return [i for i, pieces in enumerate(self._pieces) if not pieces or pieces[-1].finish_reason == "abort"]

    def _tokens(self, index: int) -> "array[int]":
        return _one_array("i", [piece.token_ids for piece in self._pieces[index]])

    def _ended(self, index: int, answer: Answer) -> Answer:
        """The answer, as finished if it is complete: an abort that came with its last token cut nothing."""
        if answer.finish_reason != "abort" or not answer.token_ids:
            return answer
        if answer.token_ids[-1] in self._sampling.stop_token_ids:
            return replace(answer, finish_reason="stop")
        num_tokens = len(self._tokens(index)) + len(answer.token_ids)
        return replace(answer, finish_reason="length") if num_tokens >= self._sampling.max_new_tokens else answer

    def _with_spans(self, answer: Answer) -> Answer:
        if answer.spans or not answer.token_ids:
            return answer
        if not self._one_version:
            raise EngineError(
                "the engine does not report which weights made which tokens; expected an engine that does, or "
                "weights.pause_mode abort, with which no answer spans two versions"
            )
        return replace(answer, spans=(AnsweredSpan(answer.weight_version, 0, len(answer.token_ids)),))


def _joined(pieces: Sequence[Answer]) -> Answer:
    """The pieces as one answer, which ends as the last piece did."""
    if len(pieces) == 1:
        return pieces[0]
    spans: list[AnsweredSpan] = []
    start = 0
    for piece in pieces:
        for span in piece.spans:
            begins_again = spans and spans[-1].weight_version == span.weight_version
            begin = spans.pop().start if begins_again else start + span.start
            spans.append(AnsweredSpan(span.weight_version, begin, start + span.end))
        start += len(piece.token_ids)
    return replace(
        pieces[-1],
        token_ids=_one_array("i", [piece.token_ids for piece in pieces]),
        logprobs=_one_array("f", [piece.logprobs for piece in pieces]),
        spans=tuple(span for span in spans if span.start < span.end),
        text="".join(piece.text for piece in pieces),
        num_cached_tokens=pieces[0].num_cached_tokens,  # the prompt of the others has tokens of this completion
        experts=_joined_experts(pieces),
    )


def _joined_experts(pieces: Sequence[Answer]) -> RoutedExperts | None:
    """Of the full sequence: each piece's own as far as it has them; the next one has those of all tokens before it."""
    joined: RoutedExperts | None = None
    for piece in pieces:
        if piece.experts is not None:
            joined = piece.experts if joined is None else joined.extended_by(piece.experts)
    return joined


def _shortened(answer: Answer, num_tokens: int | None) -> Answer:
    """Its first tokens, which a stop string ends; all without a number."""
    if num_tokens is None:
        return answer
    cut = len(answer.token_ids) - num_tokens
    experts = answer.experts
    if experts is not None:
        experts = experts.rows(0, max(0, experts.num_rows - cut))
    spans = (replace(each, end=min(each.end, num_tokens)) for each in answer.spans if each.start < num_tokens)
    return replace(
        answer,
        token_ids=answer.token_ids[:num_tokens],
        logprobs=answer.logprobs[:num_tokens],
        spans=tuple(spans),
        finish_reason="stop",
        experts=experts,
    )


def _one_array(code: str, parts: Iterable["array[Any]"]) -> "array[Any]":
    whole: array[Any] = array(code)
    for part in parts:
        whole += part
    return whole
