"""Ticket number -> ticket: its prompt, its seeds and its sampling parameters.

Owns the meaning of a ticket number, which never changes within a run: any ticket can be made again at any time.
"""

from collections.abc import Sequence
from typing import Any

from penstock.config import Config
from penstock.contracts import Sampling, Ticket, pack_int32
from penstock.errors import ConfigError
from penstock.seeds import permutation, sampling_seed
from penstock_trainer.data.prompts import EncodedPrompt


class Draws:
    """Training draws: epoch e visits the prompts in the order of `permutation(seed, e)`."""

    def __init__(self, prompts: Sequence[EncodedPrompt], sampling: Sampling, config: Config) -> None:
        self._prompts = prompts
        self._sampling = sampling
        self._seed = config.run.seed
        self._group_size = config.actor.group_size
        self._environment = config.agent.name
        self._epoch = -1
        self._order: list[int] = []
        self.num_draws = config.total_train_epochs * len(prompts)

    def ticket(self, number: int, *, attempt: int, policy_version: int) -> Ticket:
        """Ticket `number`; equal arguments give an equal ticket."""
        epoch, position = divmod(number, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._seed, epoch, len(self._prompts))
        prompt = self._prompts[self._order[position]]
        seeds = tuple(sampling_seed(self._seed, number, index) for index in range(self._group_size))
        return Ticket(
            purpose="train",
            number=number,
            attempt=attempt,
            policy_version=policy_version,
            prompt=prompt.text,
            prompt_ids=pack_int32(prompt.token_ids),
            seeds=seeds,
            sampling=self._sampling,
            answer=prompt.answer,
            reward=prompt.reward,
            metadata=dict(prompt.metadata),
            environment=self._environment,
        )


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
        prompt_ids=pack_int32(prompt.token_ids),
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
