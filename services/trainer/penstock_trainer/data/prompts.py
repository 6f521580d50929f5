"""Prompts as tokens; of episodes, which have none before they begin, as text and metadata.

Invariant: every prompt of completions has at least one token, and does not end a text; a bad row is a DataError that
names it. `require_...` check what needs all prompts of a run.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import xxhash

from penstock.errors import DataError
from penstock.plain_tokens import plain_token_ids
from penstock.readable import question_of
from penstock_trainer.data.chat import Chat, Tokenizer
from penstock_trainer.data.rows import Message, Row
from penstock_trainer.data.token_ids import TokenIds

SHOWN_CHARACTERS = 200  # of a row without a prompt
DIGESTED = ("text", "token_ids", "answer", "reward", "metadata")  # what tickets are made of; runs rest on their bytes
MOST_PLACES = 5  # of rows in one message


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A row as input of the model: `text` after the chat template, and its tokens.

    The row of an episode has no tokens, and `text` is for people. metadata["prompt"] is the prompt of the row if it has
    one, text or messages; `answer` and metadata are all that an environment gets.

    asked: the prompt of the row as the row has it, before any template. dataset: the name of its set; "" if the run has
    one.
    """

    text: str
    token_ids: Sequence[int]
    answer: str
    reward: str
    metadata: dict[str, Any]
    asked: str | list[Message] = ""
    dataset: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", TokenIds(self.token_ids))

    @property
    def packed_ids(self) -> bytes:
        """The tokens as messages have them: int32[prompt length]."""
        assert isinstance(self.token_ids, TokenIds)
        return self.token_ids.packed

    @property
    def question(self) -> str:
        """What is asked, as a person reads it."""
        return question_of(self.asked) or self.text


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, chat_of: Callable[[str], Chat]) -> list[EncodedPrompt]:
    """Every row through the templates (of chats: messages, or any prompt with a system prompt) and the tokenizer.

    chat_of: by the name of a row's set.

    Plain text gets the special tokens that the tokenizer puts before a text, a chat only those of its template. A chat
    that starts with a system message keeps it.
    """
    return [_encode_row(row, tokenizer, chat_of(row.dataset)) for row in rows]


def _encode_row(row: Row, tokenizer: Tokenizer, chat: Chat) -> EncodedPrompt:
    if isinstance(row.prompt, str) and not chat.system_prompt:
        text = chat.worded(row.prompt)
        token_ids = plain_token_ids(text, tokenizer)
    else:
        text = chat.text(row)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    if not token_ids:
        raise DataError(f"{row.place}: the prompt has no tokens: expected at least one")
    if len(token_ids) > 1 and token_ids[-1] == tokenizer.eos_token_id:  # alone, it is how some models begin a text
        raise DataError(
            f"{row.place}: the prompt ends with the model's end-of-text token, so that its completion would be another "
            "text: expected a prompt that a completion continues; correct the row, or the chat template in actor.path"
        )
    return EncodedPrompt(text, token_ids, row.answer, row.reward, row.metadata, row.prompt, row.dataset)


def episode_rows(rows: Sequence[Row], system_prompt_of: Callable[[str], str] = lambda name: "") -> list[EncodedPrompt]:
    """The rows of episodes. A system prompt becomes the first of their messages, unless they begin with one.

    system_prompt_of: by the name of a row's set.
    """
    return [_episode_row(row, system_prompt_of(row.dataset)) for row in rows]


def _episode_row(row: Row, system_prompt: str) -> EncodedPrompt:
    prompt: str | list[Message] = row.prompt
    if system_prompt:
        messages = _messages(prompt)
        begins = bool(messages) and messages[0]["role"] == "system"
        prompt = messages if begins else [{"role": "system", "content": system_prompt}, *messages]
    metadata = {"prompt": prompt, **row.metadata} if prompt else row.metadata
    return EncodedPrompt(_shown(row), (), row.answer, row.reward, metadata, row.prompt, row.dataset)


def _messages(prompt: str | list[Message]) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return list(prompt)


def _shown(row: Row) -> str:
    """The row for people: its prompt, else the beginning of its columns."""
    if isinstance(row.prompt, str) and row.prompt:
        return row.prompt
    if row.prompt:
        return "\n".join(f"{message['role']}: {message['content']}" for message in _messages(row.prompt))
    columns = row.metadata or {"answer": row.answer}
    text = ", ".join(f"{name}: {value}" for name, value in columns.items())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def require_batch(prompts: Sequence[object], batch_size: int, source: str, note: str = "") -> None:
    """DataError unless the training prompts, or their rows, fill at least one batch. source: where they come from."""
    if len(prompts) < batch_size:
        raise DataError(
            f"{source} holds {len(prompts)} prompts{note} and data.batch_size is {batch_size}: expected at "
            "least one batch; add prompts or lower data.batch_size"
        )


