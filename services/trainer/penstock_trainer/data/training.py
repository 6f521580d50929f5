"""Training rows -> training prompts, one after the other: in memory, or in a table on disk.

Owns the one pass over the rows, in which each is checked, and when a table that was made before stands for it.
Invariant: both forms have the same prompts, in the same order, and refuse the same rows.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from penstock.config import Config
from penstock.errors import DataError
from penstock_trainer.data.chat import Chats
from penstock_trainer.data.datasets import BegunRows, source_states
from penstock_trainer.data.prompt_lengths import SetLengths, require_room, require_some_left
from penstock_trainer.data.prompt_table import Contents, PromptTable, PromptTables, RewardName
from penstock_trainer.data.prompts import EncodedPrompt, require_embedding
from penstock_trainer.data.rows import Row, require_rewards, task_of
from penstock_trainer.data.table_key import table_key
from penstock_trainer.data.tokenizer import Vocabulary

log = logging.getLogger(__name__)

MOST_NEW_TOKENS = "sampling.max_new_tokens"
PROGRESS_SECONDS = 30.0


class Limits:
    """How many tokens a prompt may have, by set. longest: sequence of an engine, in tokens."""

    def __init__(self, config: Config, longest: int) -> None:
        self._config = config
        self._longest = longest
        self._own = {
            each.key: (f"{each.sampling_key}.max_new_tokens", each.sampling.max_new_tokens)
            for each in config.held_out_sets
            if each.sampling.max_new_tokens
        }

    def of(self, key: str) -> SetLengths:
        """Those of a set, by the key of its section, with nothing counted yet."""
        return SetLengths(key, self._longest - self._new_tokens(key)[1])

    def require(self, sets: Sequence[SetLengths]) -> None:
        """DataError if there are prompts that are too long and data.too_long is error, or if all of a set are."""
        if self._config.data.too_long == "drop":
            for each in sets:
                require_some_left(each, self._new_tokens(each.key)[0])
            return
        for limit in dict.fromkeys(self._new_tokens(each.key) for each in sets):
            require_room([each for each in sets if self._new_tokens(each.key) == limit], limit[0])

    def hold_for(self, contents: Contents) -> bool:
        """Whether a table has the prompts that fit: those that it leaves out are too long here too."""
        drops = self._config.data.too_long == "drop"
        return all(
            each.holds_for(self.of(each.key).max_prompt_tokens) and (drops or not each.count)
            for each in contents.lengths
        )

    def _new_tokens(self, key: str) -> tuple[str, int]:
        return self._own.get(key, (MOST_NEW_TOKENS, self._config.sampling.max_new_tokens))


class Training:
    """The pass over the training rows of a run."""

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        limits: Limits,
        encode: Callable[[Row], EncodedPrompt],
        chats: Chats | None = None,
    ) -> None:
        """encode: DataError for a row that cannot be a prompt. chats: the templates that it uses."""
        self._config = config
        self._vocabulary = vocabulary
        self._encode = encode
        self._chats = chats
        self._limits = limits
        self._lengths = {each.name: limits.of(each.key) for each in config.data.training_sets}
        self._rewards: dict[tuple[str, str | None], RewardName] = {}

    def read(
        self, rows: Iterable[Row], tables: PromptTables | None
    ) -> tuple[Sequence[EncodedPrompt], list[SetLengths]]:
        """The prompts that fit, and the lengths of all, by set. tables: None: keep them in memory.

        rows: if some are read before this call, `BegunRows`, which know what their sources were by then.
        """
        key = table_key(self._config, self._vocabulary) if tables is not None else None
        if tables is None or key is None:
            return list(self._fitting(rows)), [*self._lengths.values()]
        if found := tables.find(key, self._limits.hold_for):
            self._take_note(found)
            return found, [*found.contents.lengths]
        made = self._make(rows, tables, key)
        return made, [*self._lengths.values()]

    def _fitting(self, rows: Iterable[Row]) -> Iterator[EncodedPrompt]:
        for row in rows:
            prompt = self._encode(row)
            if self._lengths[row.dataset].add(row.place, len(prompt.token_ids)):
                require_embedding(row, prompt, self._vocabulary.size)
                name = row.reward, task_of(row)
                if name not in self._rewards:
                    self._rewards[name] = RewardName(row.reward, row.place, name[1])
                yield prompt

    def _make(self, rows: Iterable[Row], tables: PromptTables, key: str) -> Sequence[EncodedPrompt]:
        before = rows.states if isinstance(rows, BegunRows) else source_states(self._config)
        began = time.monotonic()
        log.info("making a table of the training prompts in %s, which later starts of this set use", tables.folder)
        with tables.new(key) as table:
            told = began
            for number, prompt in enumerate(self._fitting(rows), start=1):
                table.writer.add(prompt)
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    log.info("%d training prompts made, %.0f in a second", number, number / (told - began))
            if source_states(self._config) != before:
                raise DataError(
                    f"{_sources(self._config)} changed while it was read: expected rows that stay as they are until a "
                    "run has read them; start again"
                )
            lengths = [*self._lengths.values()]
            self._limits.require(lengths)
            contents = table.writer.finish(lengths, [*self._rewards.values()], self._with_template())
            return table.keep(contents)

    def _with_template(self) -> list[str]:
        names = [each.name for each in self._config.data.training_sets]
        return [name for name in names if self._chats is not None and self._chats.of(name).is_used]

    def _take_note(self, found: PromptTable) -> None:
        """Of what the rows of a table would have shown; DataError if a function that they name is no more."""
        contents = found.contents
        log.info("%d training prompts are in a table that was made before: %s", len(found), found.folder)
        require_rewards([each.row() for each in contents.rewards], self._config.all_rewards.functions)
        if self._chats is not None:
            for name in contents.with_template:
                self._chats.of(name).is_used = True


def _sources(config: Config) -> str:
    return " or ".join(f"{each.section.path} ({each.key}.path)" for each in config.data.training_sets)
