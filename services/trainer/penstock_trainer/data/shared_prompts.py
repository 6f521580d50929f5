"""Held-out prompts that are training prompts too.

Owns what counts as the same. Invariant: the comparison needs the memory of the held-out prompts alone; of training
prompts on disk it reads hashes, and the few prompts whose hash agrees.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, runtime_checkable

import msgspec
import xxhash

from penstock.readable import question_of
from penstock_trainer.data.prompts import EncodedPrompt


@runtime_checkable
class Searchable(Protocol):
    """Training prompts that are found by the hash of a content."""

    @property
    def told_apart_by_words(self) -> bool: ...

    def with_hashes(self, content: str, hashes: Collection[int]) -> Iterable[EncodedPrompt]:
        """Those whose content, one of `CONTENTS`, has one of these hashes."""
        ...


def shared_prompts(held_out: Sequence[EncodedPrompt], train: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The held-out prompts that are training prompts too: the same is asked, in whatever layout.

    Compared are the tokens, and what the messages or the text say, without white space and system messages. The rows of
    episodes may all ask the same, such as "Play.": if their prompts do not tell them apart, all their columns do.
    """
    if not held_out:
        return []
    if not _told_apart_by_words(train):
        return _in_both(held_out, train, "columns")
    same_tokens = {id(prompt) for prompt in _in_both(held_out, train, "tokens")}
    same_words = {id(prompt) for prompt in _in_both(held_out, train, "words")}
    return [prompt for prompt in held_out if id(prompt) in same_tokens | same_words]


def _told_apart_by_words(train: Sequence[EncodedPrompt]) -> bool:
    if isinstance(train, Searchable):
        return train.told_apart_by_words
    if all(prompt.token_ids for prompt in train):
        return True
    words = set(map(_words, train))
    return "" not in words and len(words) >= len(set(map(_columns, train)))


def _in_both(held_out: Sequence[EncodedPrompt], train: Sequence[EncodedPrompt], name: str) -> list[EncodedPrompt]:
    """The held-out prompts whose content, which is not empty, is that of a training prompt."""
    content = CONTENTS[name]
    asked = {found for prompt in held_out if (found := content(prompt))}
    if isinstance(train, Searchable):
        train_prompts: Iterable[EncodedPrompt] = train.with_hashes(name, set(map(hash_of, asked)))
    else:
        train_prompts = train
    trained = {found for prompt in train_prompts if (found := content(prompt)) in asked}
    return [prompt for prompt in held_out if content(prompt) in trained]


def _tokens(prompt: EncodedPrompt) -> bytes:
    return prompt.packed_ids


def _words(prompt: EncodedPrompt) -> str:
    """What all messages but those of the system say, with one space for white space."""
    if isinstance(prompt.asked, str):
        return " ".join(question_of(prompt.asked).split())
    texts = [message["content"] for message in prompt.asked if message["role"] not in ("system", "developer")]
    return " ".join(" ".join(texts).split())


def _columns(prompt: EncodedPrompt) -> bytes:
    """All that an environment gets."""
    return msgspec.msgpack.encode((prompt.answer, prompt.metadata), order="deterministic")


CONTENTS: dict[str, Callable[[EncodedPrompt], str | bytes]] = {"tokens": _tokens, "words": _words, "columns": _columns}


def hash_of(content: str | bytes) -> int:
    """xxh3 of 64 bits; of a text, of its UTF-8."""
    return xxhash.xxh3_64_intdigest(content.encode() if isinstance(content, str) else content)
