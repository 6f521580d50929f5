"""The prompts of a run: its training prompts and its held-out prompts, as tokens or as the rows of episodes.

Owns the checks that need the model's tokenizer and no more: a prompt that is too long fails before a model loads.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from penstock.config import Config, HeldOutSet
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
from penstock_trainer.data.teacher_servers import check_servers
from penstock_trainer.data.tokenizer import Vocabulary, check_teacher, load_vocabulary, token_texts

log = logging.getLogger(__name__)

T = TypeVar("T")
MOST_NEW_TOKENS = "sampling.max_new_tokens"
Pair = tuple[Row, EncodedPrompt]
Pairs = dict[str, list[Pair]]
"""By the key of a set's section."""


@dataclass(frozen=True)
class Prompts:
    """The training and held-out prompts of a run; stop_token_ids and stop end a completion, or a turn of an episode.

    held_out: by name of the set, the main one first. first_ids: tokens of the first training prompt. tokenizer: that
    they were made with. too_long: prompts that were left out, by set (data.too_long).
    """

    train: list[EncodedPrompt]
    held_out: dict[str, list[EncodedPrompt]]
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

    def eval_sampling(self, config: Config, held_out: HeldOutSet) -> Sampling:
        """How those of a held-out set are drawn; they end as in training but for length and strings of their own."""
        section, training = held_out.sampling, self.sampling(config)
        return msgspec.structs.replace(
            training,
            temperature=section.temperature,
            max_new_tokens=section.max_new_tokens or training.max_new_tokens,
            stop=training.stop if section.stop is None else section.stop,
            top_p=section.top_p,
            top_k=section.top_k,
            min_p=section.min_p,
            repetition_penalty=section.repetition_penalty,
        )

    @cached_property
    def shared(self) -> dict[str, list[EncodedPrompt]]:
        """By set, the held-out prompts that are training prompts too."""
        return {name: shared_prompts(prompts, self.train) for name, prompts in self.held_out.items()}

    def warn(self, config: Config) -> None:
        """Log a warning of prompts that are left out, and of held-out prompts that are training prompts, too."""
        if self.too_long:
            log.warning(
                "prompts that are too long are left out (data.too_long): %s; the longest has %d tokens",
                ", ".join(map(str, self.too_long)),
                max(each.longest for each in self.too_long),
            )
        for each in config.held_out_sets:
            if shared := self.shared[each.name]:
                log.warning(
                    "%d of the %d prompts of %s are among the training prompts (the first: %r): their accuracy "
                    "proves little about other prompts; give %s another split, path or seed",
                    len(shared),
                    len(self.held_out[each.name]),
                    each.key,
                    shared[0].text[-80:],
                    each.key,
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


def encode_prompts(config: Config, train_rows: list[Row], held_out_rows: Mapping[str, list[Row]]) -> Prompts:
    """The rows as tokens, held-out ones by set.

    DataError for rows that cannot be prompts of this run, ConfigError for another model's teacher, or for
    one whose servers do not answer.
    """
    vocabulary = load_vocabulary(config.actor.path)
    teacher, longest = config.teacher, _longest_of_run(config, vocabulary)
    if teacher.path:
        check_teacher(teacher.path, config.actor.path, vocabulary, longest)
    if teacher.urls:
        check_servers(teacher.urls, config.actor.path, token_texts(vocabulary), vocabulary.size, longest)
    make = _episode_prompts if config.agent.enabled else _token_prompts
    return make(config, vocabulary, train_rows, held_out_rows)


def _token_prompts(
    config: Config, vocabulary: Vocabulary, train_rows: list[Row], held_out_rows: Mapping[str, list[Row]]
) -> Prompts:
    data, tokenizer = config.data, vocabulary.tokenizer
    chats = Chats(tokenizer, data)
    train = encode_rows(train_rows, tokenizer, chats.of)
    require_batch(train, data.batch_size, source_of(data))
    pairs = _by_key(config, list(zip(train_rows, train, strict=True)))
    held_out_sets = [each for each in config.held_out_sets if each.name in held_out_rows]
    for each in held_out_sets:
        rows, chat = held_out_rows[each.name], chats.of_held_out(each.system_prompt, each.prompt_template)
        pairs[each.key] = list(zip(rows, encode_rows(rows, tokenizer, _always(chat)), strict=True))
    chats.require_used()
    pairs, dropped = _with_room(config, pairs, _longest(config, vocabulary))
    for of_set in pairs.values():
        require_embeddings([row for row, _ in of_set], [prompt for _, prompt in of_set], vocabulary.size)
    train = [prompt for each in data.training_sets for _, prompt in pairs[each.key]]
    num_dropped = sum(each.count for each in dropped if each.key not in {held_out.key for held_out in held_out_sets})
    note = f", without {num_dropped} that are too long," if dropped else ""
    require_batch(train, data.batch_size, source_of(data), note)
    ends = () if config.sampling.ignore_eos else stop_token_ids(tokenizer, (), vocabulary.end_of_text_ids)
    held_out = {each.name: [prompt for _, prompt in pairs[each.key]] for each in held_out_sets}
    return Prompts(train, held_out, ends, tuple(train[0].token_ids), tokenizer, config.sampling.stop, dropped)


def _always(value: T) -> Callable[[str], T]:
    """The value of a held-out set, whose rows name no set."""
    return lambda name: value


def _by_key(config: Config, train: list[Pair]) -> Pairs:
    """The training prompts by the key of their set, in its order."""
    return {each.key: [pair for pair in train if pair[0].dataset == each.name] for each in config.data.training_sets}


def _with_room(config: Config, pairs: Pairs, longest: int) -> tuple[Pairs, tuple[TooLong, ...]]:
    """The prompts that leave room for the longest completion of their set, and what was left out.

    longest: sequence of an engine, in tokens. DataError if there are others and data.too_long is error, or if all of a
    set are.
    """
    limits = dict.fromkeys(pairs, (MOST_NEW_TOKENS, config.sampling.max_new_tokens))
    for each in config.held_out_sets:
        if own := each.sampling.max_new_tokens:
            limits[each.key] = (f"{each.sampling_key}.max_new_tokens", own)
    if config.data.too_long == "error":
        for limit in dict.fromkeys(limits.values()):
            alike = {key: of_set for key, of_set in pairs.items() if limits[key] == limit}
            require_room(alike, longest - limit[1], limit[0])
        return pairs, ()
    dropped: list[TooLong] = []
    left: Pairs = {}
    for key, of_set in pairs.items():
        name, num_tokens = limits[key]
        if (found := too_long(key, of_set, longest - num_tokens)) is not None:
            require_some_left(found, longest - num_tokens, name)
            dropped.append(found)
        left[key] = [pair for pair in of_set if len(pair[1].token_ids) <= longest - num_tokens]
    return left, tuple(dropped)


def _episode_prompts(
    config: Config, vocabulary: Vocabulary, train_rows: list[Row], held_out_rows: Mapping[str, list[Row]]
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
    held_out = {
        each.name: episode_rows(held_out_rows[each.name], _always(each.system_prompt))
        for each in config.held_out_sets
        if each.name in held_out_rows
    }
    ids = vocabulary.tokenizer.encode(train[0].text, add_special_tokens=False)
    known = tuple(each for each in ids if each < vocabulary.size)
    return Prompts(train, held_out, stop, known or stop or (0,), vocabulary.tokenizer)


def _longest_of_run(config: Config, vocabulary: Vocabulary) -> int:
    longest = _longest(config, vocabulary)
    return min(longest, config.agent.max_tokens) if config.agent.enabled else longest


def _longest(config: Config, vocabulary: Vocabulary) -> int:
    engine = config.rollout.engine
    return longest_sequence(engine.context_length or vocabulary.context_length, engine.max_total_tokens or None)
