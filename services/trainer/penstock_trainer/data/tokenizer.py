"""The text side of the policy: its tokenizer, its end tokens, its context length.

Owns loading these from `actor.path`.
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


def load_vocabulary(path: str) -> Vocabulary:
    """Load it from `path`; ConfigError, with actor.path, if there is no tokenizer."""
    check_model_path(path, "actor.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # of any library that reads a part of the folder: a reason why it cannot be used
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"actor.path is {path!r}: expected a model folder with a tokenizer; {reason}") from error
    return Vocabulary(
        tokenizer, _end_of_text_ids(path, config), _context_length(path, config), config.get_text_config().vocab_size
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


def _context_length(path: str, config: Any) -> int:
    length = config.get_text_config().max_position_embeddings
    if not isinstance(length, int) or length < 1:
        raise ConfigError(
            f"actor.path is {path!r}, whose max_position_embeddings is {length!r}; expected a number >= 1"
        )
    return length
