"""Completions of a training step as lines for people to read.

Owns how recorded tokens become text again: the messages of training groups have none. Invariant: no text is longer than
the limits here, however long a completion is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from penstock.contracts import Episode, Node, ScoredGroup, Trajectory, unpack_int32
from penstock.contracts.outcomes import failure_of, rewards_of, values_by_function
from penstock.readable import cut, question_of
from penstock.records.samples import DroppedLine, SampleLine
from penstock.stop_strings import before_stop
from penstock_trainer.batching.counts import CompletionIndex
from penstock_trainer.batching.shown import choose_shown

PROMPT_CHARACTERS = 2000  # a page: a line of the file stays small, and 8 of a step below 64 kB
COMPLETION_CHARACTERS = 4000
TURN_CHARACTERS = 1000  # so that the last turns of an episode are shown, too
MODEL_ROLES = frozenset({"assistant", "model"})  # by which templates open the model's turn


class Tokenizer(Protocol):
    """The parts of a transformers tokenizer that are used."""

    added_tokens_decoder: dict[int, Any]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class SampleWriter:
    """Makes the lines of a step."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        most: int,
        skip_special_tokens: bool,
    ) -> None:
        """`most`: lines of a step. `skip_special_tokens`: as in the texts that reward functions read."""
        self._tokenizer = tokenizer
        self._ends = frozenset(stop_token_ids)
        self._stop = stop
        self._most = most
        self._skip_special_tokens = skip_special_tokens
        self._special = frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)

    def lines(
        self, step: int, groups: Sequence[ScoredGroup], advantages: Mapping[CompletionIndex, float]
    ) -> list[SampleLine]:
        """Those of the completions that `choose_shown` names, in its order."""
        return [
            self._line(step, groups[index.group], index.completion, advantages.get(index))
            for index in choose_shown(groups, self._most)
        ]

    def dropped(self, step: int, group: ScoredGroup, reason: str) -> list[DroppedLine]:
        """Those of the completions without a reward of a group that is dropped while `step` collects its batch."""
        failed = [index for index, reward in enumerate(rewards_of(group)) if reward is None]
        lines = [self._line(step, group, index, None) for index in failed[: self._most]]
        return [DroppedLine(**msgspec.structs.asdict(line), dropped=reason) for line in lines]

    def _line(self, step: int, group: ScoredGroup, index: int, advantage: float | None) -> SampleLine:
        ticket = group.group.ticket
        trajectory = group.group.trajectories[index]
        return SampleLine(
            step=step,
            version=trajectory.oldest_version,
            ticket=ticket.number,
            index=index,
            prompt=cut(question_of(ticket.prompt), PROMPT_CHARACTERS),
            completion=cut(self.text(trajectory), COMPLETION_CHARACTERS),
            answer=cut(ticket.answer, PROMPT_CHARACTERS),
            reward=rewards_of(group)[index],
            rewards=values_by_function(group)[index],
            failure=cut(failure_of(trajectory, group.scores[index]), PROMPT_CHARACTERS),
            advantage=advantage,
            num_tokens=trajectory.num_tokens,
            truncated=trajectory.is_truncated,
        )

    def text(self, trajectory: Trajectory) -> str:
        """What reward functions read of a completion; of an episode its turns, each with the role of its message."""
        if not isinstance(trajectory, Episode):
            return self._sampled(trajectory.token_ids)
        turns = [(node.role, self._turn(node)) for node in _conversation(trajectory)]
        return "\n".join(f"[{role}] {cut(text, TURN_CHARACTERS)}" for role, text in turns if text)

    def _turn(self, node: Node) -> str:
        return self._sampled(node.token_ids) if node.is_sampled else self._context(node)

    def _sampled(self, packed: bytes) -> str:
        ids = unpack_int32(packed)
        if ids and ids[-1] in self._ends:
            del ids[-1]
        return before_stop(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens), self._stop)

    def _context(self, node: Node) -> str:
        """The text of messages, without the layout of the template: special tokens, and the roles that follow them."""
        pieces: list[list[int]] = [[]]
        for token_id in unpack_int32(node.token_ids):
            if token_id in self._special:
                pieces.append([])
            else:
                pieces[-1].append(token_id)
        texts = [self._tokenizer.decode(piece, skip_special_tokens=False).strip() for piece in pieces]
        return "\n".join(text for each in texts if (text := _without_role(each, {node.role, *MODEL_ROLES})))


def _without_role(text: str, roles: set[str]) -> str:
    first, _, rest = text.partition("\n")
    return rest.strip() if first.strip() in roles else text


def _conversation(episode: Episode) -> list[Node]:
    """The nodes behind the first prompt, up to the last turn that is trained."""
    last = max((number for number, node in enumerate(episode.nodes) if node.is_trained), default=-1)
    path = [episode.nodes[number] for number in episode.path(last)]
    first = next((place for place, node in enumerate(path) if node.is_sampled), 0)
    return path[first:]
