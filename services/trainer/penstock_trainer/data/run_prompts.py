"""The prompts of a run: its training prompts and its held-out prompts, as tokens or as the rows of episodes.

Owns the checks that need the model's tokenizer and no more: a prompt that is too long fails before a model loads.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from penstock.config import Config, HeldOutSet
from penstock.contracts import Sampling
from penstock.contracts.ledger import RunRecord
from penstock.engine_limits import longest_sequence
from penstock.errors import ConfigError
from penstock_trainer.data.chat import Chat
from penstock_trainer.data.draws import stop_token_ids
from penstock_trainer.data.prompts import (
    EncodedPrompt,
    digest,
    encode_rows,
    episode_rows,
    require_batch,
    require_embeddings,
    require_room,
    shared_prompts,
)
from penstock_trainer.data.rows import Row
from penstock_trainer.data.tokenizer import Vocabulary, check_teacher, load_vocabulary

log = logging.getLogger(__name__)

MOST_NEW_TOKENS = "sampling.max_new_tokens"


@dataclass(frozen=True)
class Prompts:
    """The training and held-out prompts of a run; stop_token_ids and stop end a completion, or a turn of an episode.

    held_out: by name of the set, the main one first. first_ids: tokens of the first training prompt. tokenizer: that
    they were made with.
    """

    train: list[EncodedPrompt]
    held_out: dict[str, list[EncodedPrompt]]
    stop_token_ids: tuple[int, ...]
    first_ids: tuple[int, ...]
    tokenizer: Any
    stop: tuple[str, ...] = ()

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

    def warn_of_shared(self, config: Config) -> None:
        """Log a warning for each set whose prompts are training prompts too."""
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
        actor = config.actor
        return RunRecord(
            self.digest,
            len(self.train),
            config.data.batch_size,
            actor.group_size,
            config.run.seed,
            model_path=actor.path,
            lora=actor.lora.described,
        )


def encode_prompts(config: Config, train_rows: list[Row], held_out_rows: Mapping[str, list[Row]]) -> Prompts:
    """The rows as tokens, held-out ones by set.

    DataError for rows that cannot be prompts of this run, ConfigError for another model's teacher.
    """
    vocabulary = load_vocabulary(config.actor.path)
    if config.teacher.path:
        check_teacher(config.teacher.path, config.actor.path, vocabulary, _longest_of_run(config, vocabulary))
    make = _episode_prompts if config.agent.enabled else _token_prompts
    return make(config, vocabulary, train_rows, held_out_rows)


def _token_prompts(
    config: Config, vocabulary: Vocabulary, train_rows: list[Row], held_out_rows: Mapping[str, list[Row]]
) -> Prompts:
    tokenizer = vocabulary.tokenizer
    chat = Chat.of_run(tokenizer, config.data)
    train = encode_rows(train_rows, tokenizer, chat)
    require_batch(train, config.data.batch_size, config.data.train.path)
    held_out = {}
    for each in _sets_of(config, held_out_rows):
        own = chat.with_prompts(each.system_prompt, each.prompt_template)
        held_out[each.name] = encode_rows(held_out_rows[each.name], tokenizer, own)
        chat.note_use(own)
    chat.require_used()
    _require_room(config, _longest(config, vocabulary), train_rows, train, held_out_rows, held_out)
    require_embeddings(train_rows, train, vocabulary.size)
    for name, encoded in held_out.items():
        require_embeddings(held_out_rows[name], encoded, vocabulary.size)
    ends = () if config.sampling.ignore_eos else stop_token_ids(vocabulary.tokenizer, (), vocabulary.end_of_text_ids)
    return Prompts(train, held_out, ends, train[0].token_ids, vocabulary.tokenizer, config.sampling.stop)


def _sets_of(config: Config, rows: Mapping[str, list[Row]]) -> list[HeldOutSet]:
    """Those that there are rows of."""
    return [each for each in config.held_out_sets if each.name in rows]


def _require_room(
    config: Config,
    longest: int,
    train_rows: list[Row],
    train: list[EncodedPrompt],
    held_out_rows: Mapping[str, list[Row]],
    held_out: Mapping[str, list[EncodedPrompt]],
) -> None:
    """DataError if prompts leave no room for the longest completion of their set."""
    most = config.sampling.max_new_tokens
    pairs = {MOST_NEW_TOKENS: {"data.train": list(zip(train_rows, train, strict=True))}}
    limits = {MOST_NEW_TOKENS: most}
    for each in _sets_of(config, held_out_rows):
        own = each.sampling.max_new_tokens
        key = f"{each.sampling_key}.max_new_tokens" if own else MOST_NEW_TOKENS
        limits[key] = own or most
        rows, encoded = held_out_rows[each.name], held_out[each.name]
        pairs.setdefault(key, {})[each.key] = list(zip(rows, encoded, strict=True))
    for key, sets in pairs.items():
        require_room(sets, longest - limits[key], key)


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
    train = episode_rows(train_rows, config.data.system_prompt)
    require_batch(train, config.data.batch_size, config.data.train.path)
    held_out = {
        each.name: episode_rows(held_out_rows[each.name], each.system_prompt)
        for each in _sets_of(config, held_out_rows)
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
