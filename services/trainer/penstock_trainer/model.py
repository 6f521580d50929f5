"""The causal language model: loading it, and the log-probabilities of a pack.

Owns what is known of Hugging Face models, but for their attention. Invariant: the vocabulary projection
runs only over rows that a loss token needs, in chunks, so that [rows, vocabulary] never exists as a whole.
Called by the learner.

Shapes: P rows of a pack, R projected rows, U wanted (row, token) pairs, V vocabulary, D hidden size.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from penstock.errors import ConfigError
from penstock.model_path import check_model_path
from penstock_trainer.attention import attention_arguments, use_trie_attention
from penstock_trainer.head import Projection, is_plain, projected_logprobs
from penstock_trainer.packing import Pack
from penstock_trainer.projection import logprobs_of_logits

# float32 logits of one chunk of the vocabulary projection. On a CPU 256 rows of SmolLM2 (48 MiB) are as fast per row as
# 341; a GPU needs more rows per chunk.
MAX_LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
FULL_ATTENTION = {"full_attention", "attention"}
PROBE_TOLERANCE = 1e-3  # of the largest logit; float32 differs by about 1e-6


def load_model(path: str, key: str) -> PreTrainedModel:
    """A causal language model with float32 weights and no dropout; ConfigError names `key` where it cannot be used."""
    check_model_path(path, key)
    disable_progress_bar()  # it would stand between the lines of the log
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key} is {path!r}: expected a causal language model of Hugging Face; {reason}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    absent = sorted(info["missing_keys"]) + sorted(str(each) for each in info["mismatched_keys"])
    if absent:
        raise ConfigError(
            f"{key} is {path!r}, whose files lack {len(absent)} weights or hold other shapes: {absent[:3]}. "
            f"Expected all of {type(model).__name__}; check the folder for missing files"
        )
    _check_layers(model, path, key)
    _disable_dropout(model)
    use_trie_attention(model)
    model.train(False)
    _check_packing(model, path, key)
    return model


def _check_layers(model: PreTrainedModel, path: str, key: str) -> None:
    """Refuse what packing is not exact for and the probe is too short to see."""
    config = model.config.get_text_config().to_dict()
    others = sorted(set(config.get("layer_types") or ()) - FULL_ATTENTION)
    window = config.get("sliding_window")
    uses_window = bool(window) and not config.get("layer_types") and config.get("use_sliding_window", True)
    if others or uses_window or config.get("attention_chunk_size"):
        seen = (
            ", ".join(others) if others else f"attention limited to {window or config['attention_chunk_size']} tokens"
        )
        raise ConfigError(
            f"{key} is {path!r} ({config.get('model_type')}) with layers of {seen}: expected full attention in every "
            "layer, which packing relies on; choose another model"
        )


def _disable_dropout(model: nn.Module) -> None:
    """The ratio to the sampler's probabilities is one of the same function only without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(vars(module).get("attention_dropout"), float):
            module.attention_dropout = cast(Any, 0.0)


def _check_packing(model: PreTrainedModel, path: str, key: str) -> None:
    """Two short sequences in one trie must give the logits that each has alone.

    Sees recurrent layers, ignored masks, and whatever a model does to logits after the projection.
    """
    vocab_size = model.config.get_text_config().vocab_size
    first, second, trie = (torch.tensor(ids) % vocab_size for ids in ([3, 5, 7, 9], [3, 5, 8, 6], [3, 5, 7, 9, 8, 6]))
    subtree_end = torch.tensor([6, 6, 4, 4, 6, 6])
    with torch.no_grad():
        hidden_PD = _hidden(model, trie, torch.tensor([0, 1, 2, 3, 2, 3]), subtree_end, torch.float32)
        packed_PV = _output_embeddings(model)(hidden_PD)
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)]
    expected_PV = torch.cat([alone[0], alone[1][2:]])
    difference = float((packed_PV - expected_PV).abs().max() / expected_PV.abs().max())
    if not difference < PROBE_TOLERANCE:
        raise ConfigError(
            f"{key} is {path!r} ({model.config.model_type}), whose logits in a pack of two sequences differ from those "
            f"of each alone by {difference:.1e} of the largest: expected a model that mixes tokens by attention only, "
            "with a plain projection at its end; choose another one"
        )


def _output_embeddings(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, model.get_output_embeddings())


def _hidden(
    model: PreTrainedModel, token_ids_P: Tensor, positions_P: Tensor, subtree_end_P: Tensor, dtype: torch.dtype
) -> Tensor:
    output = model.base_model(
        input_ids=token_ids_P[None],
        position_ids=positions_P[None],
        use_cache=False,
        **attention_arguments(model, subtree_end_P, dtype),
    )
    return cast(Tensor, output.last_hidden_state[0])


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights, without gradients, for another thread.

    What a forward pass changes of a model is its own: an adapter that is off meanwhile, or frequencies that depend on
    the length.
    """
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    second: PreTrainedModel = copy.deepcopy(model, cast(dict[int, Any], weights))
    second.train(False)
    return second


class PackModel:
    """A model's log-probabilities of packs, computed in float32 or under bfloat16 autocast.

    `model` keeps its float32 weights. With `gradient_checkpointing` the backward pass recomputes activations.
    """

    def __init__(
        self, model: PreTrainedModel, *, dtype: torch.dtype, temperature: float, gradient_checkpointing: bool = False
    ) -> None:
        self.model = model
        self._dtype = dtype
        self._temperature = temperature
        self._head = _output_embeddings(model)
        self._vocab_size = model.config.get_text_config().vocab_size
        use_trie_attention(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # the only mode in which layers recompute; there is no dropout

    def token_logprobs(
        self, pack: Pack, *, entropy_gradient: bool = False, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """log pi(token | prefix) of the pack's U pairs, and the entropy at its R rows, float32.

        The entropy has a gradient only where it is asked for. `temperature`: the sampler's where none is given.
        """
        temperature = self._temperature if temperature is None else temperature
        # A pack uses each weight once, so a cache of cast weights saves nothing; and torch's is one for all threads.
        with torch.autocast(
            pack.token_ids_P.device.type,
            torch.bfloat16,
            enabled=self._dtype == torch.bfloat16,
            cache_enabled=False,
        ):
            hidden_PD = _hidden(self.model, pack.token_ids_P, pack.positions_P, pack.subtree_end_P, self._dtype)
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

    def _product_dtype(self, hidden_RD: Tensor) -> torch.dtype:
        """As autocast, where it is on; else as the hidden states come (FSDP casts them itself)."""
        return torch.bfloat16 if torch.is_autocast_enabled(hidden_RD.device.type) else hidden_RD.dtype

    def _project(
        self,
        hidden_RD: Tensor,
        target_row_U: Tensor,
        target_token_U: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """The head is called as a module, also when recomputed: whoever adapts it, or hooks there, is heard."""
        logits_RV = self._head(hidden_RD).float()
        return logprobs_of_logits(logits_RV, target_row_U, target_token_U, temperature, entropy_gradient)
