"""Prompts as tokens: chat templates and tokenization.

Invariant: every prompt has at least one token and leaves room for its completion; a bad row is a DataError that names
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import xxhash

from penstock.errors import DataError
from penstock_trainer.data.datasets import Message, Row


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that are used."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


@dataclass(frozen=True)
class EncodedPrompt:
    """A row as input of the model: `text` after the chat template, and its tokens."""

    text: str
    token_ids: tuple[int, ...]
    answer: str
    reward: str
    metadata: dict[str, Any]


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, system_prompt: str, max_prompt_tokens: int
) -> list[EncodedPrompt]:
    """Every row through the chat template (messages, or any prompt with `system_prompt`) and the tokenizer.

    Plain text gets the tokenizer's own special tokens, a chat only those of its template. A chat that
    starts with a system message keeps it. max_prompt_tokens: context length less sampling.max_new_tokens.
    """
    return [_encode_row(row, tokenizer, system_prompt, max_prompt_tokens) for row in rows]


def _encode_row(row: Row, tokenizer: Tokenizer, system_prompt: str, max_prompt_tokens: int) -> EncodedPrompt:
    if isinstance(row.prompt, str) and not system_prompt:
        text = row.prompt
        token_ids = tuple(tokenizer.encode(text))
    else:
        text = _chat_text(row, tokenizer, system_prompt)
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not token_ids:
        raise DataError(f"{row.place}: the prompt has no tokens: expected at least one")
    if len(token_ids) > max_prompt_tokens:
        raise DataError(
            f"{row.place}: the prompt has {len(token_ids)} tokens: expected at most {max_prompt_tokens} (context "
            "length less sampling.max_new_tokens); shorten it, lower sampling.max_new_tokens or raise "
            "rollout.engine.context_length"
        )
    return EncodedPrompt(text, token_ids, row.answer, row.reward, row.metadata)


def _chat_text(row: Row, tokenizer: Tokenizer, system_prompt: str) -> str:
    """The row's messages through the chat template, up to the start of the assistant's message."""
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.place}: chat messages, but the tokenizer in actor.path has no chat template: expected one; "
            "use plain text as prompt and leave data.system_prompt empty"
        )
    # A template refuses messages through Jinja; jinja2 is imported with the tokenizer, not before.
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"{row.place}: the chat template in actor.path refuses messages with roles {roles} ({error}): "
            "expected roles and an order that it accepts; correct the row or data.system_prompt"
        ) from error


def require_batch(prompts: Sequence[EncodedPrompt], batch_size: int, path: str) -> None:
    """DataError unless the training prompts fill at least one batch."""
    if len(prompts) < batch_size:
        raise DataError(
            f"{path} (data.train.path) holds {len(prompts)} prompts and data.batch_size is {batch_size}: expected at "
            "least one batch; add prompts or lower data.batch_size"
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
        state.update(encoder.encode(prompt))
    return state.hexdigest()
