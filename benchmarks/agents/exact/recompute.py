"""The log-probabilities of episodes anew, by plain transformers, against those that were recorded.

Owns what is compared. Invariant: each sampled node is computed from all ids of its path, by the weights of the version
that each of its spans names. What neighbouring paths begin with in common is computed once, in the order of the paths.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.agents.exact.episodes import Made
from penstock.contracts import Episode, Node, unpack_float32, unpack_int32


@dataclass(frozen=True)
class SpanCheck:
    """One span: the largest difference of its log-probabilities, in nats; by other weights: None if not computed."""

    num_tokens: int
    difference: float
    by_others: float | None


@dataclass
class Findings:
    """What was found in the episodes of one case. num_split: of episodes and of turns, with tokens of two versions."""

    spans: list[SpanCheck] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    branches: Counter[str] = field(default_factory=Counter)
    num_episodes: int = 0
    num_split_episodes: int = 0
    num_paths: int = 0
    num_turns: int = 0
    num_split_turns: int = 0
    num_tool_calls: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0

    @property
    def differences(self) -> list[float]:
        """The largest of each span, in order."""
        return sorted(span.difference for span in self.spans)

    def count(self, episode: Episode) -> None:
        """Add an episode."""
        counts, sampled = episode.counts, [node for node in episode.nodes if node.is_sampled]
        self.num_episodes += 1
        self.num_split_episodes += len({span.policy for span in episode.spans}) > 1
        self.num_paths += len(episode.leaves)
        self.num_turns += len(sampled)
        self.num_split_turns += sum(len(node.spans) > 1 for node in sampled)
        self.num_tool_calls += counts.num_tool_calls
        self.num_prompt_tokens += counts.num_prompt_tokens
        self.num_cached_tokens += counts.num_cached_tokens
        self.branches.update(counts.branches)
        if episode.score.value is None:
            self.failures[episode.score.failure] += 1


@torch.no_grad()
def recompute(made: Made, models: Sequence[Any], temperature: float) -> Findings:
    """Compare all spans; those of the first group by the weights of another version too, as a control."""
    readers = [PathReader(model, temperature) for model in models]
    findings = Findings()
    for number, group in enumerate(made.groups):
        for episode in group.episodes:
            findings.count(episode)
            findings.spans += _compared(episode, made, readers, control=number == 0)
    return findings


def _compared(episode: Episode, made: Made, readers: "list[PathReader]", *, control: bool) -> Iterator[SpanCheck]:
    compared: set[int] = set()
    for leaf in episode.leaves:
        ids: list[int] = []
        turns: list[tuple[int, Node]] = []
        for index in episode.path(leaf):
            node = episode.nodes[index]
            if node.is_sampled and index not in compared:
                turns.append((len(ids), node))
                compared.add(index)
            ids += unpack_int32(node.token_ids)
        for start, node in reversed(turns):  # the last one first: it reads the full path at once
            assert node.logprobs is not None
            recorded = unpack_float32(node.logprobs)
            for span in reversed(node.spans):
                model = made.models[span.policy]
                ends = (start + span.start, start + span.end)
                said = recorded[span.start : span.end]
                other = readers[model - 1].logprobs(ids, *ends) if control and len(readers) > 1 else None
                yield SpanCheck(
                    num_tokens=span.end - span.start,
                    difference=_largest(said, readers[model].logprobs(ids, *ends)),
                    by_others=None if other is None else _largest(said, other),
                )


def _largest(said: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(said, expected, strict=True))


class PathReader:
    """One model over one path after another."""

    def __init__(self, model: Any, temperature: float) -> None:
        self._model = model
        self._temperature = temperature
        self._ids: list[int] = []
        self._states = torch.empty(0)
        self._cache = DynamicCache()

    def logprobs(self, ids: list[int], start: int, end: int) -> list[float]:
        """Of the tokens from `start` to `end` of a path, each after all tokens before it."""
        self._read(ids[: end - 1])
        logits = self._model.lm_head(self._states[start - 1 : end - 1])
        said = torch.log_softmax(logits.float() / self._temperature, -1)
        found: list[float] = said.gather(1, torch.tensor(ids[start:end])[:, None])[:, 0].tolist()
        return found

    def _read(self, ids: list[int]) -> None:
        """Have the states of at least these tokens, and of no others before them."""
        kept = _num_equal(self._ids, ids)
        if kept == len(ids):
            return
        if kept == 0:
            self._cache = DynamicCache()
        elif kept < len(self._ids):
            self._cache.crop(kept)
        new = torch.tensor([ids[kept:]])
        states = self._model.model(new, past_key_values=self._cache, use_cache=True).last_hidden_state[0]
        self._states = torch.cat([self._states[:kept], states]) if kept else states
        self._ids = ids


def _num_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others, strict=False)))
