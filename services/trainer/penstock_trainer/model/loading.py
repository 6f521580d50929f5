"""Loading a causal language model, and refusing one that cannot be trained in packs."""

import copy
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from penstock.errors import ConfigError
from penstock.model_path import check_model_path
from penstock_trainer.model.pack_model import hidden_states, output_embeddings, prepare_passes
from penstock_trainer.model.sequences import unshareable_layers

MAX_REASON_CHARS = 300
PROBE_TOLERANCE = 1e-3  # of the largest logit; float32 differs by about 1e-6
SAME_COMPUTATION = 1e-5  # likewise, of the same operations in the same order; jitter of 1 % moves logits by 1e-3
PROBE_IDS = [3, 5, 7, 9, 8, 6]  # the sequences 3 5 7 9 and 3 5 8 6 as a trie
APART_IDS = [3, 5, 8, 3, 5, 7, 9]  # 3 5 8 and 3 5 7 9, which share no row


log = logging.getLogger(__name__)


def load_model(path: str, key: str) -> PreTrainedModel:
    """A causal language model with float32 weights and no dropout; ConfigError, with `key`, if it cannot be used."""
    check_model_path(path, key)
    try:
        _check_precision(AutoConfig.from_pretrained(path), path, key)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    except ConfigError:
        raise
    except Exception as error:  # of any library that reads a part of the folder: a reason why it cannot be used
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{key} is {path!r}: expected a causal language model of Hugging Face; {reason[:MAX_REASON_CHARS]}"
        ) from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    absent = sorted(info["missing_keys"]) + sorted(str(each) for each in info["mismatched_keys"])
    if absent:
        raise ConfigError(
            f"{key} is {path!r}, whose files lack {len(absent)} weights or hold other shapes: {absent[:3]}. "
            f"Expected all of {type(model).__name__}; check the folder for missing files"
        )
    if layers := unshareable_layers(model):
        log.info("%s has layers of %s: sequences share no prefixes in the trainer (docs/models.md)", path, layers)
    _disable_dropout(model)
    prepare_passes(model)
    model.train(False)
    _check_packing(model, path, key)
    return model


def _check_precision(config: PreTrainedConfig, path: str, key: str) -> None:
    """Refuse quantized weights: an engine would not take the trained ones under their names."""
    quantization: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    if quantization:
        raise ConfigError(
            f"{key} is {path!r}, whose weights are quantized ({quantization.get('quant_method')}): expected float32, "
            "bfloat16 or float16; choose the model that it was made from"
        )


def _disable_dropout(model: nn.Module) -> None:
    """With dropout the ratio to the sampler's probabilities would compare two different functions.

    Some layers have a module for it, others a number that they hand to a function in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name == "jitter_noise"):
                setattr(module, name, 0.0)


def check_training_mode(model: PreTrainedModel, path: str, key: str) -> None:
    """ConfigError if the model computes something else in training mode, in which activations are recomputed."""
    expected_PV = _probe(model)
    model.train()
    seen_PV = _probe(model)
    model.train(False)
    difference = float((seen_PV - expected_PV).abs().max() / expected_PV.abs().max())
    if not difference < SAME_COMPUTATION:
        raise ConfigError(
            f"{key} is {path!r} ({model.config.model_type}), whose logits differ by {difference:.1e} of the largest in "
            "training mode, which recomputation needs: expected a model without randomness; set "
            "actor.gradient_checkpointing to false or choose another model"
        )


def check_context(model: PreTrainedModel, path: str, key: str, context_length: int) -> None:
    """ConfigError if a sequence of the run may change the frequencies of the shorter ones in its pack.

    LongRoPE has one table of frequencies up to a length and another beyond it, chosen by the longest sequence that is
    computed; the engine chooses by its own batch. context_length: of the engine; 0: the model's.
    """
    config = model.config.get_text_config()
    context_length = context_length or config.max_position_embeddings
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        limit = each.get("original_max_position_embeddings")
        if each.get("rope_type") == "longrope" and limit and context_length > limit:
            raise ConfigError(
                f"{key} is {path!r} with longrope, whose frequencies change for all sequences of a pass if one is "
                f"longer than {limit} tokens: expected rollout.engine.context_length of at most {limit}; it is "
                f"{context_length}"
            )


def _probe(model: PreTrainedModel) -> Tensor:
    """Logits of a pack of two short sequences: of a trie, if the model sees one."""
    vocab_size = model.config.get_text_config().vocab_size
    if unshareable_layers(model):
        ids, positions, ends = APART_IDS, [0, 1, 2, 0, 1, 2, 3], [3] * 3 + [7] * 4
    else:
        ids, positions, ends = PROBE_IDS, [0, 1, 2, 3, 2, 3], [6, 6, 4, 4, 6, 6]
    with torch.no_grad():
        hidden_PD = hidden_states(
            model, torch.tensor(ids) % vocab_size, torch.tensor(positions), torch.tensor(ends), torch.float32
        )
        return cast(Tensor, output_embeddings(model)(hidden_PD))


def _check_packing(model: PreTrainedModel, path: str, key: str) -> None:
    """Two short sequences in one pack must give the logits that each has alone.

    Detects recurrent layers that the configuration does not name, ignored masks, tokens that see later ones, and any
    operation on logits after the projection.
    """
    apart = bool(unshareable_layers(model))
    ids = torch.tensor(APART_IDS if apart else PROBE_IDS) % model.config.get_text_config().vocab_size
    sequences = (ids[:3], ids[3:]) if apart else (ids[:4], torch.cat([ids[:2], ids[4:]]))
    packed_PV = _probe(model)
    with torch.no_grad():
        alone = [model(input_ids=each[None], use_cache=False).logits[0] for each in sequences]
    expected_PV = torch.cat([alone[0], alone[1] if apart else alone[1][2:]])
    difference = float((packed_PV - expected_PV).abs().max() / expected_PV.abs().max())
    if not difference < PROBE_TOLERANCE:
        raise ConfigError(
            f"{key} is {path!r} ({model.config.model_type}), whose logits in a pack of two sequences differ from those "
            f"of each alone by {difference:.1e} of the largest: expected a causal model that mixes tokens by attention "
            "only, or whose config.json names its other layers, with a plain projection at its end; choose another one "
            "(docs/models.md)"
        )


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights, without gradients, for another thread.

    It has its own copy of the state that a forward pass changes: whether the adapter is on, and frequencies that
    depend on the length.
    """
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    second: PreTrainedModel = copy.deepcopy(model, cast(dict[int, Any], weights))
    second.train(False)
    return second
