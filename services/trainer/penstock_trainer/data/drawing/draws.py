"""Ticket number -> ticket: its prompt, its seeds and its sampling parameters.

Owns the meaning of a ticket number, which never changes within a run: any ticket can be made again at any time.
`draw_order` has the order of the prompts, `curriculum` the draws by success rates.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.config import Config
from penstock.contracts import Sampling, ScoredGroup, Ticket
from penstock.contracts.ledger import DropRecord, LedgerState, Outcome, StepRecord
from penstock.errors import ConfigError
from penstock.seeds import sampling_seed
from penstock_trainer.data.drawing.curriculum import Curriculum, outcomes_of
from penstock_trainer.data.drawing.draw_order import DrawOrder, sets_of
from penstock_trainer.data.prompt_table import set_sizes
from penstock_trainer.data.prompts import EncodedPrompt


def draw_order(sizes: Mapping[str, int], config: Config) -> DrawOrder:
    """The order in which a run draws prompts. sizes: of the sets, by their names."""
    weights = {each.name: each.section.weight for each in config.data.training_sets}
    return DrawOrder(config.run.seed, sets_of(sizes, weights), shuffle=config.data.shuffle)


class Draws:
    """Training draws, in the run's order."""

    def __init__(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, config: Config) -> None:
        self._prompts = prompts
        self._sampling = sampling
        self._seed = config.run.seed
        self._group_size = config.actor.group_size
        self._environment = config.agent.name
        self.order = draw_order(set_sizes(prompts), config)
        section = config.data.curriculum
        self._curriculum = (
            None
            if section.priority == "none"
            else Curriculum(self.order, config.run.seed, section, config.data.batch_size)
        )
        self.num_draws = config.total_train_epochs * len(prompts)

    def ticket(self, number: int, *, attempt: int, policy_version: int) -> Ticket:
        """Ticket `number`; equal arguments give an equal ticket."""
        prompt = self._prompts[self._row(number)]
        seeds = tuple(sampling_seed(self._seed, number, index) for index in range(self._group_size))
        return Ticket(
            purpose="train",
            number=number,
            attempt=attempt,
            policy_version=policy_version,
            prompt=prompt.text,
            prompt_ids=prompt.packed_ids,
            seeds=seeds,
            sampling=self._sampling,
            answer=prompt.answer,
            reward=prompt.reward,
            metadata=dict(prompt.metadata),
            environment=self._environment,
        )

    def _row(self, number: int) -> int:
        return self.order.row(number) if self._curriculum is None else self._curriculum.row(number)

    def set_of(self, number: int) -> str:
        """The name of the set that a ticket draws from; "" if the run has one."""
        return self.order.sets[self.order.set_of(number)].name

    @property
    def delay(self) -> int | None:
        """A draw depends on the steps that end this many tickets before it, or earlier; None: on none."""
        return None if self._curriculum is None else self._curriculum.delay

    # What a curriculum learns from the ledger; without one, nothing.

    @property
    def needs_all_steps(self) -> bool:
        """Whether draws depend on all steps before, those in the archive too."""
        return self._curriculum is not None

    def restore(self, ledger: LedgerState, next_number: int) -> None:
        """Start from a ledger with all its records. DataError if it does not fit the draws. Blocking."""
        if self._curriculum is not None:
            self._curriculum.restore(ledger.steps, outcomes_of(ledger), next_number)

    def outcomes(self, groups: Iterable[ScoredGroup]) -> tuple[Outcome, ...]:
        """What the tickets of a step come to, for its record."""
        if self._curriculum is None:
            return ()
        return tuple(self._curriculum.outcome(each.group.ticket.number, each) for each in groups)

    def with_outcome(self, record: DropRecord, group: ScoredGroup | None) -> DropRecord:
        """The record of a dropped ticket with its set and what it came to. group: what came of it, if anything."""
        outcome = None if self._curriculum is None else self._curriculum.outcome(record.ticket, group)
        return msgspec.structs.replace(record, dataset=self.set_of(record.ticket), outcome=outcome)

    def dropped(self, record: DropRecord) -> None:
        """A dropped ticket is in the ledger."""
        if self._curriculum is not None and record.outcome is not None:
            self._curriculum.dropped(record.ticket, record.outcome)

    def committed(self, record: StepRecord) -> None:
        """A step is in the ledger."""
        if self._curriculum is not None:
            self._curriculum.committed(record)


def eval_ticket(
    prompt: EncodedPrompt, number: int, *, sampling: Sampling, policy_version: int, seed: int, environment: str = ""
) -> Ticket:
    """An evaluation draw: one completion or episode of a held-out prompt."""
    return Ticket(
        purpose="eval",
        number=number,
        attempt=0,
        policy_version=policy_version,
        prompt=prompt.text,
        prompt_ids=prompt.packed_ids,
        seeds=(sampling_seed(seed, number, 0),),
        sampling=sampling,
        answer=prompt.answer,
        reward=prompt.reward,
        metadata=dict(prompt.metadata),
        environment=environment,
    )


def stop_token_ids(tokenizer: Any, stop: Sequence[str], end_of_text: Sequence[int]) -> tuple[int, ...]:
    """Token ids that end a completion, or a turn of an episode; ConfigError for a string that is not exactly one."""
    found = {tokenizer.eos_token_id, *end_of_text} - {None}
    for text in stop:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1 or tokenizer.decode(ids) != text:
            raise ConfigError(
                f"sampling.stop holds {text!r}, which is {len(ids)} tokens of this model ({ids}); expected strings "
                "that are exactly one token: a turn of an episode ends at a token. Completions, without "
                "agent.environment and agent.command, end at strings of any length"
            )
        found.add(ids[0])
    return tuple(sorted(found))
