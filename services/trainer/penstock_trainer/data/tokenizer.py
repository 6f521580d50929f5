"""The text side of the policy: its tokenizer, its end tokens, its context length.

Owns loading these from `actor.path`, and whether a teacher reads the same token ids.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from penstock.errors import ConfigError
from penstock.model_path import check_model_path


@dataclass(frozen=True)
class Vocabulary:
    """end_of_text_ids: tokens that end a text by the model's own configuration; context_length in tokens.

    size: token ids below it have an embedding. A tokenizer may have fewer tokens, or more.
    """

    tokenizer: Any
    end_of_text_ids: tuple[int, ...]
    context_length: int
    size: int


def load_vocabulary(path: str, key: str = "actor.path") -> Vocabulary:
    """Load it from `path`; ConfigError, with `key`, if there is no tokenizer."""
    check_model_path(path, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # of any library that reads a part of the folder: a reason why it cannot be used
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{key} is {path!r}: expected a model folder with a tokenizer; {reason}") from error
    return Vocabulary(
        tokenizer,
        _end_of_text_ids(path, config),
        _context_length(path, config, key),
        config.get_text_config().vocab_size,
    )


def token_texts(vocabulary: Vocabulary) -> list[str]:
    """The text of each token of the tokenizer, by itself and as it is, by id."""
    ids = [[token] for token in range(len(vocabulary.tokenizer))]
    texts: list[str] = vocabulary.tokenizer.batch_decode(ids, skip_special_tokens=False)
    return texts


def check_teacher(path: str, policy_path: str, policy: Vocabulary, longest: int) -> None:
    """ConfigError if the teacher of `path` reads other tokens than the policy of `policy_path` writes, or fewer.

    longest: tokens of the longest sequence of the run.
    """
    teacher = load_vocabulary(path, "teacher.path")
    theirs, own = teacher.tokenizer.get_vocab(), policy.tokenizer.get_vocab()
    seen = f"teacher.path is {path!r} and actor.path {policy_path!r}"
    differing = sorted(token for token in theirs.keys() | own.keys() if theirs.get(token) != own.get(token))
    if differing:
        first = differing[0]
        ids = ", ".join(
            f"{vocabulary[first]} {where}" if first in vocabulary else f"absent {where}"
            for vocabulary, where in ((theirs, "there"), (own, "here"))
        )
        raise ConfigError(
            f"{seen}, whose tokenizers differ in {len(differing)} tokens (of {len(theirs)} and {len(own)}), first "
            f"{first!r}: {ids}. Expected one vocabulary, since the teacher reads the ids that the policy sampled; "
            "choose a teacher of the policy's family"
        )
    if teacher.size < policy.size:
        raise ConfigError(
            f"{seen}, which have embeddings of {teacher.size} and {policy.size} tokens: expected no fewer of the "
            "teacher, which must read whatever the policy samples; choose another teacher"
        )
    if teacher.context_length < longest:
        raise ConfigError(
            f"{seen}: the teacher reads up to {teacher.context_length} tokens, and a sequence of this run may have "
            f"{longest}; expected a teacher with as long a context, or a lower rollout.engine.context_length"
        )


def _end_of_text_ids(path: str, config: Any) -> tuple[int, ...]:
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        ids = None
    if ids is None:
        ids = config.get_text_config().eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _context_length(path: str, config: Any, key: str) -> int:
    length = config.get_text_config().max_position_embeddings
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"{key} is {path!r}, whose max_position_embeddings is {length!r}; expected a number >= 1")
    return length