def shared_prompts(held_out: Sequence[EncodedPrompt], train: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The held-out prompts that are training prompts too: the same is asked, in whatever layout.

    Compared are the tokens, and what the messages or the text say, without white space and system messages. The rows of
    episodes may all ask the same, such as "Play.": if their prompts do not tell them apart, all their columns do.
    """
    if not held_out:
        return []
    if any(not prompt.token_ids for prompt in train):  # of episodes
        words = set(map(_said, train))
        if "" in words or len(words) < len(set(map(_columns, train))):
            return _in_both(held_out, train, _columns)
    same_tokens = {id(prompt) for prompt in _in_both(held_out, train, _tokens)}
    same_words = {id(prompt) for prompt in _in_both(held_out, train, _said)}
    return [prompt for prompt in held_out if id(prompt) in same_tokens | same_words]


def _in_both(
    held_out: Sequence[EncodedPrompt], train: Sequence[EncodedPrompt], content: Callable[[EncodedPrompt], Hashable]
) -> list[EncodedPrompt]:
    """The held-out prompts whose content, which is not empty, is that of a training prompt.

    In the memory of the held-out prompts: there may be many more training prompts.
    """
    asked = {found for prompt in held_out if (found := content(prompt))}
    trained = {found for prompt in train if (found := content(prompt)) in asked}
    return [prompt for prompt in held_out if content(prompt) in trained]


def _tokens(prompt: EncodedPrompt) -> bytes:
    return prompt.packed_ids


def _said(prompt: EncodedPrompt) -> str:
    """What all messages but those of the system say, with one space for white space."""
    if isinstance(prompt.asked, str):
        return " ".join(question_of(prompt.asked).split())
    texts = [message["content"] for message in prompt.asked if message["role"] not in ("system", "developer")]
    return " ".join(" ".join(texts).split())


def _columns(prompt: EncodedPrompt) -> bytes:
    """All that an environment gets."""
    return msgspec.msgpack.encode((prompt.answer, prompt.metadata), order="deterministic")


@dataclass(frozen=True)
class TooLong:
    """The prompts of a set that are too long: how many of how many, the places of the first ones, the longest's tokens.

    key: the set's section of the configuration.
    """

    key: str
    count: int
    num_prompts: int
    places: tuple[str, ...]
    longest: int

    def __str__(self) -> str:
        places = ", ".join([*self.places, *["..."] * (self.count > len(self.places))])
        return f"{self.count} of {self.num_prompts} in {self.key} ({self.count / self.num_prompts:.1%}: {places})"


def too_long(key: str, pairs: Sequence[tuple[Row, EncodedPrompt]], max_prompt_tokens: int) -> TooLong | None:
    """Those of a set's prompts that have more tokens; None if all fit."""
    found = [(row, prompt) for row, prompt in pairs if len(prompt.token_ids) > max_prompt_tokens]
    if not found:
        return None
    places = tuple(row.place for row, _ in found[:MOST_PLACES])
    return TooLong(key, len(found), len(pairs), places, max(len(prompt.token_ids) for _, prompt in found))


def require_room(
    sets: Mapping[str, Sequence[tuple[Row, EncodedPrompt]]],
    max_prompt_tokens: int,
    new_tokens_key: str = "sampling.max_new_tokens",
) -> None:
    """DataError if prompts are too long: the first, and how many there are in each set, with the first places.

    sets: by key of the configuration. max_prompt_tokens: the engine's longest sequence less the longest completion,
    which is the value of `new_tokens_key`.
    """
    found = [each for key, pairs in sets.items() if (each := too_long(key, pairs, max_prompt_tokens))]
    if found:
        pairs = sets[found[0].key]
        row, prompt = next(pair for pair in pairs if len(pair[1].token_ids) > max_prompt_tokens)
        raise DataError(
            f"{row.place}: the prompt has {len(prompt.token_ids)} tokens: expected at most {max_prompt_tokens} (what "
            f"engines generate to the end, less {new_tokens_key}). Too long: {', '.join(map(str, found))}; the "
            f"longest has {max(each.longest for each in found)}. Shorten them or leave them out (data.too_long drop "
            f"does), lower {new_tokens_key}, or raise rollout.engine.context_length or rollout.engine.max_total_tokens"
        )


def require_some_left(found: TooLong, max_prompt_tokens: int, new_tokens_key: str) -> None:
    """DataError if all prompts of a set are too long, so that none is left of it."""
    if found.count == found.num_prompts:
        raise DataError(
            f"{found.key}: all {found.count} prompts have more than {max_prompt_tokens} tokens (what engines generate "
            f"to the end, less {new_tokens_key}), and data.too_long is drop: expected at least one that fits; lower "
            f"{new_tokens_key}, raise rollout.engine.context_length or rollout.engine.max_total_tokens, or leave the "
            "set out"
        )


def require_embeddings(rows: Sequence[Row], prompts: Sequence[EncodedPrompt], vocabulary_size: int) -> None:
    """DataError for the first prompt with a token that the model has no embedding for; each prompt is of its row."""
    for row, prompt in zip(rows, prompts, strict=True):
        if (highest := max(prompt.token_ids)) >= vocabulary_size:
            raise DataError(
                f"{row.place}: the prompt has token id {highest}: expected ids below {vocabulary_size}, the vocabulary "
                "of the model in actor.path, whose tokenizer has more; resize the model's embeddings or use the "
                "tokenizer that belongs to it"
            )


def digest(prompts: Sequence[EncodedPrompt]) -> str:
    """xxh3 (16 hex digits) over the prompts in their order: a resumed run must find the same."""
    encoder = msgspec.msgpack.Encoder()
    state = xxhash.xxh3_64()
    for prompt in prompts:
        digested = {name: getattr(prompt, name) for name in DIGESTED} | {"token_ids": list(prompt.token_ids)}
        state.update(encoder.encode(digested))
    return state.hexdigest()
