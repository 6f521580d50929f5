"""The prompts of a run: its training prompts and its held-out prompts, as tokens.

Owns the checks that need the model's tokenizer and no more: a prompt that is too long fails before a model loads.
"""

import logging
from dataclasses import dataclass
from functools import cached_property

from penstock.config import Config
from penstock.contracts.ledger import RunRecord
from penstock.engine_limits import longest_sequence
from penstock_trainer.data.chat import Chat
from penstock_trainer.data.draws import stop_token_ids
from penstock_trainer.data.prompts import (
    EncodedPrompt,
    digest,
    encode_rows,
    require_batch,
    require_embeddings,
    shared_prompts,
)
from penstock_trainer.data.rows import Row
from penstock_trainer.data.tokenizer import load_vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """The training and held-out prompts of a run, as tokens; stop_token_ids end a completion."""

    train: list[EncodedPrompt]
    held_out: list[EncodedPrompt]
    stop_token_ids: tuple[int, ...]

    @cached_property
    def shared(self) -> list[EncodedPrompt]:
        """The held-out prompts that are training prompts too."""
        return shared_prompts(self.held_out, self.train)

    @cached_property
    def digest(self) -> str:
        """The digest of the training prompts."""
        return digest(self.train)

    def run_record(self, config: Config) -> RunRecord:
        """The record that begins a run, but for its model."""
        actor, lora = config.actor, config.actor.lora
        return RunRecord(
            self.digest,
            len(self.train),
            config.data.batch_size,
            actor.group_size,
            config.run.seed,
            model_path=actor.path,
            lora=f"rank {lora.rank}, alpha {lora.alpha}, target_modules {lora.target_modules}" if lora.rank else "",
        )


def encode_prompts(config: Config, train_rows: list[Row], held_out_rows: list[Row]) -> Prompts:
    """The rows as tokens; DataError for rows that cannot be prompts of this run. Warns of shared prompts."""
    vocabulary = load_vocabulary(config.actor.path)
    engine = config.rollout.engine
    context = engine.context_length or vocabulary.context_length
    longest = longest_sequence(context, engine.max_total_tokens or None) - config.sampling.max_new_tokens
    chat = Chat(vocabulary.tokenizer, config.data.system_prompt, config.data.template_options)
    train = encode_rows(train_rows, vocabulary.tokenizer, chat, longest)
    require_batch(train, config.data.batch_size, config.data.train.path)
    held_out = encode_rows(held_out_rows, vocabulary.tokenizer, chat, longest)
    chat.require_used()
    for rows, encoded in ((train_rows, train), (held_out_rows, held_out)):
        require_embeddings(rows, encoded, vocabulary.size)
    stop = stop_token_ids(vocabulary.tokenizer, config.sampling.stop, vocabulary.end_of_text_ids)
    prompts = Prompts(train, held_out, stop)
    if prompts.shared:
        log.warning(
            "%d of the %d prompts of data.eval are among the training prompts (the first: %r): their accuracy proves "
            "nothing about other prompts; give data.eval another split, path or seed",
            len(prompts.shared),
            len(held_out),
            prompts.shared[0].text[-80:],
        )
    return prompts
