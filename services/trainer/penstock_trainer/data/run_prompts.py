"""The prompts of a run: its training prompts and its held-out prompts, as tokens or as the rows of episodes.

Owns the checks that need the model's tokenizer and no more: a prompt that is too long fails before a model loads.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from penstock.config import Config
from penstock.contracts import Sampling
from penstock.contracts.ledger import RunRecord
from penstock.engine_limits import longest_sequence
from penstock.errors import ConfigError
from penstock_trainer.data.chat import Chats
from penstock_trainer.data.datasets import source_of
from penstock_trainer.data.draw_order import DrawOrder
from penstock_trainer.data.draws import draw_order, stop_token_ids
from penstock_trainer.data.prompts import (
    EncodedPrompt,
    TooLong,
    digest,
    encode_rows,
    episode_rows,
    require_batch,
    require_embeddings,
    require_room,
    require_some_left,
    shared_prompts,
    too_long,
)
from penstock_trainer.data.rows import Row
from penstock_trainer.data.tokenizer import Vocabulary, load_vocabulary

log = logging.getLogger(__name__)

EVAL = "data.eval"
Pair = tuple[Row, EncodedPrompt]


@dataclass(frozen=True)
class Prompts:
    """The training and held-out prompts of a run; stop_token_ids and stop end a completion, or a turn of an episode.

    first_ids: tokens of the first training prompt. tokenizer: that they were made with. too_long: prompts that were
    left out, by set (data.too_long).
    """

    train: list[EncodedPrompt]
    held_out: list[EncodedPrompt]
    stop_token_ids: tuple[int, ...]
    first_ids: Sequence[int]
    tokenizer: Any
    stop: tuple[str, ...] = ()
    too_long: tuple[TooLong, ...] = ()

    def sampling(self, config: Config) -> Sampling:
        """How training completions are drawn."""
        section = config.sampling
        return Sampling(
            section.temperature, section.max_new_tokens, self.stop_token_ids, self.stop, ignore_eos=section.ignore_eos
        )

    def eval_sampling(self, config: Config) -> Sampling:
        """How those of held-out prompts are drawn; they end as in training."""
        section = config.eval
        return msgspec.structs.replace(
            self.sampling(config),
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
        )

    @cached_property
    def shared(self) -> list[EncodedPrompt]:
        """The held-out prompts that are training prompts too."""
        return shared_prompts(self.held_out, self.train)

    def warn(self) -> None:
        """Log a warning of prompts that are left out, and of held-out prompts that are training prompts too."""
        if self.too_long:
            log.warning(
                "prompts that are too long are left out (data.too_long): %s; the longest has %d tokens",
                ", ".join(map(str, self.too_long)),
                max(each.longest for each in self.too_long),
            )
        if self.shared:
            log.warning(
                "%d of the %d prompts of data.eval are among the training prompts (the first: %r): their accuracy "
                "proves little about other prompts; give data.eval another split, path or seed",
                len(self.shared),
                len(self.held_out),
                self.shared[0].text[-80:],
            )

    @cached_property
    def digest(self) -> str:
        """The digest of the training prompts."""
        return digest(self.train)

    def run_record(self, config: Config) -> RunRecord:
        """The record that begins a run, but for its model."""
        actor, order = config.actor, self.order(config)
        return RunRecord(
            self.digest,
            len(self.train),
            config.data.batch_size,
            actor.group_size,
            config.run.seed,
            model_path=actor.path,
            lora=actor.lora.described,
            draws="; ".join(filter(None, [order.described, config.data.curriculum.described])),
            set_sizes={each.name: each.size for each in order.sets} if len(order.sets) > 1 else {},
        )

    def order(self, config: Config) -> DrawOrder:
        """The order in which the training prompts are drawn."""
        return draw_order([prompt.dataset for prompt in self.train], config)


def encode_prompts(config: Config, train_rows: list[Row], held_out_rows: list[Row]) -> Prompts:
    """The rows as tokens; DataError for rows that cannot be prompts of this run."""
    vocabulary = load_vocabulary(config.actor.path)
    make = _episode_prompts if config.agent.enabled else _token_prompts
    return make(config, vocabulary, train_rows, held_out_rows)


def _token_prompts(config: Config, vocabulary: Vocabulary, train_rows: list[Row], held_out_rows: list[Row]) -> Prompts:
    longest = _longest(config, vocabulary) - config.sampling.max_new_tokens
    chats = Chats(vocabulary.tokenizer, config.data)
    train = encode_rows(train_rows, vocabulary.tokenizer, chats.of)
    require_batch(train, config.data.batch_size, source_of(config.data))
    held_out = encode_rows(held_out_rows, vocabulary.tokenizer, chats.of)
    chats.require_used()
    pairs = _by_key(config, list(zip(train_rows, train, strict=True)), list(zip(held_out_rows, held_out, strict=True)))
    dropped: tuple[TooLong, ...] = ()
    if config.data.too_long == "error":
        require_room(pairs, longest)
    else:
        dropped = tuple(each for key in pairs if (each := too_long(key, pairs[key], longest)))
        require_some_left(dropped, longest)
        pairs = {key: [pair for pair in pairs[key] if len(pair[1].token_ids) <= longest] for key in pairs}
    for of_set in pairs.values():
        require_embeddings([row for row, _ in of_set], [prompt for _, prompt in of_set], vocabulary.size)
    held_out = [prompt for _, prompt in pairs.pop(EVAL)]
    train = [prompt for of_set in pairs.values() for _, prompt in of_set]
    note = f", without {sum(each.count for each in dropped if each.key != EVAL)} that are too long," if dropped else ""
    require_batch(train, config.data.batch_size, source_of(config.data), note)
    ends = () if config.sampling.ignore_eos else stop_token_ids(vocabulary.tokenizer, (), vocabulary.end_of_text_ids)
    return Prompts(
        train, held_out, ends, tuple(train[0].token_ids), vocabulary.tokenizer, config.sampling.stop, dropped
    )


def _by_key(config: Config, train: list[Pair], held_out: list[Pair]) -> dict[str, list[Pair]]:
    """The prompts by the key of their set, training sets first, in their order."""
    sets = config.data.training_sets
    return {
        **{each.key: [pair for pair in train if pair[0].dataset == each.name] for each in sets},
        EVAL: held_out,
    }


def _episode_prompts(
    config: Config, vocabulary: Vocabulary, train_rows: list[Row], held_out_rows: list[Row]
) -> Prompts:
    """No template is applied here: the agent service renders messages, and no token is known before."""
    longest = _longest(config, vocabulary)
    if config.agent.max_tokens > longest:
        raise ConfigError(
            f"agent.max_tokens is {config.agent.max_tokens}: expected at most {longest}, the longest sequence that "
            "engines generate to its end; lower it, or raise rollout.engine.context_length or "
            "rollout.engine.max_total_tokens"
        )
    stop = stop_token_ids(vocabulary.tokenizer, config.sampling.stop, vocabulary.end_of_text_ids)
    train = episode_rows(train_rows, config.data.system_prompt_of)
    require_batch(train, config.data.batch_size, source_of(config.data))
    held_out = episode_rows(held_out_rows, config.data.system_prompt_of)
    ids = vocabulary.tokenizer.encode(train[0].text, add_special_tokens=False)
    known = tuple(each for each in ids if each < vocabulary.size)
    return Prompts(train, held_out, stop, known or stop or (0,), vocabulary.tokenizer)


def _longest(config: Config, vocabulary: Vocabulary) -> int:
    engine = config.rollout.engine
    return longest_sequence(engine.context_length or vocabulary.context_length, engine.max_total_tokens or None)
