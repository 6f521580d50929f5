"""Prompts as tokens; of episodes, which have none before they begin, as text and metadata.

Invariant: every prompt of completions has at least one token, and does not end a text; a bad row is a DataError that
names it. `require_...` check what needs all prompts of a run.
"""

from collections.abc import Callable, Iterable, Sequence
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


def encode_row(row: Row, tokenizer: Tokenizer, chat: Chat) -> EncodedPrompt:
    """A row through the templates (of chats: messages, or any prompt with a system prompt) and the tokenizer.

    Plain text gets the special tokens that the tokenizer puts before a text, a chat only those of its template. A chat
    that starts with a system message keeps it. DataError if there is no prompt that a completion continues.
    """
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
    return [episode_row(row, system_prompt_of(row.dataset)) for row in rows]


def episode_row(row: Row, system_prompt: str) -> EncodedPrompt:
    """One row, as `episode_rows`."""
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


def require_batch(num_prompts: int, batch_size: int, source: str, note: str = "") -> None:
    """DataError unless the training prompts, or their rows, fill at least one batch. source: where they come from."""
    if num_prompts < batch_size:
        raise DataError(
            f"{source} holds {num_prompts} prompts{note} and data.batch_size is {batch_size}: expected at "
            "least one batch; add prompts or lower data.batch_size"
        )


def require_embedding(row: Row, prompt: EncodedPrompt, vocabulary_size: int) -> None:
    """DataError if the prompt of a row has a token that the model has no embedding for."""
    if (highest := max(prompt.token_ids, default=0)) >= vocabulary_size:
        raise DataError(
            f"{row.place}: the prompt has token id {highest}: expected ids below {vocabulary_size}, the vocabulary "
            "of the model in actor.path, whose tokenizer has more; resize the model's embeddings or use the "
            "tokenizer that belongs to it"
        )


class PromptDigest:
    """xxh3 (16 hex digits) over prompts in their order, one after the other: a resumed run must find the same."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._state = xxhash.xxh3_64()

    def add(self, prompt: EncodedPrompt) -> None:
        """The next prompt."""
        digested = {name: getattr(prompt, name) for name in DIGESTED} | {"token_ids": list(prompt.token_ids)}
        self._state.update(self._encoder.encode(digested))

    @property
    def value(self) -> str:
        """Of all prompts so far."""
        return self._state.hexdigest()


def digest(prompts: Iterable[EncodedPrompt]) -> str:
    """`PromptDigest` of all of them."""
    state = PromptDigest()
    for prompt in prompts:
        state.add(prompt)
    return state.value
