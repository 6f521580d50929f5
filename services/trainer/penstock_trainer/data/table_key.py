"""What training prompts are made from, as one key: equal keys give equal prompts.

Owns what belongs to it: the state of the sources, the keys of the configuration that decide prompts, the tokenizer, and
the code that makes them. Invariant: what it leaves out changes no prompt, or is kept in the table's `Contents` and
compared there, as the room for completions and the names of rewards are.
"""

from datetime import date
from importlib.metadata import version
from inspect import getsourcefile
from pathlib import Path
from typing import Any

import msgspec
import xxhash

import penstock.plain_tokens
import penstock.readable
from penstock.config import Config
from penstock_trainer.data import chat, datasets, prompt_lengths, prompt_table, prompts, rows, shared_prompts, token_ids
from penstock_trainer.data.tokenizer import Vocabulary

CODE = (
    *(chat, datasets, prompt_lengths, prompt_table, prompts, rows, shared_prompts, token_ids),
    *(penstock.plain_tokens, penstock.readable),
)
# Penstock's own release stands for code that `CODE` does not name, such as `training`, which imports this module.
LIBRARIES = ("datasets", "jinja2", "msgspec", "penstock", "reasoning-gym", "tokenizers", "transformers")
DATE = "strftime_now"  # a template with it writes the day into its prompts


def table_key(config: Config, vocabulary: Vocabulary) -> str | None:
    """32 hex digits; None for a tokenizer that cannot be compared: one without a form in the library `tokenizers`.

    DataError if a source is not there.
    """
    if not hasattr(vocabulary.tokenizer, "backend_tokenizer"):
        return None
    data = config.data
    made_from = {
        "sets": [[each.name, each.key, each.section.model_dump(exclude={"weight"})] for each in data.training_sets],
        "sources": datasets.source_states(config),
        "templates": [data.system_prompt, data.prompt_template, data.template_options],
        "of_episodes": config.agent.enabled,
        "tokenizer": _tokenizer(vocabulary),
        "code": [xxhash.xxh3_128_hexdigest(Path(getsourcefile(each) or "").read_bytes()) for each in CODE],
        "libraries": [version(each) for each in LIBRARIES],
    }
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(made_from, enc_hook=repr, order="sorted"))


def _tokenizer(vocabulary: Vocabulary) -> list[Any]:
    tokenizer = vocabulary.tokenizer
    templates = msgspec.json.encode(tokenizer.chat_template, enc_hook=repr).decode()
    return [
        type(tokenizer).__name__,
        xxhash.xxh3_128_hexdigest(tokenizer.backend_tokenizer.to_str().encode()),
        tokenizer.eos_token_id,
        vocabulary.size,
        templates,
        sorted(map(repr, tokenizer.special_tokens_map.items())),
        str(date.today()) if DATE in templates else "",
    ]
