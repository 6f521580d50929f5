"""The causal language model: the log-probabilities of a pack.

Owns all use of Hugging Face models except loading and attention. Invariant: the vocabulary projection
runs only over rows that a loss token needs, in chunks, so that a full [rows, vocabulary] tensor never exists.

Shapes: P rows of a pack, R projected rows, U wanted (row, token) pairs, V vocabulary, D hidden size.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from penstock_trainer.batching.packing import Pack
from penstock_trainer.batching.routes import OWN_ROUTE
from penstock_trainer.model.attention import attention_arguments, use_trie_attention
from penstock_trainer.model.experts import ExpertUse, use_grouped_experts
from penstock_trainer.model.routing import RouterReplay
from penstock_trainer.model.sequences import padded_rows, sequence_hidden_states, unshareable_layers
from penstock_trainer.model.token_logprobs import Projection, is_plain, logprobs_of_logits, projected_logprobs

# float32 logits of one chunk of the vocabulary projection. On a CPU 256 rows of SmolLM2 (48 MiB) are as fast per row as
# 341; a GPU needs more rows per chunk.
MAX_LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


def output_embeddings(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, model.get_output_embeddings())


def hidden_states(
    model: PreTrainedModel, token_ids_P: Tensor, positions_P: Tensor, subtree_end_P: Tensor, dtype: torch.dtype
) -> Tensor:
    """[P, D] of a pack: of a trie, or of separate sequences if the model sees no trie."""
    if unshareable_layers(model):
        rows_P = padded_rows(positions_P)
        return sequence_hidden_states(model, token_ids_P, rows_P, int(positions_P.max()) + 1)
    output = model.base_model(
        input_ids=token_ids_P[None],
        position_ids=positions_P[None],
        use_cache=False,
        **attention_arguments(model, subtree_end_P, dtype),
    )
    return cast(Tensor, output.last_hidden_state[0])


def prepare_passes(model: PreTrainedModel) -> None:
    """Make the model compute packs: how it attends, and how rows go through its experts."""
    if not unshareable_layers(model):
        use_trie_attention(model)
    use_grouped_experts(model)


class PackModel:
    """A model's log-probabilities of packs, computed in float32 or under bfloat16 autocast.

    `model` keeps its float32 weights. With `gradient_checkpointing` the backward pass recomputes activations.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        temperature: float,
        gradient_checkpointing: bool = False,
        router_replay: bool = False,
    ) -> None:
        """`router_replay`: rows of a pack that have experts are routed through them; else nobody's are looked at."""
        self.model = model
        self.shares_prefixes = not unshareable_layers(model)
        self._dtype = dtype
        self._temperature = temperature
        self._head = output_embeddings(model)
        self._vocab_size = model.config.get_text_config().vocab_size
        prepare_passes(model)
        self._replay = RouterReplay(model) if router_replay else None
        self._use = ExpertUse(model)
        self._last_rows_P: Tensor | None = None
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # the only mode in which layers recompute; there is no dropout

    def token_logprobs(
        self, pack: Pack, *, entropy_gradient: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """log pi(token | prefix) of the pack's U pairs, and the entropy at its R rows, float32.

        The entropy has a gradient only with `entropy_gradient`. `temperature`: the sampler's if none is given.
        """
        temperature = self._temperature if temperature is None else temperature
        self._route(pack)
        # A pack uses each weight once, so a cache of cast weights saves nothing; and torch's is one for all threads.
        with torch.autocast(
            pack.token_ids_P.device.type,
            torch.bfloat16,
            enabled=self._dtype == torch.bfloat16,
            cache_enabled=False,
        ):
            hidden_PD = hidden_states(self.model, pack.token_ids_P, pack.positions_P, pack.subtree_end_P, self._dtype)
            hidden_RD = hidden_PD.index_select(0, pack.parents_R)
            num_rows = hidden_RD.shape[0]
            chunk_rows = max(1, MAX_LOGIT_BYTES[hidden_RD.device.type] // (4 * self._vocab_size))
            if num_rows <= chunk_rows:
                return self._project(
                    hidden_RD, pack.target_parent_U, pack.target_token_U, temperature, entropy_gradient
                )
            if is_plain(self._head):
                projection = Projection(chunk_rows, self._product_dtype(hidden_RD), temperature, entropy_gradient)
                head = cast(nn.Linear, self._head)
                return projected_logprobs(hidden_RD, head, pack.target_parent_U, pack.target_token_U, projection)
            logprobs, entropies = [], []
            for start in range(0, num_rows, chunk_rows):
                rows = slice(start, min(start + chunk_rows, num_rows))
                wanted_U = (pack.target_parent_U >= rows.start) & (pack.target_parent_U < rows.stop)
                arguments = (hidden_RD[rows], pack.target_parent_U[wanted_U] - start, pack.target_token_U[wanted_U])
                logprob_u, entropy_r = checkpoint(
                    self._project, *arguments, temperature, entropy_gradient, use_reentrant=False
                )
                logprobs.append(logprob_u)
                entropies.append(entropy_r)
            return torch.cat(logprobs), torch.cat(entropies)

    def expert_use(self) -> tuple[tuple[int, ...], ...]:
        """[layers][experts]: how many rows of the last pack each expert got; empty without experts."""
        return self._use.of_last_pass(self._last_rows_P) if self._use.is_known else ()

    def _route(self, pack: Pack) -> None:
        """Force the pack's experts upon the routers, and note which rows of the pass are the pack's."""
        self._last_rows_P = None if self.shares_prefixes else padded_rows(pack.positions_P)
        if self._replay is None:
            return
        experts_PW = pack.experts_PW
        if experts_PW is not None and self._last_rows_P is not None:
            num_tokens = int(pack.positions_P.max()) + 1
            num_rows = -(-(int(self._last_rows_P.max()) + 1) // num_tokens) * num_tokens
            padded = experts_PW.new_full((num_rows, experts_PW.shape[1]), OWN_ROUTE)
            experts_PW = padded.index_copy_(0, self._last_rows_P, experts_PW)
        self._replay.force(experts_PW)

    def _product_dtype(self, hidden_RD: Tensor) -> torch.dtype:
        """That of autocast if it is on; else that of the hidden states (FSDP casts them itself)."""
        return torch.bfloat16 if torch.is_autocast_enabled(hidden_RD.device.type) else hidden_RD.dtype

    def _project(
        self,
        hidden_RD: Tensor,
        target_row_U: Tensor,
        target_token_U: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """The head is called as a module, also in a recomputation, so that its adapter and its hooks take effect."""
        logits_RV = self._head(hidden_RD).float()
        return logprobs_of_logits(logits_RV, target_row_U, target_token_U, temperature, entropy_gradient)
