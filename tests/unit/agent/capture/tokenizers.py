"""Small tokenizers: of one token per byte and some merges, with the special tokens of a family."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from renderers import base
from renderers.configs import config_from_name
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = Path(__file__).parents[4] / "README.md"


class Recorder:
    """Notes the tokens that a family asks for."""

    name_or_path = "recorder"
    unk_token_id = None
    eos_token_id = 0
    chat_template = ""
    bos_token_id = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def convert_tokens_to_ids(self, token: str) -> int:
        if token not in self.asked:
            self.asked.append(token)
        return self.asked.index(token)

    def encode(self, text: str, **_: Any) -> list[int]:
        return [self.convert_tokens_to_ids(text)] if text.startswith(("<", "\uff5c")) and " " not in text else [0]

    def decode(self, token_ids: Any, **_: Any) -> str:
        return ""


@cache
def tokens_of(family: str) -> tuple[str, ...]:
    """The special tokens of a family."""
    recorder = Recorder()
    base.create_renderer(recorder, config_from_name(family))
    return tuple(recorder.asked)


@cache
def _trained() -> str:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(keepends=True), trainer)
    written: str = raw.to_str()
    return written


def make_tokenizer(special: Sequence[str], template: str | None = None) -> Any:
    """A tokenizer of the transformers library."""
    raw = Tokenizer.from_str(_trained())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def family_tokenizer(family: str) -> Any:
    """A tokenizer that the family fits, without a template."""
    return make_tokenizer(tokens_of(family))


def speaks(tokenizer: Any, text: Callable[[list[dict[str, Any]], Any], str]) -> Any:
    """The tokenizer with a template that is a function of messages and tools."""
    tokenizer.chat_template = "a function"
    tokenizer.apply_chat_template = lambda messages, *, tools=None, **_: text(messages, tools)
    return tokenizer
