"""The prompts of a run: its training prompts and its held-out prompts, as tokens or as the rows of episodes.

Owns the checks that need the model's tokenizer and no more: a prompt that is too long fails before a model loads.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from penstock.config import Config, HeldOutSet
from penstock.contracts import Sampling
from penstock.contracts.ledger import RunRecord
from penstock.engine_limits import longest_sequence
from penstock.errors import ConfigError
from penstock_trainer.data.chat import Chat, Chats
from penstock_trainer.data.datasets import source_of
from penstock_trainer.data.drawing.draw_order import DrawOrder
from penstock_trainer.data.drawing.draws import draw_order, stop_token_ids
from penstock_trainer.data.prompt_lengths import SetLengths, TooLong
from penstock_trainer.data.prompt_table import PromptTable, PromptTables, set_sizes
from penstock_trainer.data.prompts import (
    EncodedPrompt,
    digest,
    encode_row,
    episode_row,
    episode_rows,
    require_batch,
    require_embedding,
)
from penstock_trainer.data.rows import Row
from penstock_trainer.data.shared_prompts import shared_prompts
from penstock_trainer.data.teacher_servers import check_servers
from penstock_trainer.data.tokenizer import Vocabulary, check_teacher, load_vocabulary, token_texts
from penstock_trainer.data.training import Limits, Training

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Prompts:
    """The training and held-out prompts of a run; stop_token_ids and stop end a completion, or a turn of an episode.

    train: in memory, or a `PromptTable`.
    held_out: by name of the set, the main one first. first_ids: tokens of the first training prompt. tokenizer: that
    they were made with. too_long: prompts that were left out, by set (data.too_long).
    """

    train: Sequence[EncodedPrompt]
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
        return self.train.contents.digest if isinstance(self.train, PromptTable) else digest(self.train)

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
        return draw_order(set_sizes(self.train), config)


def encode_prompts(
    config: Config,
    train_rows: Iterable[Row],
    held_out_rows: Mapping[str, list[Row]],
    tables: PromptTables | None = None,
    *,
    has_begun: bool = False,
) -> Prompts:
    """The rows as tokens, held-out ones by set.

    tables: where the training prompts are kept, and are found if they were made before; then the rows are not looked
    at. None: in memory.

    DataError for rows that cannot be prompts of this run, ConfigError for another model's teacher, or for
    one whose servers do not answer, unless the run has begun.
    """
    vocabulary = load_vocabulary(config.actor.path)
    teacher, longest = config.teacher, _longest_of_run(config, vocabulary)
    if teacher.path:
        check_teacher(teacher.path, config.actor.path, vocabulary, longest)
    if teacher.urls:
        texts = token_texts(vocabulary)
        check_servers(teacher.urls, config.actor.path, texts, vocabulary.size, longest, has_begun=has_begun)
    make = _episode_prompts if config.agent.enabled else _token_prompts
    return make(config, vocabulary, train_rows, held_out_rows, tables)


def _token_prompts(
    config: Config,
    vocabulary: Vocabulary,
    train_rows: Iterable[Row],
    held_out_rows: Mapping[str, list[Row]],
    tables: PromptTables | None,
) -> Prompts:
    data, tokenizer = config.data, vocabulary.tokenizer
    chats, limits = Chats(tokenizer, data), Limits(config, _longest(config, vocabulary))

    def encode(row: Row) -> EncodedPrompt:
        return encode_row(row, tokenizer, chats.of(row.dataset))

    train, lengths = Training(config, vocabulary, limits, encode, chats).read(train_rows, tables)
    num_rows = sum(each.num_prompts for each in lengths)
    require_batch(num_rows, data.batch_size, source_of(data))
    held_out: dict[str, list[EncodedPrompt]] = {}
    for each in config.held_out_sets:
        if each.name in held_out_rows:
            chat, of_set = chats.of_held_out(each.system_prompt, each.prompt_template), limits.of(each.key)
            held_out[each.name] = _fitting(held_out_rows[each.name], chat, vocabulary, of_set)
            lengths.append(of_set)
    chats.require_used()
    limits.require(lengths)
    note = f", without {num_rows - len(train)} that are too long," if any(each.count for each in lengths) else ""
    require_batch(len(train), data.batch_size, source_of(data), note)
    ends = () if config.sampling.ignore_eos else stop_token_ids(tokenizer, (), vocabulary.end_of_text_ids)
    dropped = tuple(too_long for each in lengths if (too_long := each.too_long))
    return Prompts(train, held_out, ends, tuple(train[0].token_ids), tokenizer, config.sampling.stop, dropped)


def _fitting(rows: Sequence[Row], chat: Chat, vocabulary: Vocabulary, lengths: SetLengths) -> list[EncodedPrompt]:
    """The prompts of a held-out set that fit; all are counted."""
    found = []
    for row in rows:
        prompt = encode_row(row, vocabulary.tokenizer, chat)
        if lengths.add(row.place, len(prompt.token_ids)):
            require_embedding(row, prompt, vocabulary.size)
            found.append(prompt)
    return found


def _always(value: T) -> Callable[[str], T]:
    return lambda name: value


def _episode_prompts(
    config: Config,
    vocabulary: Vocabulary,
    train_rows: Iterable[Row],
    held_out_rows: Mapping[str, list[Row]],
    tables: PromptTables | None,
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
    data = config.data

    def encode(row: Row) -> EncodedPrompt:
        return episode_row(row, data.system_prompt_of(row.dataset))

    train, _ = Training(config, vocabulary, Limits(config, longest), encode).read(train_rows, tables)
    require_batch(len(train), data.batch_size, source_of(data))
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
